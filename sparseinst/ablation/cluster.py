"""Cluster profiles: where jobs run and what they may take. One YAML file each, in `slurm/`. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from sparseinst.config import PositiveInt
from sparseinst.errors import UserError
from sparseinst.overrides import nearest, one_line, read_layer
from sparseinst.section import Section

CLUSTERS = Path("slurm")


class Resources(Section):
    """What one job takes."""

    nodes: PositiveInt = 1
    tasks_per_node: PositiveInt = 1
    """Processes; one a GPU."""
    gpus_per_node: int = Field(default=0, ge=0)
    cpus_per_task: PositiveInt = 2
    memory_gb: PositiveInt | None = None
    """Of a node; None for the site's default."""
    time: PositiveInt = 60
    """Minutes; a job that needs more is put back into the queue and goes on."""

    @property
    def processes(self) -> int:
        return self.nodes * self.tasks_per_node


class Cluster(Section):
    """Where jobs run: a site's words for it."""

    kind: Literal["slurm", "local", "debug"] = "slurm"
    """`local`: processes of their own on this machine; `debug`: in this process."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    train: Resources = Resources()
    """Of trainings, and of the evaluations of their weights unless `evaluate` says otherwise."""
    evaluate: Resources | None = None
    latency: Resources = Resources(time=30)
    """Of timings: one process."""
    accumulate: PositiveInt | None = None
    """Parts that each process takes one after the other, in place of `train.accumulate`: one GPU with 8 does what 8 GPUs do."""
    parallelism: PositiveInt = 16
    """Jobs of an array that run at once."""
    array_size: PositiveInt | None = None
    """Most jobs of one array; None to ask the site's MaxArraySize."""
    signal_delay: PositiveInt = 120
    """Seconds before the time limit at which a job is told to end."""
    hang_seconds: PositiveInt = 1800
    """A process that does not move for so long ends its job, with that reason."""
    device: str | None = None
    """The GPU's name as its driver gives it ("NVIDIA H100 80GB HBM3"), by which timings are told apart; without
    GPUs the processor's, None for that of the machine that launches. A job on another device ends and says so."""
    setup: tuple[str, ...] = ()
    """Shell lines before the program starts: `module load cuda`, say."""
    environment: dict[str, str] = Field(default_factory=dict)
    container: tuple[str, ...] = ()
    """Options of srun that start a container, e.g. `--container-image=...` of pyxis."""
    extra: dict[str, str | int | bool] = Field(default_factory=dict)
    """Further options of sbatch, without their dashes."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.latency.processes != 1:
            raise ValueError("latency: a timing takes one process: nodes and tasks_per_node must be 1")
        with_gpus = {bool(resources.gpus_per_node) for resources in (self.train, self.evaluate or self.train, self.latency)}
        if len(with_gpus) > 1:
            raise ValueError("gpus_per_node: train, evaluate and latency need GPUs all of them, or none")
        if self.gpus and self.device is None:
            raise ValueError("device: name the GPU as nvidia-smi --query-gpu=name does: timings are kept apart by it")
        if self.kind != "slurm" and (self.setup or self.container or self.extra):
            raise ValueError(f"kind {self.kind} knows no setup, container or extra: they are SLURM's")
        shortest = min(self.train.time, self.latency.time, (self.evaluate or self.train).time)
        if self.signal_delay >= 60 * (shortest - 1):  # SLURM may send it up to a minute early
            left = f"signal_delay={self.signal_delay} s leaves nothing of a job of {shortest} minutes"
            raise ValueError(f"{left}: it would be told to end at its birth")
        return self

    @property
    def gpus(self) -> bool:
        """Whether jobs run on GPUs."""
        return self.train.gpus_per_node > 0

    def resources(self, stage: str) -> Resources:
        if stage == "latency":
            return self.latency
        return self.evaluate or self.train if stage == "evaluate" else self.train


def list_clusters(folder: Path = CLUSTERS) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.yaml"))


def read_cluster(name: str, folder: Path = CLUSTERS) -> Cluster:
    """A cluster profile by name (`local`) or of a file.

    Raises:
        UserError: no such profile, or a mistake in it: unknown keys are refused with the valid ones.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.exists():
        raise UserError(f"no such cluster: {name!r} ({path}){nearest(name, list_clusters(folder))}")
    data: dict[str, Any] = read_layer(path)
    try:
        return Cluster.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        valid = ""
        if first["type"] == "extra_forbidden":
            section: type[Section] = Resources if len(first["loc"]) > 1 else Cluster
            valid = f" (valid: {', '.join(section.model_fields)})"
        raise UserError(one_line(error, str(path), Cluster) + valid) from None
