"""Cluster profiles say where jobs run and which resources they use: one YAML file each, in `slurm/`. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from sparseinst.config import PositiveInt
from sparseinst.errors import UserError
from sparseinst.nested import nearest, one_line
from sparseinst.overrides import read_layer
from sparseinst.section import Section

CLUSTERS = Path("slurm")


class Resources(Section):
    """The resources of one job."""

    nodes: PositiveInt = 1
    tasks_per_node: PositiveInt = 1
    """Processes on each node; use one for each GPU."""
    gpus_per_node: int = Field(default=0, ge=0)
    cpus_per_task: PositiveInt = 2
    memory_gb: PositiveInt | None = None
    """Memory of each node; None for the site's default."""
    time: PositiveInt = 60
    """Time limit in minutes. A job that needs longer is requeued and continues."""

    @property
    def processes(self) -> int:
        return self.nodes * self.tasks_per_node


class Cluster(Section):
    """Where jobs run, and the options that a site requires."""

    kind: Literal["slurm", "local", "debug"] = "slurm"
    """`local`: separate processes on this machine; `debug`: this process."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    train: Resources = Resources()
    """Resources of a pretraining or training, and of an evaluation if `evaluate` is None."""
    evaluate: Resources | None = None
    latency: Resources = Resources(time=30)
    """Resources of a timing, which runs in one process."""
    parts: PositiveInt | None = None
    """Parts into which each batch of a training is split; each process computes an equal share of them in turn. One GPU with 8
    parts computes what 8 GPUs do. None: processes x `train.accumulate`."""
    parallelism: PositiveInt = 16
    """The most jobs of one array that run at the same time."""
    array_size: PositiveInt | None = None
    """The most jobs in one array; None for the site's MaxArraySize."""
    signal_delay: PositiveInt = 120
    """The scheduler signals a job to stop this many seconds before its time limit."""
    hang_seconds: PositiveInt = 1800
    """A job ends with an error if one of its processes makes no progress for this many seconds."""
    device: str | None = None
    """The GPU's name as the driver reports it ("NVIDIA H100 80GB HBM3"). Without GPUs it is the processor's name; None then means
    the processor of the machine that launches. The keys of timings contain it. A job on another device stops with an error."""
    setup: tuple[str, ...] = ()
    """Shell lines that run before Python starts, such as `module load cuda`."""
    environment: dict[str, str] = Field(default_factory=dict)
    container: tuple[str, ...] = ()
    """Options for srun that start a container, such as `--container-image=...` for pyxis."""
    extra: dict[str, str | int | bool] = Field(default_factory=dict)
    """More options for sbatch, without the leading dashes."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.latency.processes != 1:
            raise ValueError("latency: a timing takes one process, so nodes and tasks_per_node must be 1")
        with_gpus = {bool(resources.gpus_per_node) for resources in (self.train, self.evaluate or self.train, self.latency)}
        if len(with_gpus) > 1:
            raise ValueError("gpus_per_node: either all of train, evaluate and latency use GPUs, or none of them")
        if self.gpus and self.device is None:
            raise ValueError(
                "device: give the GPU's name as nvidia-smi --query-gpu=name prints it; the keys of timings contain it"
            )
        if self.kind != "slurm" and (self.setup or self.container or self.extra):
            raise ValueError(f"kind {self.kind} does not support setup, container or extra; only kind slurm does")
        texts = {"partition": self.partition, "account": self.account, "qos": self.qos, "constraint": self.constraint}
        for name, value in {**texts, **self.extra}.items():
            if isinstance(value, str) and not value.isprintable():  # a line break would add a line to the batch script
                raise ValueError(f"{name}: {value!r} holds a character that cannot be printed, such as a line break")
        shortest = min(self.train.time, self.latency.time, (self.evaluate or self.train).time)
        if self.signal_delay >= 60 * (shortest - 1):  # SLURM may send the signal up to a minute early
            too_long = f"signal_delay={self.signal_delay} s is too long for jobs of {shortest} minutes"
            raise ValueError(f"{too_long}: such a job would be signalled as soon as it starts")
        return self

    @property
    def gpus(self) -> bool:
        """Whether jobs run on GPUs."""
        return self.train.gpus_per_node > 0

    def resources(self, stage: str) -> Resources:
        """Return the resources of a job that does this stage."""
        if stage == "latency":
            return self.latency
        return self.evaluate or self.train if stage == "evaluate" else self.train


def list_clusters(folder: Path = CLUSTERS) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.yaml"))


def read_cluster(name: str, folder: Path = CLUSTERS) -> Cluster:
    """Return the cluster profile of a name (`local`) or of a YAML file.

    Raises:
        UserError: there is no such profile, or it contains a mistake. For an unknown key the message lists the valid ones.
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
