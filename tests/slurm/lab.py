"""What the tests on a SLURM cluster share: how to send, watch, disturb and compare runs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparseinst.ablation.plan import Plan, StageRun, make_plan
from sparseinst.ablation.status import Status, plan_status
from sparseinst.ablation.store import Store
from sparseinst.ablation.study import read_profile, read_tables
from sparseinst.ablation.submission import read_submission
from sparseinst.ablation.work import run_folder
from sparseinst.attempts import latest
from sparseinst.cli import run_cli

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "slurm" / "local-cluster"

# A training of a minute or two in all, so that things can happen to it; a checkpoint a second.
SLOW = """
data: {source: shapes, root: runs/data/shapes, short_sides: [64], long_side: 64, train_limit: 64, val_limit: 4, workers: 1}
model:
  num_classes: 6
  width_factor: 0.125
  backbone: {name: test_resnet, pretrained: false, frozen_norm: false}
  decoder: {iam: {num_maps: 10}}
train: {iterations: STEPS, batch_size: 4, learning_rate: 1.0e-3, warmup_iterations: 1, checkpoint_every: 5, log_every: 1}
loss: {reduction: global}
inference: {size_factor: 0.1}
"""


def slurm(*command: str, check: bool = True) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=check, timeout=60).stdout.strip()


def wait_for(condition: Callable[[], Any], seconds: float, what: str, every: float = 0.3) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(every)
    logs = "\n".join(f"== {path}\n{path.read_text()[-1500:]}" for path in Path("runs/jobs").glob("*.err"))
    raise AssertionError(f"no {what} within {seconds:g} s\n{slurm('squeue')}\n{logs}")


def profile_file(name: str, text: str) -> str:
    path = Path(f"{name}.yaml")
    path.write_text(text)
    return str(path)


def slow(steps: int) -> str:
    return profile_file("slow", SLOW.replace("STEPS", str(steps)))


def tasks(count: int, nodes: int = 1, **more: Any) -> str:
    """A cluster profile of `count` processes a node."""
    train = {"nodes": nodes, "tasks_per_node": count, "cpus_per_task": 1, "time": more.pop("time", 10)}
    content = {"partition": "main", "train": train, "latency": {"cpus_per_task": 1, "time": 10}, "signal_delay": 5, **more}
    return profile_file(f"cluster-{count}-{nodes}", json.dumps(content))


def plan_of(*tables: str, profile: str = "smoke", row: str | None = None, results: str = "results") -> Plan:
    return make_plan(read_tables(tables), read_profile(profile), Store(Path(results)), row=row, device="cpu")


def launch(table: str, profile: str, cluster: str, *more: str) -> None:
    assert run_cli(["launch", table, "--profile", profile, "--cluster", cluster, *more]) == 0


def state_of(run: StageRun, plan: Plan) -> Status:
    return next(status for status in plan_status(plan) if status.run.key == run.key)


def training(plan: Plan) -> StageRun:
    return next(run for run in plan.runs.values() if run.stage == "train")


def job_of(run: StageRun) -> str:
    submission = read_submission(run_folder(run.key))
    assert submission is not None
    return submission.job


def steps_done(run: StageRun) -> int:
    metrics = run_folder(run.key).metrics
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def process_of(run: StageRun, rank: int) -> int:
    last = latest(run_folder(run.key))
    assert last is not None
    return int(last.beats[rank][1]["pid"])


def done(plan: Plan, results: str = "results") -> bool:
    return all(Store(Path(results)).has(key) for key in plan.runs)


class Undisturbed:
    """What `run` makes of the same rows, in a folder of its own; it begins at once and is waited for when it is asked."""

    def __init__(self, profile: str, *more: str) -> None:
        self.folder = Path("undisturbed")
        self.folder.mkdir()
        for name in ("experiments", profile):
            (self.folder / name).symlink_to(Path(name).resolve())
        command = [sys.executable, "-m", "sparseinst", "run", "table5", "--profile", profile, "--device", "cpu", *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def weights(self, run: StageRun) -> Path:
        assert self.process.wait(timeout=300) == 0
        return self.folder / "runs" / run.key / "model.safetensors"


def assert_same_bits(ours: Path, theirs: Path) -> None:
    one, other = load_file(ours), load_file(theirs)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def assert_close(ours: dict[str, float | None], theirs: dict[str, float | None]) -> None:
    assert {name for name, value in ours.items() if value is None} == {name for name, value in theirs.items() if value is None}
    assert {name: value or 0.0 for name, value in ours.items()} == pytest.approx(
        {name: value or 0.0 for name, value in theirs.items()}, rel=1e-3, abs=1e-3
    )
