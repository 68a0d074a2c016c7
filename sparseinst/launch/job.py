"""The callable that runs on a node; it holds plain data only. Imports torch when it is called.

All processes of a job call it. Rank 0 claims each stage's folder and publishes the address at which the others connect to it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseinst.ablation.plan import StageRun
from sparseinst.ablation.provenance import COMMAND
from sparseinst.ablation.store import Store
from sparseinst.attempts import Attempt, Held, Job, reason
from sparseinst.errors import RunFailed
from sparseinst.files import private_files
from sparseinst.launch.work import StageContext, do_stage
from sparseinst.machine import device_name
from sparseinst.overrides import parse_config
from sparseinst.paths import RunPaths

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission


_WAIT = 5.0  # seconds between checks of a pretraining that another job is doing


@dataclass(frozen=True)
class StageJob:
    """Stages that a job does one after the other, and the settings of that job."""

    stages: tuple[dict[str, Any], ...]
    """The fields of each `StageRun`, with the config as plain data."""
    project: str
    """The working folder; paths of data, runs and results are relative to it."""
    results: str
    profile: str
    gpus: bool
    """Whether the stages need a GPU."""
    device_name: str
    """The device's name, as it is used in the keys of timings."""
    parts: int | None
    hang_seconds: float
    command: str
    """The command that sent the job."""
    from_scratch: bool = False
    """Whether a training whose checkpoints are all damaged begins at step 0."""
    umask: int | None = None
    """The file mode mask that the job sets; None keeps that of its process."""

    def checkpoint(self) -> DelayedSubmission:
        """Return the job that submitit requeues: this one unchanged, since its progress is on disk already.

        submitit calls `scontrol requeue` next. SLURM then ends all processes of the job, and also scontrol. If scontrol ended
        before it got its reply, the attempt would count as failed. It therefore inherits blocked signals from this process.
        """
        from submitit.helpers import DelayedSubmission

        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGCONT))

        class Private(DelayedSubmission):
            """Write the pickle for this user alone; the files that this process still writes keep the mask of the user."""

            def dump(self, filepath: str | Path) -> None:
                plain = DelayedSubmission(self.function)  # submitit loads no other class
                plain.set_timeout(self._timeout_min, self._timeout_countdown)
                with private_files():
                    plain.dump(filepath)

        return Private(self)

    def __call__(self) -> None:
        """Do all stages. Raises `RunFailed` if some failed, after the others are done."""
        if self.umask is not None:
            os.umask(self.umask)
        os.chdir(self.project)
        os.environ[COMMAND] = self.command
        logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
        if not self.gpus:
            from sparseinst.inference.memory import keep_freed_memory

            keep_freed_memory()
        store = Store(Path(self.results))
        failed: dict[str, str] = {}
        for plain in self.stages:
            run = _stage_run(plain)
            if run.is_done(store):
                continue
            if run.needs is not None and (run.needs in failed or not store.has(run.needs)):
                failed[run.key] = (
                    f"it needs the weights of {run.needs}, which {'failed' if run.needs in failed else 'is not done'}"
                )
                continue
            try:
                while not self._do(run, store):
                    time.sleep(_WAIT)
            except Exception as error:
                if _processes() > 1:  # the other ranks are in an unknown state: fail, so that the launcher ends them all
                    raise
                failed[run.key] = reason(error)
        if failed:
            raise RunFailed("; ".join(f"{key}: {why}" for key, why in failed.items()))

    def _do(self, run: StageRun, store: Store) -> bool:
        """Do a stage.

        Returns:
            False if another job is doing it and this one must wait, as for a pretraining that several jobs need.
        """
        device = _select_gpu() if self.gpus else "cpu"
        name = device_name(device)
        if name != self.device_name:
            raise RunFailed(f"the device here is {name}, but the cluster's profile says device: {self.device_name}")
        context = StageContext(self.profile, device, name, False, self.parts, self.from_scratch, self._claim)
        try:
            do_stage(run, store, context)
        except Held:
            if run.stage != "pretrain" or _processes() > 1:
                raise
            return run.is_done(store)
        return True

    @contextmanager
    def _claim(self, paths: RunPaths) -> Iterator[Attempt]:
        """Claim a folder for all processes of this job, and keep them in one process group meanwhile."""
        job, processes = _job(), _processes()
        if processes == 1:
            with Attempt.begin(paths, job=job, hang_seconds=self.hang_seconds) as attempt:
                yield attempt
            return
        from sparseinst.distributed import group

        assert job is not None
        rank = _rank()
        if rank == 0:
            attempt = Attempt.begin(paths, job=job, world_size=processes, address=_free_address(), hang_seconds=self.hang_seconds)
        else:
            attempt = Attempt.join(paths, job, rank)
        assert attempt.address is not None
        # Enter the attempt first: its hang check then reports why a rank does not answer.
        with attempt, group(attempt.address, rank, processes, timeout_seconds=self.hang_seconds + 60):
            try:
                yield attempt
            except BaseException as error:
                attempt.record_error(error)  # before this rank leaves the group, which may take a while
                raise


def plain(run: StageRun) -> dict[str, Any]:
    """Return a stage as plain data for `StageJob`."""
    config = run.config.model_dump(mode="json")
    return {**asdict(run), "config": config}


def _stage_run(plain: dict[str, Any]) -> StageRun:
    return StageRun(**{**plain, "config": parse_config(plain["config"])})


def _job() -> Job | None:
    """Return the current start of this job; None if no scheduler started this process."""
    import submitit

    try:
        environment = submitit.JobEnvironment()
    except RuntimeError:  # started by hand
        return None
    return Job(environment.job_id, int(os.environ.get("SLURM_RESTART_COUNT", "0")))


def _rank() -> int:
    return _environment("global_rank", 0)


def _processes() -> int:
    return _environment("num_tasks", 1)


def _environment(name: str, default: int) -> int:
    import submitit

    try:
        return int(getattr(submitit.JobEnvironment(), name))
    except RuntimeError:
        return default


def _select_gpu() -> str:
    """Select a GPU for this process, make it the current one, and return its torch name.

    The scheduler may show each task its own GPU or all GPUs of the node; the local rank chooses among those that are visible.
    """
    import torch

    visible = torch.cuda.device_count()
    if not visible:
        raise RunFailed(f"no GPU is available on {socket.gethostname()}: check its driver and the cluster's profile")
    index = _environment("local_rank", 0) % visible
    torch.cuda.set_device(index)
    return f"cuda:{index}"


def _free_address() -> str:
    """Return host:port of a port that is free now, with a host name that the other nodes can resolve."""
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        host = socket.gethostname()
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{host}:{probe.getsockname()[1]}"
