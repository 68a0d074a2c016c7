"""Provide made-up records, whose values are known, and the table that they make."""

from pathlib import Path

import numpy as np
import pytest

from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.study import Profile, Table, read_profile, read_spec, row_config
from sparseinst.report.collect import TableResult, collect, typical_noises

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
MINI = read_profile("mini", EXPERIMENTS)

MEASURED = {"BCE alone": (9.0, 10.0, 11.0), "dice alone": (29.6, 30.0), "dice + BCE": (30.0, 31.0, 32.0)}


def evaluation(key: str, ap: float, seed: int = 0) -> Record:
    """Return an evaluation whose AP has a standard error of 0.5 over images, the same resamplings for all."""
    metrics = {"AP": ap, "AP50": 2 * ap, "AP75": max(0.0, ap - 1), "APs": None, "APm": ap, "APl": None}
    random = np.random.default_rng(int(10 * ap))
    resampled = {name: list(value + random.normal(0, 0.5, 50)) for name, value in metrics.items() if value is not None}
    about = {"device": "A card", "seed": seed, "commit": "abcdef0123456", "versions": {"torch": "9.9"}, "data": "d1"}
    return Record("evaluate", key, {"figures": metrics, "images": 4, "resampled": resampled}, provenance=about)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Write records of Table 5: one row is missing, and the reference has three seeds."""
    store = Store(tmp_path / "results")
    spec = read_spec("table5", EXPERIMENTS)
    for row in spec.rows:
        for seed, ap in enumerate(MEASURED.get(row.name, ())):
            store.write(evaluation(row_config(spec, row, MINI, seed).evaluate_key(), ap, seed))
    return store


def table5(store: Store, states: dict[str, str] | None = None, profile: Profile = MINI) -> TableResult:
    table = Table(name="table5", spec=read_spec("table5", EXPERIMENTS))
    return collect(table, profile, store, states or {}, typical_noises([table], profile, store, store.keys()))
