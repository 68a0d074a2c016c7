"""Send stages of a plan to a cluster through submitit, and cancel them. Imports no torch.

Pretrainings form one array. The trainings that need the same pretraining form another one. Their evaluations form one in which
each job waits for its training, and timings form the last one.
SLURM, local processes and the debugger share this code; only submitit's executor differs.
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

from sparseinst.ablation.plan import Plan, StageRun
from sparseinst.ablation.provenance import PACKAGE, SNAPSHOT, code_digest, code_files, code_version, command_line
from sparseinst.ablation.store import Store
from sparseinst.attempt_files import latest_attempt
from sparseinst.errors import RunFailed, UserError
from sparseinst.files import private_files, write_error
from sparseinst.launch.arrange import Array, Element
from sparseinst.launch.cluster import Cluster, Resources
from sparseinst.launch.job import StageJob, plain
from sparseinst.launch.status import plan_status
from sparseinst.launch.submission import EXIT_TRAP, Submission, read_submission, write_submission
from sparseinst.machine import machine_name, process_name
from sparseinst.paths import JOBS, SNAPSHOTS, run_folder
from sparseinst.section import Stage

_FOREVER = 10_000  # how often a job that reached its time limit may continue


def largest_array(cluster: Cluster) -> int:
    """Return the most jobs that one array may have: the profile's `array_size`, else the site's MaxArraySize.

    Raises:
        RunFailed: SLURM does not answer.
    """
    if cluster.array_size is not None:
        return cluster.array_size
    if cluster.kind != "slurm":
        return 1_000_000
    try:
        settings = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RunFailed(f"SLURM does not answer here: {_last_line(error)}") from None
    for line in settings.splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize":
            return max(1, int(value))
    return 1000


def launch(
    plan: Plan, arrays: Sequence[Array], store: Store, cluster: Cluster, name: str, *, from_scratch: bool = False
) -> list[Submission]:
    """Send the arrays, and write a `Submission` to the folder of each of their stages.

    Args:
        name: the name of the cluster profile.
        from_scratch: trainings whose checkpoints are all damaged begin at step 0; otherwise they fail.

    Returns:
        One submission for each job.

    Raises:
        UserError, RunFailed: no record could be written.
        RunFailed: SLURM refused an array; the message says why. Arrays that were sent before stay in the queue.
    """
    store.check_writable()
    code = _snapshot()
    JOBS.mkdir(parents=True, exist_ok=True)  # with the user's own file mode mask
    sent: dict[str, str] = {}
    submissions = []
    for array in arrays:
        for part, dependency in _by_dependency(array, sent, plan.done):
            at = time.time()
            jobs = [_stage_job(element, plan, store, cluster, from_scratch) for element in part]
            with private_files() as mask:
                jobs = [replace(job, umask=mask) for job in jobs]
                ids = _submit(jobs, array.stage, cluster, code, dependency, mask)
            for element, job in zip(part, ids, strict=True):
                process = process_name(int(job)) if cluster.kind == "local" else None
                machine = machine_name() if cluster.kind == "local" else None
                submission = Submission(name, cluster.kind, job, str(JOBS.resolve()), at, getpass.getuser(), process, machine)
                submissions.append(submission)
                for run in element.runs:
                    write_submission(run_folder(run.key), submission)
                    sent[run.key] = job
    return submissions


def _by_dependency(array: Array, sent: dict[str, str], done: Container[str] = ()) -> list[tuple[tuple[Element, ...], str | None]]:
    """Split an array into parts that need one sbatch dependency each. Return (elements, dependency) for each part."""
    needed = [_job_before(element, sent, done) for element in array.elements]
    waiting_for = [job for job in needed if job is not None]
    if not waiting_for:
        return [(array.elements, None)]
    if len(set(needed)) == 1:  # all elements need the same pretraining
        return [(array.elements, f"afterok:{needed[0]}")]
    arrays = {job.partition("_")[0] for job in waiting_for}
    if len(arrays) == 1 and needed == [f"{next(iter(arrays))}_{index}" for index in range(len(needed))]:
        return [(array.elements, f"aftercorr:{next(iter(arrays))}")]
    return [((element,), f"afterok:{job}" if job else None) for element, job in zip(array.elements, needed, strict=True)]


def _job_before(element: Element, sent: dict[str, str], done: Container[str]) -> str | None:
    """Return the job that must finish before an element starts; None if there is none.

    This launch or an earlier one may have sent that job.
    """
    if element.after is None or element.after in done:
        return None
    submission = read_submission(run_folder(element.after))
    return sent.get(element.after) or (submission.job if submission is not None and submission.kind == "slurm" else None)


def _stage_job(element: Element, plan: Plan, store: Store, cluster: Cluster, from_scratch: bool) -> StageJob:
    return StageJob(
        stages=tuple(plain(run) for run in element.runs),
        project=str(Path.cwd()),
        results=str(store.results),
        profile=plan.profile.name,
        gpus=cluster.gpus,
        device_name=plan.device,
        parts=cluster.parts,
        hang_seconds=float(cluster.hang_seconds),
        command=command_line(),
        from_scratch=from_scratch,
    )


def _submit(jobs: Sequence[StageJob], stage: Stage, cluster: Cluster, code: Path, dependency: str | None, mask: int) -> list[str]:
    """Submit jobs that have the same dependency, and return their ids. Raises `RunFailed` if they are refused.

    Args:
        mask: the file mode mask of the jobs' own files.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    resources = cluster.resources(stage)
    try:
        if cluster.kind == "slurm":
            executor: Any = submitit.SlurmExecutor(JOBS.resolve(), max_num_timeout=_FOREVER)
            executor.update_parameters(**slurm_parameters(stage, cluster, code, dependency, mask))
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
        local = cluster.kind == "local"
        environment = _folder_and_variables(code, _variables(cluster, resources, code)) if local else nullcontext()
        with environment, executor.batch():  # one array, if the executor supports arrays
            sent = [executor.submit(job) for job in jobs]
    except (FailedSubmissionError, FailedJobError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        raise RunFailed(f"{cluster.kind} refused the {stage} jobs: {_last_line(error)}") from None
    if cluster.kind == "debug":
        for job in sent:
            job.results()
    return [job.job_id for job in sent]


def slurm_parameters(stage: Stage, cluster: Cluster, code: Path, dependency: str | None, mask: int = 0o022) -> dict[str, Any]:
    """Return the parameters of submitit's SLURM executor; their names are sbatch's. `mask` is the jobs' file mode mask."""
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
            f"umask {mask:04o}",
            *(line.format(folder=shlex.quote(str(JOBS.resolve()))) for line in EXIT_TRAP),
            *_setup(cluster, resources, code),
        ],
        # If one process dies, srun ends the job; the other processes would wait for it forever.
        # Not every version of srun inherits cpus-per-task from sbatch, so it is passed again.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus_per_task}", *cluster.container],
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes", **cluster.extra},
    }
    return {name: value for name, value in parameters.items() if value is not None}


def sbatch_text(array: Array, cluster: Cluster, code: Path) -> str:
    """Return the batch script of an array, for `--dry-run`."""
    from submitit.slurm.slurm import _make_sbatch_string

    waits = any(element.after for element in array.elements)
    dependency = ("afterok:<the pretraining>" if array.stage == "train" else "aftercorr:<the trainings>") if waits else None
    parameters = slurm_parameters(array.stage, cluster, code, dependency)
    count = len(array.elements) if len(array.elements) > 1 else None
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(JOBS.resolve()))}"
    return _make_sbatch_string(command=command, folder=JOBS.resolve(), map_count=count, **parameters)


def _setup(cluster: Cluster, resources: Resources, code: Path) -> list[str]:
    """Return the shell lines that run before Python: the profile's, then those that select the copied code."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in _variables(cluster, resources, code).items()]
    # `python -m` searches the working folder first.
    return [*cluster.setup, *exports, f"cd {shlex.quote(str(code.resolve()))} || exit 1"]


def _variables(cluster: Cluster, resources: Resources, code: Path) -> dict[str, str]:
    ours = {"OMP_NUM_THREADS": str(resources.cpus_per_task), "OMP_WAIT_POLICY": "PASSIVE"}  # see `machine.wait_passively`
    return {**ours, **cluster.environment, "PYTHONPATH": str(code.resolve())}


@contextmanager
def _folder_and_variables(folder: Path, variables: dict[str, str]) -> Iterator[None]:
    """Set the working folder and environment variables, for processes that are started meanwhile."""
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
    """Copy the package as it is now to a folder named by its content and version, unless that exists. Return the folder."""
    version = json.dumps(code_version())
    folder = SNAPSHOTS / hashlib.sha256(f"{code_digest()} {version}".encode()).hexdigest()[:16]
    if not folder.exists():
        temporary = SNAPSHOTS / f".{uuid.uuid4().hex[:8]}.tmp"
        try:
            for path in code_files():
                target = temporary / PACKAGE.name / path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(PACKAGE / path, target)
            (temporary / SNAPSHOT).write_text(version + "\n", encoding="utf-8")
            temporary.rename(folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if not folder.exists():  # otherwise another process was first
                raise write_error(SNAPSHOTS, error) or error from None
    return folder


def cancel(runs: Sequence[StageRun], plan: Plan) -> list[str]:
    """Cancel the jobs of stages, and of the stages that wait for them. This also stops other stages of the same jobs.

    Returns:
        The jobs that were cancelled.

    Raises:
        UserError: none of the stages is on a cluster now, or one runs in a process of another machine.
        RunFailed: SLURM refused.
    """
    keys = {run.key for run in runs}
    submissions = {
        status.run.key: submission
        for status in plan_status(plan)
        if status.state in ("queued", "running")
        and (submission := read_submission(run_folder(status.run.key))) is not None
        and submission.job == status.job  # otherwise `sparseinst run` does the stage now
    }
    for run in plan.runs.values():  # a stage comes after those that it needs
        keys |= {run.key} if run.needs in keys else set()
    jobs = {submissions[key].job: submissions[key] for key in plan.runs if key in keys and key in submissions}
    if not jobs:
        waiting = [
            submission.job
            for status in plan_status(plan)
            if status.run.key in keys
            and status.state == "running"
            and (submission := read_submission(run_folder(status.run.key))) is not None
        ]
        also = f"; `sparseinst run` does them, and {', '.join(waiting)} may still wait (scancel)" if waiting else ""
        raise UserError(f"none of these runs is on a cluster{also}; `sparseinst status` shows which are")
    for job, submission in jobs.items():
        if submission.kind != "slurm" and submission.machine not in (None, machine_name()):
            host = str(submission.machine).partition(" ")[0]
            raise UserError(f"job {job} was started on {host}, and this is another machine or container: cancel it there")
    slurm = [job for job, submission in jobs.items() if submission.kind == "slurm"]
    if slurm:
        try:
            errors = subprocess.run(["scancel", *slurm], capture_output=True, text=True, check=False, timeout=60).stderr
        except (OSError, subprocess.SubprocessError) as error:
            raise RunFailed(f"scancel: {_last_line(error)}") from None
        # A job that has ended already has no valid id any more.
        refused = [line for line in errors.splitlines() if "error" in line and "Invalid job id" not in line]
        if refused:
            raise RunFailed(f"scancel: {refused[0]}")
    for key, submission in submissions.items():
        if submission.job in jobs:
            if submission.kind != "slurm":
                _end_processes(key, submission)
            write_submission(run_folder(key), replace(submission, cancelled=True))
    return list(jobs)


def _end_processes(key: str, submission: Submission) -> None:
    """Interrupt the processes of a job on this machine: the ranks first, then the process that started them.

    An id alone is not enough: on another machine, or after some time, it belongs to a process of somebody else.
    """
    attempt = latest_attempt(run_folder(key))
    beats = [beat for _, beat in attempt.beats.values()] if attempt is not None and attempt.at_work() else []
    processes = [beat.process for beat in beats if beat.machine == machine_name()]
    for process in (*processes, submission.process):
        pid = int(process.split()[0]) if process else 0
        if pid and process_name(pid) == process:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)


def _last_line(error: BaseException) -> str:
    """Return the last line of a failed command's standard error, or of the exception's message."""
    text = str(getattr(error, "stderr", None) or error).strip()
    return text.splitlines()[-1] if text else type(error).__name__
