"""Do what a plan still needs, here and now. Imports no torch by itself.

Any number of processes may run the same plan: each stage is claimed by a lock, so they share the work and do nothing twice.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from filelock import FileLock, Timeout

from sparseinst.ablation.compare import compare_rows
from sparseinst.ablation.plan import Plan, StageRun
from sparseinst.ablation.status import Status, watch
from sparseinst.ablation.store import Store
from sparseinst.ablation.work import RUNS, do_stage, note_state, run_folder
from sparseinst.errors import RunFailed, UserError

_WAIT = 1.0  # seconds between looks at what other processes hold


def run_plan(plan: Plan, store: Store, *, device: str | None, progress: bool = True) -> dict[str, str]:
    """Do all stages of a plan that have no record, then compare rows over their images.

    A stage that fails is noted and the others go on; what needs its weights fails with it.

    Returns:
        Why, by key, of the stages that failed.
    """
    worker = _Worker(plan, store, device, progress)
    worker.work()
    compare_rows(plan, store)
    return worker.failed


class _Worker:
    """One process on its way through a plan."""

    def __init__(self, plan: Plan, store: Store, device: str | None, progress: bool) -> None:
        self.plan, self.store, self.device, self.progress = plan, store, device, progress
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
        paths = run_folder(run.key)
        paths.root.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(paths.claim, timeout=0):
                if not self.store.has(run.key):  # it may have come while we went for the lock
                    self._attempt(run)
        except Timeout:  # another process is at it
            return False
        return True

    def _attempt(self, run: StageRun) -> None:
        """Do the stage and note what became of it."""
        self.begun += 1
        print(f"[{self.begun}/{self.total}] {run.stage} {run.label}: {run.key}", flush=True)
        began = time.time()
        note_state(run.key, state="running", pid=os.getpid(), began=began)
        plan = self.plan
        try:
            do_stage(
                run, self.store, profile=plan.profile.name, device=self.device, device_name=plan.device, progress=self.progress
            )
        except Exception as error:  # noqa: BLE001 (whatever it is, it must not take the other stages along)
            reason = str(error) if isinstance(error, RunFailed | UserError) else f"{type(error).__name__}: {error}"
            reason = (reason.splitlines() or [type(error).__name__])[0]
            note_state(run.key, state="failed", reason=reason, traceback=traceback.format_exc())
            print(f"error: {run.label}: {reason}", file=sys.stderr, flush=True)
            self.failed[run.key] = reason
            return
        note_state(run.key, state="done")
        print(f"      done in {time.time() - began:.0f} s{_outcome(run, self.store)}", flush=True)


def _outcome(run: StageRun, store: Store) -> str:
    record = store.load(run.key)
    if record is None:
        return ""
    if run.stage == "evaluate":
        return f": AP {record.result['figures']['AP']:.1f}"
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
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
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
