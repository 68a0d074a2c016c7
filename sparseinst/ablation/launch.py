"""Send what a plan still needs to a cluster, through submitit. Imports no torch.

Trainings are one array, the evaluations of their weights another whose jobs wait for theirs, timings a third. SLURM, processes
of this machine and the debugger share this path; only the executor differs.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Container, Iterator, Sequence
from contextlib import chdir, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparseinst.ablation.arrange import Array, Element
from sparseinst.ablation.cluster import Cluster, Resources
from sparseinst.ablation.compare import Pair, plan_pairs
from sparseinst.ablation.job import StageJob, plain
from sparseinst.ablation.plan import Plan, StageRun
from sparseinst.ablation.provenance import PACKAGE, SNAPSHOT, code_digest, code_files, code_version
from sparseinst.ablation.status import plan_status
from sparseinst.ablation.store import Store
from sparseinst.ablation.submission import EXIT_TRAP, Submission, read_submission, write_submission
from sparseinst.ablation.work import RUNS, run_folder
from sparseinst.attempts import latest, process_name
from sparseinst.errors import RunFailed, UserError
from sparseinst.section import Stage

JOBS = RUNS / "jobs"
"""What submitit keeps: the jobs as they were sent, and what their processes said."""
SNAPSHOTS = RUNS / "snapshots"
_FOREVER = 10_000  # how often a job that ran out of time may go on


def largest_array(cluster: Cluster) -> int:
    """Jobs that one array may hold: the profile's word, else the site's. Raises `RunFailed` where SLURM does not answer."""
    if cluster.array_size is not None:
        return cluster.array_size
    if cluster.kind != "slurm":
        return 1_000_000
    try:
        told = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RunFailed(f"SLURM does not answer here: {_said(error)}") from None
    for line in told.splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize":
            return max(1, int(value))
    return 1000


def launch(plan: Plan, arrays: Sequence[Array], store: Store, cluster: Cluster, name: str) -> list[Submission]:
    """Send the arrays, and leave word of it in the folders of their stages.

    Args:
        name: the cluster profile's.

    Returns:
        One submission a job.

    Raises:
        RunFailed: SLURM refused; says why. What was sent before stays sent.
    """
    code = _snapshot()
    pairs = plan_pairs(plan)
    sent: dict[str, str] = {}
    submissions = []
    for array in arrays:
        for part, dependency in _by_dependency(array, sent, plan.done):
            at = time.time()
            jobs = [_stage_job(element, pairs, plan, store, cluster) for element in part]
            ids = _submit(jobs, array.stage, cluster, code, dependency)
            for element, job in zip(part, ids, strict=True):
                process = process_name(int(job)) if cluster.kind == "local" else None
                submission = Submission(name, cluster.kind, job, str(JOBS.resolve()), at, getpass.getuser(), process)
                submissions.append(submission)
                for run in element.runs:
                    write_submission(run_folder(run.key), submission)
                    sent[run.key] = job
    return submissions


def _by_dependency(array: Array, sent: dict[str, str], done: Container[str] = ()) -> list[tuple[tuple[Element, ...], str | None]]:
    """The array in pieces that sbatch can name one dependency for."""
    wanted = [_job_before(element, sent, done) for element in array.elements]
    together = [job for job in wanted if job is not None]
    if not together:
        return [(array.elements, None)]
    heads = {job.partition("_")[0] for job in together}
    if len(heads) == 1 and wanted == [f"{next(iter(heads))}_{index}" for index in range(len(wanted))]:
        return [(array.elements, f"aftercorr:{next(iter(heads))}")]
    return [((element,), f"afterok:{job}" if job else None) for element, job in zip(array.elements, wanted, strict=True)]


def _job_before(element: Element, sent: dict[str, str], done: Container[str]) -> str | None:
    """The job of the training that must be done before: sent just now, or earlier and not done yet."""
    if element.after is None or element.after in done:
        return None
    submission = read_submission(run_folder(element.after))
    return sent.get(element.after) or (submission.job if submission is not None and submission.kind == "slurm" else None)


def _stage_job(element: Element, pairs: Sequence[Pair], plan: Plan, store: Store, cluster: Cluster) -> StageJob:
    keys = {run.key for run in element.runs}
    return StageJob(
        stages=tuple(plain(run) for run in element.runs),
        pairs=tuple(vars(pair) for pair in pairs if {pair.baseline, pair.other} & keys),
        project=str(Path.cwd()),
        results=str(store.results),
        profile=plan.profile.name,
        gpus=cluster.gpus,
        device_name=plan.device,
        accumulate=cluster.accumulate,
        hang_seconds=float(cluster.hang_seconds),
    )


def _submit(jobs: Sequence[StageJob], stage: Stage, cluster: Cluster, code: Path, dependency: str | None) -> list[str]:
    """The jobs' names, once they are sent. Raises `RunFailed`."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    JOBS.mkdir(parents=True, exist_ok=True)
    resources = cluster.resources(stage)
    try:
        if cluster.kind == "slurm":
            executor: Any = submitit.SlurmExecutor(JOBS.resolve(), max_num_timeout=_FOREVER)
            executor.update_parameters(**slurm_parameters(stage, cluster, code, dependency))
        elif cluster.kind == "local":
            executor = submitit.LocalExecutor(JOBS.resolve(), max_num_timeout=_FOREVER)
            executor.update_parameters(
                timeout_min=resources.time,
                signal_delay_s=cluster.signal_delay,
                nodes=resources.nodes,
                tasks_per_node=resources.tasks_per_node,
                gpus_per_node=resources.gpus_per_node,
            )
        else:
            executor = submitit.DebugExecutor(JOBS.resolve())
        started_as = _started_in(code, _variables(cluster, resources, code)) if cluster.kind == "local" else nullcontext()
        with started_as, executor.batch():  # one array where the executor has arrays
            sent = [executor.submit(job) for job in jobs]
    except (FailedSubmissionError, FailedJobError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        raise RunFailed(f"{cluster.kind} refused the {stage} jobs: {_said(error)}") from None
    if cluster.kind == "debug":
        for job in sent:
            job.results()
    return [job.job_id for job in sent]


def slurm_parameters(stage: Stage, cluster: Cluster, code: Path, dependency: str | None) -> dict[str, Any]:
    """What submitit's SLURM executor takes, in sbatch's words."""
    resources = cluster.resources(stage)
    parameters = {
        "job_name": f"sparseinst-{stage}",
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.tasks_per_node,
        "gpus_per_node": resources.gpus_per_node or None,
        "cpus_per_task": resources.cpus_per_task,
        "mem": f"{resources.memory_gb}GB" if resources.memory_gb else None,
        "time": resources.time,
        "signal_delay_s": cluster.signal_delay,
        "array_parallelism": cluster.parallelism,
        "dependency": dependency,
        "setup": [
            *(line.format(folder=shlex.quote(str(JOBS.resolve()))) for line in EXIT_TRAP),
            *_setup(cluster, resources, code),
        ],
        # One dead process ends its job: the others would wait for it.
        # srun does not take its processors from sbatch in every version.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus_per_task}", *cluster.container],
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes", **cluster.extra},
    }
    return {name: value for name, value in parameters.items() if value is not None}


def sbatch_text(array: Array, cluster: Cluster, code: Path) -> str:
    """The batch script of an array, as `--dry-run` shows it."""
    from submitit.slurm.slurm import _make_sbatch_string

    dependency = "aftercorr:<the trainings>" if any(element.after for element in array.elements) else None
    parameters = slurm_parameters(array.stage, cluster, code, dependency)
    count = len(array.elements) if len(array.elements) > 1 else None
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(JOBS.resolve()))}"
    return _make_sbatch_string(command=command, folder=JOBS.resolve(), map_count=count, **parameters)


def _setup(cluster: Cluster, resources: Resources, code: Path) -> list[str]:
    """Shell lines before Python: the site's own, then what makes the copied code the one that runs."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in _variables(cluster, resources, code).items()]
    # python -m looks into the working folder first.
    return [*cluster.setup, *exports, f"cd {shlex.quote(str(code.resolve()))} || exit 1"]


def _variables(cluster: Cluster, resources: Resources, code: Path) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(resources.cpus_per_task), **cluster.environment, "PYTHONPATH": str(code.resolve())}


@contextmanager
def _started_in(folder: Path, variables: dict[str, str]) -> Iterator[None]:
    """What is started meanwhile starts in that folder, with those variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        with chdir(folder):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _snapshot() -> Path:
    """A copy of the package as it is now, named by its content and version; made once."""
    version = json.dumps(code_version())
    folder = SNAPSHOTS / hashlib.sha256(f"{code_digest()} {version}".encode()).hexdigest()[:16]
    if not folder.exists():
        temporary = SNAPSHOTS / f".{uuid.uuid4().hex[:8]}.tmp"
        for path in code_files():
            target = temporary / PACKAGE.name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PACKAGE / path, target)
        (temporary / SNAPSHOT).write_text(version + "\n", encoding="utf-8")
        try:
            temporary.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(temporary)
    return folder


def cancel(runs: Sequence[StageRun], plan: Plan) -> list[str]:
    """Take stages off their cluster, with those that wait for them, and with those that share their jobs.

    Returns:
        The jobs that were cancelled.

    Raises:
        UserError: none of them is on a cluster now.
        RunFailed: SLURM refused.
    """
    keys = {run.key for run in runs}
    there = {
        status.run.key: submission
        for status in plan_status(plan)
        if status.state in ("queued", "running") and (submission := read_submission(run_folder(status.run.key))) is not None
    }
    jobs = {there[run.key].job: there[run.key] for run in plan.runs.values() if {run.key, run.needs} & keys and run.key in there}
    if not jobs:
        raise UserError("none of these runs is on a cluster; `sparseinst status` tells what is")
    slurm = [job for job, submission in jobs.items() if submission.kind == "slurm"]
    if slurm:
        try:
            told = subprocess.run(["scancel", *slurm], capture_output=True, text=True, check=False, timeout=60).stderr
        except (OSError, subprocess.SubprocessError) as error:
            raise RunFailed(f"scancel: {_said(error)}") from None
        refused = [line for line in told.splitlines() if "error" in line and "Invalid job id" not in line]
        if refused:  # a job that is over already is none
            raise RunFailed(f"scancel: {refused[0]}")
    for key, submission in there.items():
        if submission.job in jobs:
            if submission.kind != "slurm":
                _end_processes(key, submission)
            write_submission(run_folder(key), replace(submission, cancelled=True))
    return list(jobs)


def _end_processes(key: str, submission: Submission) -> None:
    """Of a job on this machine: those that work on the run, and then the one that started them."""
    past = latest(run_folder(key))
    pids = [said.get("pid") for _, said in past.beats.values()] if past is not None and past.at_work() else []
    controller = int(submission.process.split()[0]) if submission.process is not None else None
    alive = controller is not None and process_name(controller) == submission.process
    for pid in (*pids, controller if alive else None):
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGINT)


def _said(error: BaseException) -> str:
    """The last line of what a command, or submitit, said."""
    text = str(getattr(error, "stderr", None) or error).strip()
    return text.splitlines()[-1] if text else type(error).__name__
