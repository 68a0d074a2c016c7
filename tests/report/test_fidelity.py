"""Check the fidelity of a profile: how often it orders two rows as the paper does."""

import json
from pathlib import Path

import pytest
from scipy import stats

from sparseinst.ablation.statistics import Sample, TypicalNoise
from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.study import read_profile, read_tables, row_config
from sparseinst.cli import run_cli
from sparseinst.report import fidelity as module
from sparseinst.report.fidelity import Rank
from sparseinst.report.fidelity_views import draw

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def ranks(paper: list[float], measured: list[float]) -> list[Rank]:
    pairs = zip(paper, measured, strict=True)
    return [Rank(str(number), ("t",), ap, Sample((here,))) for number, (ap, here) in enumerate(pairs)]


def test_pairs_are_counted() -> None:
    rows = ranks([30.0, 31.0, 31.0, 31.3, 34.0], [10.0, 12.0, 11.0, 11.5, 9.0])
    every = module._agreement(rows, 0.0, None)
    # Nine pairs differ in the paper; the last row is wrong against all four, and 31.3 against the first 31.0.
    assert (every.pairs, every.agree) == (9, 4)
    assert every.tau == pytest.approx(stats.kendalltau([30, 31, 31, 31.3, 34], [10, 12, 11, 11.5, 9]).statistic)
    clear = module._agreement(rows, 0.5, None)
    assert (clear.pairs, clear.agree) == (7, 3)
    assert every.interval is None


def test_equal_and_reversed_orders() -> None:
    same = module._agreement(ranks([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]), 0.0, None)
    turned = module._agreement(ranks([1.0, 2.0, 3.0], [30.0, 20.0, 10.0]), 0.0, None)
    assert (same.share, same.tau, turned.share, turned.tau) == (1.0, 1.0, 0.0, -1.0)


def test_intervals_come_from_the_seeds() -> None:
    rows = ranks([1.0, 2.0, 3.0, 4.0], [10.0, 10.1, 10.2, 10.3])
    wide, narrow = (module._agreement(rows, 0.0, TypicalNoise(deviation**2, 3)) for deviation in (1.0, 0.001))
    assert wide.interval is not None
    assert narrow.interval == (1.0, 1.0)
    assert wide.interval[0] <= 0.5 < wide.interval[1]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Write records of Table 5 in the paper's order, except for one pair. Every training has an AP after step 1."""
    [table], profile, store = read_tables(["table5"], EXPERIMENTS), read_profile("smoke", EXPERIMENTS), Store(tmp_path)
    for number, row in enumerate(table.spec.rows):
        for seed in range(2):
            config = row_config(table.spec, row, profile, seed)
            ap = [1.0, 5.0, 4.5, 6.0][number] + 0.01 * seed
            history = [{"iteration": 1, "AP": 6.0 - number}]
            result = {"steps": 2, "seconds": 1.0, "losses": {}, "parameters": 1, "history": history}
            store.write(Record("train", config.train_key(), result))
            store.write(Record("evaluate", config.evaluate_key(), {"figures": {"AP": ap}, "images": 4}))
    return tmp_path


@pytest.mark.slow
def test_fidelity_comes_from_records(results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(EXPERIMENTS.parent)
    arguments = ["report", "table5", "--fidelity", "--profile", "smoke", "--results", str(results)]
    assert run_cli([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["pairs"], printed["agree"], printed["rows"], printed["missing"]) == (6, 5, 4, [])
    assert printed["agreement"] == pytest.approx(5 / 6, abs=1e-4)
    assert printed["tau"] == pytest.approx(2 / 3, abs=1e-4)
    assert printed["clear"]["pairs"] == 6
    assert printed["interval"] == [pytest.approx(5 / 6, abs=1e-4)] * 2, "seeds that hardly differ give no wider interval"
    assert printed["steps"]["1"]["agree"] == 0, "after step 1 the order was reversed"
    assert printed["tables"]["table5"]["agree"] == 5
    [wrong] = printed["disagreements"]
    assert (wrong["higher"], wrong["lower"], wrong["paper"]) == ("table5 dice + focal", "table5 dice alone", 0.5)
    assert run_cli(arguments) == 0
    assert "83 % (5 of 6)" in capsys.readouterr().out
    assert (results / "figures" / "fidelity-smoke.png").exists()


def test_a_row_of_several_tables_counts_once(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXPERIMENTS.parent)
    found = module.read_fidelity(["table4", "experiments/table5.yaml"], "smoke", results)
    assert len(found.ranks) == 4
    assert [rank.tables for rank in found.ranks if len(rank.tables) > 1] == [("table4", "table5")]
    assert "table4 softmax" in found.missing


def test_rows_that_are_not_trained_are_also_left_out(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The only pair in another order contains a row whose loss still falls."""
    monkeypatch.chdir(EXPERIMENTS.parent)
    command = ["report", "table5", "--profile", "smoke", "--results", str(results), "--fidelity"]
    [table], store = read_tables(["table5"], EXPERIMENTS), Store(results)
    assert run_cli([*command, "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert (before["pairs"], before["agree"], before["trained"]["pairs"], before["not_trained"]) == (6, 5, 6, {})
    row = next(row for row in table.spec.rows if row.name == "dice + focal")
    key = row_config(table.spec, row, read_profile("smoke", EXPERIMENTS), 0).train_key()
    record = store.load(key)
    assert record is not None
    (results / "records" / f"{key}.json").unlink()
    store.write(Record("train", key, {**record.result, "not_trained": ["the loss still falls"]}))
    assert run_cli([*command, "--json"]) == 0
    after = json.loads(capsys.readouterr().out)
    assert (after["pairs"], after["agree"], after["not_trained"]) == (
        6,
        5,
        {"table5 dice + focal": ["seed 0: the loss still falls"]},
    )
    assert (after["trained"]["pairs"], after["trained"]["agree"]) == (3, 3)
    assert run_cli(command) == 0
    printed = capsys.readouterr().out
    assert "all tables, trained rows" in printed
    assert "Not trained: table5 dice + focal (seed 0: the loss still falls)" in printed


def test_tables_that_cannot_be_compared_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXPERIMENTS.parent)
    assert run_cli(["report", "table1", "--fidelity", "--profile", "smoke"]) == 2
    assert "table1: its rows cannot be compared with those of other tables" in capsys.readouterr().err


def test_without_seeds_there_is_no_interval() -> None:
    found = module.fidelity([], None, {})
    assert (found.all.pairs, found.all.share, found.all.tau, found.all.interval) == (0, None, None, None)
    assert draw(found) is None
    assert module.fidelity([], TypicalNoise(1.0, 3), {}).clear.pairs == 0
