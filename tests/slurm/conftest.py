"""Provide fixtures: a private SLURM cluster, and a project folder on it."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .lab import ROOT, SCRIPTS, StartUndisturbed, Undisturbed, slurm, wait_for


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    """Start a cluster and return its folder."""
    folder = Path(tempfile.mkdtemp(prefix="cluster-"))  # munge needs a folder that other users may enter; pytest's is private
    subprocess.run([SCRIPTS / "start.sh", folder, "2", "4"], check=True, timeout=60)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield folder
    subprocess.run([SCRIPTS / "stop.sh", folder], check=True, timeout=60)
    shutil.rmtree(folder)
    del os.environ["SLURM_CONF"]


@pytest.fixture
def project(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an empty project folder on a cluster whose nodes are idle and whose queue is empty."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    monkeypatch.chdir(tmp_path)
    slurm("scontrol", "update", "nodename=ALL", "state=resume", check=False)
    wait_for(lambda: slurm("sinfo", "--noheader", "--Node", "--format=%t").split() == ["idle"] * 2, 60, "idle nodes")
    yield tmp_path
    slurm("scancel", "--me")
    wait_for(lambda: not slurm("squeue", "--noheader"), 60, "an empty queue")


@pytest.fixture
def undisturbed(project: Path) -> Iterator[StartUndisturbed]:
    """Return a function that starts a reference run, which ends with the test."""
    runs: list[Undisturbed] = []

    def start(*arguments: str) -> Undisturbed:
        runs.append(Undisturbed(*arguments))
        return runs[-1]

    yield start
    for run in runs:
        run.end()
