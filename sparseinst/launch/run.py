"""Do the stages of a plan that have no record yet, in this process or in several on this machine. Imports no torch by itself.

Any number of processes may run the same plan. Each stage is claimed before it is done, so no stage is done twice.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

from sparseinst.ablation.plan import Plan, StageRun
from sparseinst.ablation.provenance import COMMAND, command_line
from sparseinst.ablation.store import Store
from sparseinst.attempts import Attempt, Held, Superseded, reason
from sparseinst.launch.status import Status, watch
from sparseinst.launch.timing import time_rows
from sparseinst.launch.work import StageContext, do_stage
from sparseinst.machine import usable_cores
from sparseinst.paths import RUNS, RunPaths, run_folder
from sparseinst.words import counted

_WAIT = 1.0  # seconds between checks of stages that other processes are doing


def run_plan(
    plan: Plan, store: Store, *, device: str | None, progress: bool = True, from_scratch: bool = False
) -> dict[str, str]:
    """Do all stages of a plan that have no record.

    If a stage fails, the stages that need its weights fail too; the others continue.

    Args:
        from_scratch: trainings whose checkpoints are all damaged begin at step 0; otherwise they fail.

    Returns:
        The reason of each failure, by the stage's key.
    """
    context = StageContext(plan.profile.name, device, plan.device, progress, from_scratch=from_scratch)
    worker = _Worker(plan, store, context)
    worker.work()
    return worker.failed


def made_elsewhere(plan: Plan, store: Store) -> list[StageRun]:
    """Return the stages that others did: their records were in the store when the plan was made, and they have no folder here.

    The stages that come with the package itself are not among them.
    """
    done = [run for run in plan.runs.values() if run.key in plan.done and store.path(run.key).exists()]
    return [run for run in done if not run_folder(run.key).root.exists()]


class _Worker:
    """Does the stages of a plan in one process."""

    def __init__(self, plan: Plan, store: Store, context: StageContext) -> None:
        self.plan, self.store, self.context = plan, store, context
        self.failed: dict[str, str] = {}
        self.finished: set[str] = set()
        self.begun, self.total = 0, len(plan.to_do())

    def work(self) -> None:
        """Do the stages, and time rows whenever no other stage can be done here."""
        stages = [run for run in self.plan.to_do() if run.stage != "latency"]
        timings = [run for run in self.plan.to_do() if run.stage == "latency"]
        while stages or timings:
            left = [run for run in stages if not self._finish(run)]
            untimed = self._untimed(timings) if len(left) == len(stages) else timings
            if (len(left), len(untimed)) == (len(stages), len(timings)):
                time.sleep(_WAIT)  # other processes are doing all stages that could be done now
            stages, timings = left, untimed

    def _untimed(self, waiting: list[StageRun]) -> list[StageRun]:
        """Time the rows by turns, and return those that another process is timing."""
        waiting = [run for run in waiting if not self._is_done(run)]
        if not waiting:
            return []
        began = time.perf_counter()

        def begin(rows: Sequence[StageRun]) -> None:
            print(f"[{self.begun + 1}/{self.total}] latency of {counted(len(rows), 'row')}, by turns", flush=True)

        ended = time_rows(waiting, self.store, self.context, begin)
        for run in waiting:
            if run.key not in ended:
                continue
            self.begun += 1
            if (failure := ended[run.key]) is not None:
                self.failed[run.key] = reason(failure)
                print(f"error: {run.label}: {self.failed[run.key]}", file=sys.stderr, flush=True)
            else:
                self.finished.add(run.key)
                print(f"      {run.label}{_outcome(run, self.store)}", flush=True)
        if ended:
            print(f"      done in {time.perf_counter() - began:.0f} s", flush=True)
        return [run for run in waiting if run.key not in ended]

    def _finish(self, run: StageRun) -> bool:
        """Do the stage if it can be done now. Return whether it is finished: recorded or failed."""
        if self._is_done(run):
            return True
        if run.needs in self.failed:
            self.failed[run.key] = f"it needs the weights of {run.needs}, which failed"
            return True
        if run.needs is not None and not self._is_done(self.plan.runs[run.needs]):
            return False
        return self._attempt(run)

    def _is_done(self, run: StageRun) -> bool:
        """Return whether the stage is done. One that this process finished stays so, even if its record is removed meanwhile."""
        return run.key in self.finished or run.is_done(self.store)

    def _attempt(self, run: StageRun) -> bool:
        """Do the stage. Return whether it is finished; False if another process is doing it."""
        began = time.perf_counter()
        number = self.begun + 1

        def claim(paths: RunPaths) -> AbstractContextManager[Attempt]:
            attempt = self.context.claim(paths)
            if not run.is_done(self.store):  # otherwise another process finished it meanwhile
                print(f"[{number}/{self.total}] {run.stage} {run.label}: {run.key}", flush=True)
                self.begun = number
            return attempt

        try:
            do_stage(run, self.store, replace(self.context, claim=claim))
        except (Held, Superseded):  # another process is doing it, or has taken it over
            return False
        except Exception as error:  # noqa: BLE001 (no error of one stage may stop the others)
            self.failed[run.key] = reason(error)
            print(f"error: {run.label}: {self.failed[run.key]}", file=sys.stderr, flush=True)
            return True
        self.finished.add(run.key)
        if self.begun == number:
            print(f"      done in {time.perf_counter() - began:.0f} s{_outcome(run, self.store)}", flush=True)
        return True


def _outcome(run: StageRun, store: Store) -> str:
    """Return the main result of a recorded stage, to append to a printed line."""
    record = store.load(run.key)
    if record is None:
        return ""
    if run.stage == "evaluate":
        ap = record.result["figures"]["AP"]
        return f": AP {ap:.1f}" if ap is not None else ": no AP, because the validation images contain no objects"
    return f": {record.result['whole_ms']['median']:.1f} ms" if run.stage == "latency" else ""


def run_in_processes(
    arguments: Sequence[str], jobs: int, devices: Sequence[str | None], get_states: Callable[[], Sequence[Status]]
) -> int:
    """Run the same command in several processes, which share the work.

    Each process writes its output to runs/process-PID-N.txt, with this process's id; the terminal shows the state of every run.

    Args:
        arguments: the arguments of `sparseinst`, without `--jobs`.
        jobs: the number of processes.
        devices: assigned to the processes in turn; None lets a process choose its device.
        get_states: returns the current state of every stage.

    Returns:
        The number of processes that failed.
    """
    threads = str(max(1, usable_cores() // jobs))
    RUNS.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        processes = []
        for number in range(jobs):
            device = devices[number % len(devices)]
            command = [sys.executable, "-m", "sparseinst", *arguments, *(["--device", device] if device else [])]
            output = stack.enter_context((RUNS / f"process-{os.getpid()}-{number}.txt").open("a", encoding="utf-8"))
            environment = {**os.environ, "OMP_NUM_THREADS": threads, COMMAND: command_line()}
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        try:
            watch(get_states, lambda: any(process.poll() is None for process in processes))
            return sum(process.wait() != 0 for process in processes)
        finally:  # also if this process is stopped
            for process in processes:
                process.terminate()
