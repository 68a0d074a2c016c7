"""Select the stages of a plan to send to a cluster, and arrange them in jobs. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparseinst.ablation.plan import StageRun
from sparseinst.errors import UserError
from sparseinst.launch.cluster import Cluster
from sparseinst.launch.status import NEEDS_RETRY, State, Status
from sparseinst.section import Stage


@dataclass(frozen=True)
class Element:
    """One job of an array: stages that it does one after the other, with the same resources."""

    runs: tuple[StageRun, ...]
    after: str | None = None
    """The key of the stage that must be done before."""


@dataclass(frozen=True)
class Array:
    """Jobs that do the same kind of stage."""

    stage: Stage
    elements: tuple[Element, ...]


@dataclass(frozen=True)
class Selection:
    """The stages of a plan to send now, and counts of those that stay."""

    runs: list[StageRun]
    active: int
    """How many are queued or running already."""
    to_retry: int
    """How many failed, were lost or were cancelled; `retry` sends them."""


def select(states: Sequence[Status], *, retry: bool) -> Selection:
    """Return the stages to send.

    If a stage needs a failed stage, only `retry` sends it. If it needs a stage that `sparseinst run` is doing, it is not sent.

    Args:
        retry: True selects the stages that failed, were lost, cancelled or interrupted, and the stages that wait for them. False
            selects the stages that nobody has tried, or whose process was interrupted.
    """
    by_key = {status.run.key: status for status in states}
    wanted: tuple[State, ...] = (*NEEDS_RETRY, "interrupted") if retry else ("pending", "interrupted")
    runs, active, to_retry = [], 0, 0
    for status in states:
        needed = _needed_stages(status, by_key)
        waits_for_failed = any(other.state in NEEDS_RETRY for other in needed)
        if status.state in wanted or (retry and status.state == "pending" and any(other.state in wanted for other in needed)):
            if waits_for_failed and not retry:
                to_retry += 1
            elif any(other.state == "running" and other.job is None for other in needed):
                active += 1  # `sparseinst run` is doing the stage that it needs
            else:
                runs.append(status.run)
        elif status.state in NEEDS_RETRY:
            to_retry += 1
        elif status.state in ("running", "queued"):
            active += 1
    return Selection(runs, active, to_retry)


def _needed_stages(status: Status, by_key: Mapping[str, Status]) -> list[Status]:
    """Return the stages that this one needs, directly or through others, the nearest first."""
    stages = []
    needed = by_key.get(str(status.run.needs))
    while needed is not None:
        stages.append(needed)
        needed = by_key.get(str(needed.run.needs))
    return stages


def arrange(runs: Sequence[StageRun], cluster: Cluster, limit: int) -> list[Array]:
    """Return the jobs that do these stages, in arrays of at most `limit` jobs."""
    if cluster.kind == "debug":
        return [Array("train", (Element(tuple(runs)),))] if runs else []
    if cluster.kind == "local":
        return _for_one_machine(runs, cluster)
    by_training: dict[str, list[StageRun]] = {}
    for run in runs:
        if run.stage == "evaluate":
            by_training.setdefault(str(run.needs), []).append(run)
    trainings = [run for run in runs if run.stage == "train"]
    sent = {run.key for run in trainings}
    pretrainings = [Element((run,)) for run in runs if run.stage == "pretrain"]
    arrays = [Array("pretrain", part) for part in _parts(pretrainings, limit)]
    # Trainings of one array need the same pretraining or none, so that the array needs one dependency.
    by_start = {
        start: [Element((run,), start) for run in trainings if run.needs == start] for start in {r.needs: r for r in trainings}
    }
    for part in (part for elements in by_start.values() for part in _parts(elements, limit)):
        arrays.append(Array("train", part))
        keys = [element.runs[0].key for element in part]
        waiting = tuple(Element(tuple(by_training[key]), after=key) for key in keys if key in by_training)
        arrays += [Array("evaluate", waiting)] if waiting else []
    ready = [Element(tuple(found), after=key) for key, found in by_training.items() if key not in sent]
    arrays += [Array("evaluate", part) for part in _parts(ready, limit)]
    timings = [Element((run,)) for run in runs if run.stage == "latency"]
    return arrays + [Array("latency", part) for part in _parts(timings, limit)]


def _for_one_machine(runs: Sequence[StageRun], cluster: Cluster) -> list[Array]:
    """Return one array with as many jobs as may run at the same time, and divide the stages among them.

    A training and its evaluations stay in one job, after the pretraining that they need. If several jobs contain the same
    pretraining, the first that reaches it does it and the others wait.
    """
    pretrainings = {run.key: run for run in runs if run.stage == "pretrain"}
    chains: dict[str, list[StageRun]] = {}
    for run in runs:
        if run.stage != "pretrain":
            chains.setdefault(str(run.needs) if run.stage == "evaluate" else run.key, []).append(run)
    needed_here = {run.needs for chain in chains.values() for run in chain}
    chains |= {key: [run] for key, run in pretrainings.items() if key not in needed_here}
    shares: list[list[StageRun]] = [[] for _ in range(min(cluster.parallelism, len(chains)))]
    for number, chain in enumerate(chains.values()):
        share = shares[number % len(shares)]
        needed = [pretrainings[run.needs] for run in chain if run.needs in pretrainings]
        share += [run for run in needed if run not in share] + chain
    return [Array("train", tuple(Element(tuple(share)) for share in shares))] if shares else []


def _parts(elements: Sequence[Element], limit: int) -> list[tuple[Element, ...]]:
    return [tuple(elements[first : first + limit]) for first in range(0, len(elements), limit)]


def layout_warning(runs: Sequence[StageRun], cluster: Cluster) -> str | None:
    """Return a warning if trainings split their batch otherwise than the paper (8 processes of 8 images); else None.

    Raises:
        UserError: the batch cannot be divided evenly.
    """
    warning = None
    for run in runs:
        train = run.config.train
        if run.stage == "pretrain" and run.config.pretrain.batch_size % cluster.resources("pretrain").processes:
            raise UserError(
                f"{run.label}: pretrain.batch_size={run.config.pretrain.batch_size} cannot be divided among "
                f"{cluster.resources('pretrain').processes} processes"
            )
        if run.stage != "train":
            continue
        processes = cluster.train.processes
        parts = cluster.parts or processes * train.accumulate
        if parts % processes:
            raise UserError(f"the cluster's profile: parts={parts} cannot be divided among {processes} processes")
        if train.batch_size % parts:
            raise UserError(f"{run.label}: train.batch_size={train.batch_size} cannot be divided into {parts} equal parts")
        warning = run.config.layout_advice(parts) or warning
    return warning


def describe_arrays(arrays: Sequence[Array], cluster: Cluster) -> list[str]:
    """Describe the arrays for people, one line for each."""
    lines = []
    for array in arrays:
        resources, jobs = cluster.resources(array.stage), len(array.elements)
        gpus = f" with {resources.nodes * resources.gpus_per_node} GPUs" if resources.gpus_per_node else ""
        lines.append(
            f"{array.stage}: {jobs} {'job' if jobs == 1 else 'jobs'}, {min(jobs, cluster.parallelism)} at once, each of "
            f"{resources.nodes} x {resources.tasks_per_node} processes{gpus}, {resources.time} minutes at a time"
        )
    return lines
