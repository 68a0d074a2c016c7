"""What of a plan goes to a cluster, and in which jobs. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparseinst.ablation.cluster import Cluster
from sparseinst.ablation.plan import StageRun
from sparseinst.ablation.status import NEEDS_RETRY, State, Status
from sparseinst.errors import UserError
from sparseinst.section import Stage


@dataclass(frozen=True)
class Element:
    """One job: stages done one after the other with the same resources."""

    runs: tuple[StageRun, ...]
    after: str | None = None
    """The training that must be done before, by key."""


@dataclass(frozen=True)
class Array:
    """Jobs of one kind."""

    stage: Stage
    elements: tuple[Element, ...]


@dataclass(frozen=True)
class Selection:
    """What of a plan is sent now, and what is not."""

    runs: list[StageRun]
    held: int
    """A cluster, or a process, has them already."""
    again: int
    """Failed, lost or cancelled: `retry` sends them."""


def select(states: Sequence[Status], *, retry: bool) -> Selection:
    """Of a plan's stages, those to send.

    An evaluation goes with its training, or after it; not where that one failed, or is at work elsewhere.

    Args:
        retry: those that failed, were lost or cancelled, and the evaluations that waited for them; else those that nobody tried,
            or whose process ended.
    """
    of = {status.run.key: status for status in states}
    wanted: tuple[State, ...] = NEEDS_RETRY if retry else ("pending", "interrupted")
    runs, held, again = [], 0, 0
    for status in states:
        training = of.get(str(status.run.needs))
        waits_for_failed = training is not None and training.state in NEEDS_RETRY
        if status.state in wanted or (retry and waits_for_failed and status.state == "pending"):
            if waits_for_failed and not retry:
                again += 1
            elif training is not None and training.state == "running" and training.job is None:
                held += 1  # by `sparseinst run`
            else:
                runs.append(status.run)
        elif status.state in NEEDS_RETRY:
            again += 1
        elif status.state in ("running", "queued"):
            held += 1
    return Selection(runs, held, again)


def arrange(runs: Sequence[StageRun], cluster: Cluster, limit: int) -> list[Array]:
    """The jobs for these stages, in arrays of at most `limit`."""
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
    arrays = []
    for part in _parts([Element((run,)) for run in trainings], limit):
        arrays.append(Array("train", part))
        keys = [element.runs[0].key for element in part]
        waiting = tuple(Element(tuple(by_training[key]), after=key) for key in keys if key in by_training)
        arrays += [Array("evaluate", waiting)] if waiting else []
    ready = [Element(tuple(found), after=key) for key, found in by_training.items() if key not in sent]
    arrays += [Array("evaluate", part) for part in _parts(ready, limit)]
    timings = [Element((run,)) for run in runs if run.stage == "latency"]
    return arrays + [Array("latency", part) for part in _parts(timings, limit)]


def _for_one_machine(runs: Sequence[StageRun], cluster: Cluster) -> list[Array]:
    """As many jobs as may run at once, each with its share: every training with its evaluations."""
    chains: dict[str, list[StageRun]] = {}
    for run in runs:
        chains.setdefault(run.needs or run.key, []).append(run)
    shares: list[list[StageRun]] = [[] for _ in range(min(cluster.parallelism, len(chains)))]
    for number, chain in enumerate(chains.values()):
        shares[number % len(shares)] += chain
    return [Array("train", tuple(Element(tuple(share)) for share in shares))] if shares else []


def _parts(elements: Sequence[Element], limit: int) -> list[tuple[Element, ...]]:
    return [tuple(elements[first : first + limit]) for first in range(0, len(elements), limit)]


def layout_warning(runs: Sequence[StageRun], cluster: Cluster) -> str | None:
    """Where trainings mean over other parts than the paper's 8 processes of 8 images; None where they do not."""
    for run in runs:
        train = run.config.train
        if run.stage != "train":
            continue
        parts = cluster.train.processes * (cluster.accumulate or train.accumulate)
        if train.batch_size % parts:
            raise UserError(f"{run.label}: train.batch_size={train.batch_size} cannot be shared by {parts} processes and parts")
        if run.config.loss.reduction == "per_process" and (parts, train.batch_size // parts) != (8, 8):
            return (
                f"{parts} parts of {train.batch_size // parts} images, the paper has 8 of 8: its loss means are per process, "
                "so results may differ a little; `accumulate` in the cluster's profile makes more parts, "
                "loss.reduction=global makes them not matter"
            )
    return None


def describe_arrays(arrays: Sequence[Array], cluster: Cluster) -> list[str]:
    """What is sent, for people, a line an array."""
    lines = []
    for array in arrays:
        resources, jobs = cluster.resources(array.stage), len(array.elements)
        gpus = f" with {resources.nodes * resources.gpus_per_node} GPUs" if resources.gpus_per_node else ""
        lines.append(
            f"{array.stage}: {jobs} {'job' if jobs == 1 else 'jobs'}, {min(jobs, cluster.parallelism)} at once, each of "
            f"{resources.nodes} x {resources.tasks_per_node} processes{gpus}, {resources.time} minutes at a time"
        )
    return lines
