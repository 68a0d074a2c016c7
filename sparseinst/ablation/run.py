"""Do what a plan still needs, here and now. Imports no torch by itself.

Any number of processes may run the same plan: each stage is claimed by a lock, so they share the work and do nothing twice.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

from sparseinst.ablation.compare import compare_pairs, plan_pairs
from sparseinst.ablation.plan import Plan, StageRun
from sparseinst.ablation.status import Status, watch
from sparseinst.ablation.store import Store
from sparseinst.ablation.work import RUNS, Place, do_stage
from sparseinst.attempts import Attempt, Held, reason, usable_cores
from sparseinst.paths import RunPaths

_log = logging.getLogger(__name__)

_WAIT = 1.0  # seconds between looks at what other processes hold


def run_plan(plan: Plan, store: Store, *, device: str | None, progress: bool = True) -> dict[str, str]:
    """Do all stages of a plan that have no record, then compare rows over their images.

    A stage that fails is noted and the others go on; what needs its weights fails with it.

    Returns:
        Why, by key, of the stages that failed.
    """
    place = Place(plan.profile.name, device, plan.device, progress)
    worker = _Worker(plan, store, place)
    worker.work()
    missing = compare_pairs(plan_pairs(plan), store)
    if missing:
        _log.warning(
            "%d comparisons over images were left out: the predictions of evaluations that are already recorded are not in %s",
            missing,
            RUNS,
        )
    return worker.failed


class _Worker:
    """One process on its way through a plan."""

    def __init__(self, plan: Plan, store: Store, place: Place) -> None:
        self.plan, self.store, self.place = plan, store, place
        self.failed: dict[str, str] = {}
        self.begun, self.total = 0, len(plan.to_do())

    def work(self) -> None:
        waiting = self.plan.to_do()
        while waiting:
            left = [run for run in waiting if not self._settled(run)]
            if len(left) == len(waiting):  # other processes hold all that could be done now
                time.sleep(_WAIT)
            waiting = left

    def _settled(self, run: StageRun) -> bool:
        """Do the stage if it can be done; whether it needs no more looking at."""
        if self.store.has(run.key):
            return True
        if run.needs in self.failed:
            self.failed[run.key] = f"training {run.needs} failed"
            return True
        if run.needs is not None and not self.store.has(run.needs):
            return False
        return self._attempt(run)

    def _attempt(self, run: StageRun) -> bool:
        """Do the stage; whether it needs no more looking at."""
        began = time.perf_counter()
        number = self.begun + 1

        def claim(paths: RunPaths) -> AbstractContextManager[Attempt]:
            attempt = self.place.claim(paths)
            # Not where the record came while we went for the claim, nor for weights that are made again.
            if not self.store.has(run.key) and paths.root.name == run.key:
                print(f"[{number}/{self.total}] {run.stage} {run.label}: {run.key}", flush=True)
                self.begun = number
            return attempt

        try:
            do_stage(run, self.store, replace(self.place, claim=claim))
        except Held:  # another process is at it
            return False
        except Exception as error:  # noqa: BLE001 (whatever it is, it must not take the other stages along)
            self.failed[run.key] = reason(error)
            print(f"error: {run.label}: {self.failed[run.key]}", file=sys.stderr, flush=True)
            return True
        if self.begun == number:
            print(f"      done in {time.perf_counter() - began:.0f} s{_outcome(run, self.store)}", flush=True)
        return True


def _outcome(run: StageRun, store: Store) -> str:
    record = store.load(run.key)
    if record is None:
        return ""
    if run.stage == "evaluate":
        ap = record.result["figures"]["AP"]
        return f": AP {ap:.1f}" if ap is not None else ": no AP, the validation images hold no objects"
    return f": {record.result['whole_ms']['median']:.1f} ms" if run.stage == "latency" else ""


def run_in_processes(
    arguments: Sequence[str], jobs: int, devices: Sequence[str | None], look: Callable[[], Sequence[Status]]
) -> int:
    """The same command in several processes, which share the work; the number of those that failed.

    What each says goes to a file of its own below the runs' folder; the terminal shows the state of every run.

    Args:
        arguments: of `sparseinst`, without `--jobs`.
        devices: taken by turns; None leaves the choice to the process.
        look: how things stand.
    """
    threads = str(max(1, usable_cores() // jobs))
    RUNS.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        processes = []
        for number in range(jobs):
            device = devices[number % len(devices)]
            command = [sys.executable, "-m", "sparseinst", *arguments, *(["--device", device] if device else [])]
            output = stack.enter_context((RUNS / f"process-{number}.txt").open("a", encoding="utf-8"))
            environment = {**os.environ, "OMP_NUM_THREADS": threads}
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        try:
            watch(look, lambda: any(process.poll() is None for process in processes))
            return sum(process.wait() != 0 for process in processes)
        finally:  # also when this process is stopped
            for process in processes:
                process.terminate()
