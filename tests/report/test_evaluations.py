"""Check the data frame of all evaluations."""

from pathlib import Path

import pytest

import sparseinst
from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.study import read_profile, read_spec, row_config
from sparseinst.report.evaluations import COLUMNS
from tests.records import TABLE5, write_records

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_line_for_each_evaluation(tmp_path: Path) -> None:
    write_records(tmp_path, "mini")
    found = sparseinst.results("table5", "mini", tmp_path)
    assert list(found.columns) == list(COLUMNS)
    assert dict(zip(found["row"], found["AP"], strict=True)) == TABLE5
    assert set(found["seed"]) == {0}
    assert set(found["profile"]) == {"mini"}
    assert set(found["commit"]) == {"abcdef0123"}
    assert found["prefers_own"].tolist() == [50.0] * 4, "in percent, as in the report"
    assert found["lift"].isna().all()
    spec = read_spec("table5")
    config = row_config(spec, spec.rows[0], read_profile("mini"))
    first = found.iloc[0]
    assert (first["key"], first["train_key"]) == (config.evaluate_key(), config.train_key())
    everything = sparseinst.results(folder=tmp_path)
    assert set(everything["table"]) >= {"table2", "table5", "figure1"}
    assert everything["key"].nunique() < len(everything), "rows of several tables share an evaluation"


def test_seeds_and_trainings_that_are_no_evidence(tmp_path: Path) -> None:
    store, spec, mini = Store(tmp_path), read_spec("table5"), read_profile("mini")
    for seed, why in ((0, []), (2, ["the loss did not fall"])):
        config = row_config(spec, spec.rows[1], mini, seed)
        store.write(Record("train", config.train_key(), {"steps": 1, "not_trained": why}))
        about = {"commit": "0123456789abc", "changes": "ff", "profile": "mini"}
        store.write(Record("evaluate", config.evaluate_key(), {"figures": {"AP": 9.0 + seed}, "images": 4}, provenance=about))
    found = sparseinst.results(["table5"], folder=tmp_path)
    assert found["seed"].tolist() == [0, 2]
    assert found["AP"].tolist() == [9.0, 11.0]
    assert found["not_trained"].tolist() == ["", "the loss did not fall"]
    assert set(found["commit"]) == {"0123456789+ff"}


def test_no_records_and_unknown_profiles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert sparseinst.results(folder=tmp_path).empty
    assert list(sparseinst.results(folder=tmp_path).columns) == list(COLUMNS)
    about = {"profile": "mine"}
    Store(tmp_path).write(Record("evaluate", "k", {"figures": {"AP": 1.0}, "images": 1}, provenance=about))
    assert sparseinst.results(folder=tmp_path).empty
    assert "the profile mine are left out" in caplog.text
    with pytest.raises(sparseinst.UserError, match="table55"):
        sparseinst.results("table55", folder=tmp_path)


def test_the_committed_records() -> None:
    found = sparseinst.results("table5")
    assert len(found) == len(found.drop_duplicates(["row", "seed", "profile"]))
    assert found.groupby("row")["AP"].mean()["dice + BCE"] > 50
