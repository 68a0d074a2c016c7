"""What runs on a node: one importable callable with plain data. Imports torch when it is called.

All processes of a job call it. Rank 0 claims each stage's folder and names the address at which the others meet it.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseinst.ablation.compare import Pair, compare_pairs
from sparseinst.ablation.plan import StageRun, device_name
from sparseinst.ablation.store import Store
from sparseinst.ablation.work import Place, do_stage
from sparseinst.attempts import Attempt, Job, reason
from sparseinst.errors import RunFailed
from sparseinst.overrides import parse_config
from sparseinst.paths import RunPaths

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission


@dataclass(frozen=True)
class StageJob:
    """Stages to be done one after the other, and what else their job needs to know."""

    stages: tuple[dict[str, Any], ...]
    """`stage`, `key`, `label`, `needs` and the whole `config`."""
    pairs: tuple[dict[str, Any], ...]
    """Comparisons that become possible with them."""
    project: str
    """Folder to work in; paths of data, runs and results are relative to it."""
    results: str
    profile: str
    gpus: bool
    """Whether a GPU is needed."""
    device_name: str
    """The device's own name, as the timings' keys have it."""
    accumulate: int | None
    hang_seconds: float

    def checkpoint(self) -> DelayedSubmission:
        """How submitit puts it back into the queue: as it is. Its state is on the disk already."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def __call__(self) -> None:
        """Raises `RunFailed` where a stage failed, after the others were done."""
        os.chdir(self.project)
        logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
        if not self.gpus:
            from sparseinst.engine.memory import keep_freed_memory

            keep_freed_memory()
        store = Store(Path(self.results))
        failed: dict[str, str] = {}
        for plain in self.stages:
            run = _stage_run(plain)
            if store.has(run.key):
                continue
            if run.needs is not None and not store.has(run.needs):
                failed[run.key] = f"training {run.needs} is not done"
                continue
            try:
                self._do(run, store)
            except Exception as error:
                if _processes() > 1:  # the others of this job are in an unknown state: end, so that all are ended
                    raise
                failed[run.key] = reason(error)
        if _rank() == 0:
            compare_pairs([Pair(**pair) for pair in self.pairs], store)
        if failed:
            raise RunFailed("; ".join(f"{key}: {why}" for key, why in failed.items()))

    def _do(self, run: StageRun, store: Store) -> None:
        device = _own_gpu() if self.gpus else "cpu"
        here = device_name(device)
        if here != self.device_name:
            raise RunFailed(f"this is a {here}, the cluster's profile says device: {self.device_name}")
        do_stage(run, store, Place(self.profile, device, here, False, self.accumulate, self._claim))

    @contextmanager
    def _claim(self, paths: RunPaths) -> Iterator[Attempt]:
        """Take a folder with all processes of this job, which meet for as long."""
        job, processes = _job(), _processes()
        if processes == 1:
            with Attempt.begin(paths, job=job, hang_seconds=self.hang_seconds) as attempt:
                yield attempt
            return
        from sparseinst.engine.distributed import group, world_size

        assert job is not None
        rank = _rank()
        if rank == 0:
            attempt = Attempt.begin(paths, job=job, world_size=processes, address=_free_address(), hang_seconds=self.hang_seconds)
        else:
            attempt = Attempt.join(paths, job, rank)
        assert attempt.address is not None
        # They may have met already, for the stage that this folder is needed in. The watch comes first: it knows more of why
        # nobody answers.
        met = world_size() > 1
        meeting = nullcontext() if met else group(attempt.address, rank, processes, timeout_seconds=self.hang_seconds + 60)
        with attempt, meeting:
            try:
                yield attempt
            except BaseException as error:
                attempt.note(error)  # before the others are left, which may take a while
                raise


def plain(run: StageRun) -> dict[str, Any]:
    """A stage as data for `StageJob`."""
    config = run.config.model_dump(mode="json")
    return {"stage": run.stage, "key": run.key, "label": run.label, "needs": run.needs, "config": config}


def _stage_run(plain: dict[str, Any]) -> StageRun:
    return StageRun(plain["stage"], plain["key"], parse_config(plain["config"]), plain["label"], plain["needs"])


def _job() -> Job | None:
    """This start of this job; None where no scheduler has it."""
    import submitit

    try:
        environment = submitit.JobEnvironment()
    except RuntimeError:  # called by hand
        return None
    return Job(environment.job_id, int(os.environ.get("SLURM_RESTART_COUNT", "0")))


def _rank() -> int:
    return _environment("global_rank", 0)


def _processes() -> int:
    return _environment("num_tasks", 1)


def _environment(name: str, otherwise: int) -> int:
    import submitit

    try:
        return int(getattr(submitit.JobEnvironment(), name))
    except RuntimeError:
        return otherwise


def _own_gpu() -> str:
    """This process's GPU among those it sees, made the current one: where each task has its own it sees one, else the node's."""
    import torch

    seen = torch.cuda.device_count()
    if not seen:
        raise RunFailed(f"no GPU can be used on {socket.gethostname()}: the driver, or the cluster's profile, gives none")
    index = _environment("local_rank", 0) % seen
    torch.cuda.set_device(index)
    return f"cuda:{index}"


def _free_address() -> str:
    """A port of this machine that is free now, by the name the other nodes know it by."""
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        host = socket.gethostname()
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{host}:{probe.getsockname()[1]}"
