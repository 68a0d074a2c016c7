"""Send, watch, disturb and compare runs on a SLURM cluster."""

import json
import os
import shutil
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
from sparseinst.ablation.store import Store
from sparseinst.ablation.study import read_profile, read_tables
from sparseinst.attempt_files import latest_attempt
from sparseinst.cli import run_cli
from sparseinst.launch.status import State, Status, plan_status
from sparseinst.launch.submission import read_submission
from sparseinst.machine import usable_cores
from sparseinst.paths import run_folder

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "slurm" / "local-cluster"

# A training of one or two minutes, so that tests can disturb it, with about one checkpoint per second.
SLOW = """
data:
  {source: shapes, root: runs/data/shapes, shapes: {train: 64, val: 4, side: 64}, short_sides: [64], long_side: 64, workers: 1}
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


def slowness() -> float:
    """Return by how much a limit must grow on this machine now: its load for each core, at least 1.

    The cluster's two nodes and a reference run keep two cores busy by themselves.
    """
    return max(1.0, os.getloadavg()[0] / usable_cores(), 2 / usable_cores())


def wait_for(condition: Callable[[], Any], seconds: float, what: str, every: float = 0.3) -> Any:
    """Wait until a condition holds. The limit in seconds is that of a machine that does nothing else; it grows with the load."""
    began = time.monotonic()
    while time.monotonic() - began < seconds * slowness():
        found = condition()
        if found:
            return found
        time.sleep(every)
    raise AssertionError(f"no {what} within {seconds:g} s\n{outputs()}")


def outputs() -> str:
    """Return SLURM's queue and the end of every job's output."""
    logs = "\n".join(f"== {path}\n{path.read_text()[-1500:]}" for path in Path("runs/jobs").glob("*.err"))
    return f"{slurm('squeue')}\n{logs}"


def profile_file(name: str, text: str) -> str:
    path = Path(f"{name}.yaml")
    path.write_text(text)
    return str(path)


def slow_profile(steps: int) -> str:
    return profile_file("slow", SLOW.replace("STEPS", str(steps)))


def cluster_profile(count: int, nodes: int = 1, **more: Any) -> str:
    """Write a cluster profile with `count` processes per node, and return its path."""
    train = {"nodes": nodes, "tasks_per_node": count, "cpus_per_task": 1, "time": more.pop("time", 10)}
    content = {"partition": "main", "train": train, "latency": {"cpus_per_task": 1, "time": 10}, "signal_delay": 5, **more}
    return profile_file(f"cluster-{count}-{nodes}", json.dumps(content))


def plan_of(*tables: str, profile: str = "smoke", row: str | None = None, results: str = "results") -> Plan:
    return make_plan(read_tables(tables), read_profile(profile), Store(Path(results)), row=row, device="cpu")


def launch(table: str, profile: str, cluster: str, *more: str) -> None:
    assert run_cli(["launch", table, "--profile", profile, "--cluster", cluster, *more]) == 0


def state_of(run: StageRun, plan: Plan) -> Status:
    return next(status for status in plan_status(plan) if status.run.key == run.key)


def wait_for_state(run: StageRun, plan: Plan, state: State, seconds: float, attempts: int | None = None) -> None:
    """Wait until a stage is in a state, and in its `attempts`-th attempt if that is given. The limit is as in `wait_for`."""
    began = time.monotonic()
    while (status := state_of(run, plan)).state != state or attempts not in (None, status.attempts):
        assert time.monotonic() - began < seconds * slowness(), f"{status} is not {state} within {seconds:g} s\n{outputs()}"
        time.sleep(0.3)


def training(plan: Plan) -> StageRun:
    return next(run for run in plan.runs.values() if run.stage == "train")


def job_of(run: StageRun) -> str:
    submission = read_submission(run_folder(run.key))
    assert submission is not None
    return submission.job


def job_output(run: StageRun) -> str:
    """Return what a run's job has printed."""
    return "".join(path.read_text() for path in sorted(Path("runs/jobs").glob(f"{job_of(run)}_0_log.*")))


def steps_done(run: StageRun) -> int:
    metrics = run_folder(run.key).metrics
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def process_of(run: StageRun, rank: int) -> int:
    last = latest_attempt(run_folder(run.key))
    assert last is not None
    return last.beats[rank][1].pid


def address_of(run: StageRun) -> str:
    """Return the host:port at which the ranks of a run's newest attempt meet."""
    last = latest_attempt(run_folder(run.key))
    assert last is not None
    assert last.start.address is not None
    return last.start.address


def done(plan: Plan, results: str = "results") -> bool:
    return all(Store(Path(results)).has(key) for key in plan.runs)


class Undisturbed:
    """A reference run: `run` does the same rows in another folder. It starts at once, and `weights` waits for its end."""

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

    def end(self) -> None:
        """End the run if it still works, as after a failed test."""
        self.process.kill()
        self.process.wait()

    def weights(self, run: StageRun) -> Path:
        assert self.process.wait(timeout=300 * slowness()) == 0
        return self.folder / "runs" / run.key / "model.safetensors"


StartUndisturbed = Callable[..., Undisturbed]


def slow_scontrol(folder: Path) -> str:
    """Write a `scontrol` that ends a second after SLURM has done what it asks, and return a PATH that finds it first.

    It is a bash script, since dash unblocks all signals.
    """
    script = folder / "scontrol"
    script.write_text(f'#!/bin/bash\n{shutil.which("scontrol")} "$@"\ncode=$?\nsleep 1\nexit $code\n')
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def assert_same_bits(ours: Path, theirs: Path) -> None:
    one, other = load_file(ours), load_file(theirs)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def assert_close(ours: dict[str, float | None], theirs: dict[str, float | None]) -> None:
    assert {name for name, value in ours.items() if value is None} == {name for name, value in theirs.items() if value is None}
    assert {name: value or 0.0 for name, value in ours.items()} == pytest.approx(
        {name: value or 0.0 for name, value in theirs.items()}, rel=1e-3, abs=1e-3
    )
