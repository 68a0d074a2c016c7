"""The folder and the plans of the tests that send runs."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparseinst.ablation.plan import Plan, make_plan
from sparseinst.ablation.store import Store
from sparseinst.ablation.study import read_profile, read_tables

ROOT = Path(__file__).parents[2]
EXPERIMENTS, CLUSTERS = ROOT / "experiments", ROOT / "slurm"


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give a test an empty working folder with the project's experiments and clusters."""
    (tmp_path / "experiments").symlink_to(EXPERIMENTS)
    (tmp_path / "slurm").symlink_to(CLUSTERS)
    monkeypatch.chdir(tmp_path)
    yield
    os.chdir(ROOT)


def planned(*tables: str, profile: str = "smoke", row: str | None = None) -> Plan:
    return make_plan(read_tables(tables, EXPERIMENTS), read_profile(profile, EXPERIMENTS), Store(), row=row, device="cpu")
