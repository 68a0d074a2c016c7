"""Check runs that add seeds until the comparisons of a table are settled."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from sparseinst.ablation.looks import look_file, look_name, make_look, penalties, read_looks, write_look
from sparseinst.ablation.plan import make_plan
from sparseinst.ablation.sequential import (
    BOUNDARIES,
    LOOKS,
    PENALTIES,
    Decision,
    decide,
    next_seeds,
    predictive_power,
    reference_seeds,
)
from sparseinst.ablation.statistics import Comparison, Difference, SeedNoise, judge
from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.study import read_profile, read_tables, row_config
from sparseinst.attempts import Attempt
from sparseinst.cli import run_cli
from sparseinst.config import Config
from sparseinst.errors import UserError
from sparseinst.launch.settle import advance, look_states, plan_looks
from sparseinst.nested import merge
from sparseinst.paths import run_folder
from sparseinst.report.collect import read_results
from sparseinst.report.power import _detectable

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
TABLES = read_tables(["table5"], EXPERIMENTS)
MINI = read_profile("mini", EXPERIMENTS)
EFFECTS = {"BCE alone": (-20.0, 0.3), "dice alone": (-0.1, 6.0), "dice + focal": (-1.5, 0.8), "dice + BCE": (0.0, 0.5)}
"""The true difference and the deviation over seeds of each row."""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(EXPERIMENTS, tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)


def noise(value: float, deviation: float, seeds: int) -> Comparison:
    return Comparison(Difference(value, (SeedNoise(deviation**2, seeds, seeds),) * 2, 0.1), -1.0, 0.5)


def test_another_study_has_another_log() -> None:
    """Looks at results that other settings have replaced must not count."""
    longer = MINI.model_copy(update={"settings": merge(MINI.settings, {"train": {"iterations": 5000}}, Config)})
    wider = TABLES[0].model_copy(update={"spec": TABLES[0].spec.model_copy(update={"margin": 1.0})})
    assert len({look_name(TABLES[0], MINI), look_name(TABLES[0], longer), look_name(wider, MINI)}) == 3


def test_less_noise_never_lowers_the_chance() -> None:
    chances = []
    for deviation in (0.4, 0.3, 0.25, 0.2, 0.1):
        noise_of_rows = (SeedNoise(deviation**2, 4, 2), SeedNoise(deviation**2, 8, 4))
        chances.append(predictive_power(Comparison(Difference(0.02, noise_of_rows, 0.05), -1.0, 0.5), 3))
    assert chances == sorted(chances)
    assert chances[-1] == 1.0


def test_a_dry_run_logs_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    finish({"table5": {**dict.fromkeys(EFFECTS, 2), "dice + BCE": 4}}, store)
    assert advance(TABLES, TABLES, MINI, store, "cpu", log=False)
    assert read_looks(store.results, look_name(TABLES[0], MINI)) == []


def test_the_reference_row_has_more_seeds() -> None:
    assert [reference_seeds(look, 3) for look in range(6)] == [2, 4, 6, 7, 11, 12]
    assert reference_seeds(0, 1) == 2, "one seed tells nothing about the noise"
    assert reference_seeds(2, 19) == 12


def test_the_boundaries_are_crossed_by_chance_in_one_of_twenty_studies() -> None:
    """Without a difference, the standardised difference at the looks is a Brownian motion at the times seeds / 8."""
    times = np.array(LOOKS[1:]) / LOOKS[-1]  # the first look tests nothing
    correlation = np.sqrt(np.minimum.outer(times, times) / np.maximum.outer(times, times))
    random = np.random.default_rng(0)
    inside = stats.multivariate_normal.cdf(BOUNDARIES, cov=correlation, lower_limit=-np.array(BOUNDARIES), rng=random)
    assert inside == pytest.approx(0.95, abs=3e-4)
    assert np.array(BOUNDARIES) * times**0.35 == pytest.approx(BOUNDARIES[-1], abs=1e-3), "Wang and Tsiatis's, 0.15"


def test_decisions() -> None:
    compared = {"clear": noise(-20, 0.3, 6), "hopeless": noise(0.2, 6.0, 6), "open": noise(-1.2, 0.8, 6)}
    found = decide(compared, 4)
    assert (found["clear"].kind, found["clear"].verdict) == ("settled", "same sign, other size")
    assert found["hopeless"].kind == "futile"
    assert found["open"].kind == "more seeds"
    assert next_seeds(list(compared), found, 5, "reference") == {"open": 8, "reference": 12}
    last = decide({"open": noise(-0.7, 0.8, 8)}, 5)
    assert last["open"].kind == "out of looks"
    assert next_seeds(["clear"], {"clear": found["clear"]}, 5, "reference") == {}


def test_the_first_look_tests_nothing_even_if_rows_have_several_seeds() -> None:
    """The levels of the later looks leave nothing for it."""
    clear = noise(-20, 0.3, 4)
    assert (decide({"clear": clear}, 0)["clear"].kind, decide({"clear": clear}, 1)["clear"].kind) == ("more seeds", "settled")


@pytest.mark.parametrize("look", range(6))
def test_a_report_settles_nothing_that_the_look_left_open(look: int) -> None:
    """A weaker test of the same seeds after each look would find more false differences than the looks may."""
    compared = {str(value): noise(-value, 0.5, LOOKS[look] + 1) for value in np.linspace(0, 4, 41)}
    found = decide(compared, look)
    factors = penalties([make_look(look, {}, found)])
    reported = judge([replace(comparison, penalty=factors[name]) for name, comparison in compared.items()])
    left_open = [name for name, decision in found.items() if decision.kind == "more seeds"]
    verdicts = dict(zip(compared, reported, strict=True))
    assert left_open or look == 5
    assert [name for name in left_open if verdicts[name].verdict != "undecided"] == []


def test_the_reference_row_gets_no_more_seeds_than_its_last_look_asks_for() -> None:
    """With one comparison, these are 8, not 12."""
    noises = (SeedNoise(1.0, 8, 1), SeedNoise(1.0, 8, 2))
    one, many = (predictive_power(Comparison(Difference(-1.0, noises, 0.1), -1.0, 0.5), count) for count in (1, 3))
    assert one < many


def test_a_lost_look_is_an_error(tmp_path: Path) -> None:
    """Without it, the verdicts would count too few looks."""
    for number in range(3):
        write_look(tmp_path, "table", make_look(number, {}, {}))
    look_file(tmp_path, "table", 1).unlink()
    with pytest.raises(UserError, match=r"table-2\.json: .*restore it"):
        read_looks(tmp_path, "table")


def test_predictive_power_is_how_often_the_last_look_settles() -> None:
    """Compare it with a simulation of the last look, for a known deviation."""
    now = Comparison(Difference(-1.0, (SeedNoise(1.0, 1e6, 6),) * 2, 0.0), -1.0, 0.0)
    random = np.random.default_rng(0)
    truth = random.normal(-1.0, np.sqrt(2 / 6), 20000)
    further = random.normal(truth, np.sqrt(2 / 2))  # the mean of two more seeds of both rows
    last = (6 * -1.0 + 2 * further) / 8
    boundary = stats.norm.isf(0.05 / PENALTIES[-1] / 2)
    settled = np.mean(np.abs(last) > boundary * np.sqrt(2 / 8))
    assert predictive_power(now, 1) == pytest.approx(settled, abs=0.02)


def finish(wanted: dict[str, dict[str, int]], store: Store) -> int:
    """Write records for all runs of a look; return their number."""
    plan = plan_looks(TABLES, wanted, MINI, store, "cpu")
    for planned in plan.rows:
        config = row_config(planned.table.spec, planned.row, MINI, planned.seed)
        effect, deviation = EFFECTS[planned.row.name]
        random = np.random.default_rng([planned.seed, sorted(EFFECTS).index(planned.row.name)])
        ap = 40 + effect + random.normal(0, deviation)
        resampled = {"AP": list(ap + random.normal(0, 0.3, 50))}
        result = {"figures": {"AP": ap}, "images": 4, "resampled": resampled}
        store.write(Record("train", config.train_key(), {"steps": 1}))
        store.write(Record("evaluate", config.evaluate_key(), result, provenance={"data": "d"}))
    return len(plan.to_do())


def test_seeds_are_spent_until_the_table_is_finished(tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    seen = []
    while wanted := advance(TABLES, TABLES, MINI, store, "cpu"):
        assert wanted == advance(TABLES, TABLES, MINI, store, "cpu"), "an unfinished look stays the same"
        seen.append(wanted["table5"])
        finish(wanted, store)
    assert seen[0] == {"BCE alone": 1, "dice alone": 1, "dice + focal": 1, "dice + BCE": 2}
    assert 1 < len(seen) <= len(LOOKS)
    assert all("BCE alone" not in seeds or seeds["BCE alone"] < 8 for seeds in seen), "the clear row stops early"
    looks = read_looks(store.results, look_name(TABLES[0], MINI))
    assert [look.seeds for look in looks] == seen
    [state] = look_states(TABLES, MINI, store)
    lines = state.lines()
    assert lines[-1] == "  finished"
    assert any("BCE alone" in line and "settled: same sign" in line for line in lines)
    [result] = read_results(["table5"], "mini", store.results)
    settled = next(row for row in result.rows if row.row.name == "BCE alone")
    assert settled.verdict.startswith("same sign"), "the report says the same as the log"


def test_verdicts_pay_for_the_looks(tmp_path: Path) -> None:
    """The same records have a larger p-value once the log says that they were looked at."""
    store = Store(tmp_path / "results")
    finish({"table5": dict.fromkeys(EFFECTS, 4)}, store)

    def p_value() -> float:
        [result] = read_results(["table5"], "mini", store.results)
        judgement = result.rows[2].judgement
        assert judgement is not None
        return judgement.p_sign

    before = p_value()
    name = look_name(TABLES[0], MINI)
    write_look(store.results, name, make_look(0, {}, {"dice + focal": Decision("more seeds", "undecided", 0.5)}))
    write_look(store.results, name, make_look(1, {}, {"dice + focal": Decision("futile", "undecided", 0.1)}))
    assert p_value() == pytest.approx(min(1.0, before * PENALTIES[1]), rel=0.35)
    assert p_value() > before


def test_a_look_never_decides_about_a_row_that_was_evaluated_on_other_images(tmp_path: Path) -> None:
    """The look could not be changed when the evaluation is mended."""
    store = Store(tmp_path / "results")
    wanted = advance(TABLES, TABLES, MINI, store, "cpu")
    finish(wanted, store)
    spec = TABLES[0].spec
    key = row_config(spec, spec.rows[0], MINI, 0).evaluate_key()
    record = store.load(key)
    assert record is not None
    store.path(key).unlink()
    store.write(replace(record, provenance={"data": "other"}))
    with pytest.raises(UserError, match="'BCE alone' was evaluated on other images than the reference row 'dice \\+ BCE'"):
        advance(TABLES, TABLES, MINI, store, "cpu")
    assert read_looks(store.results, look_name(TABLES[0], MINI)) == []


def test_a_look_is_logged_once_and_never_changed(tmp_path: Path) -> None:
    first = write_look(tmp_path, "table5-mini", make_look(0, {"a": 2}, {"a": Decision("settled", "equivalent", 1.0)}))
    second = write_look(tmp_path, "table5-mini", make_look(0, {"a": 4}, {"a": Decision("futile", "undecided", 0.0)}))
    assert first == second == read_looks(tmp_path, "table5-mini")[0]
    file = look_file(tmp_path, "table5-mini", 0)
    whole = file.read_bytes()
    flipped = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(len(whole) - 1)]
    for damaged in (b"{}", b"[]", b"", *flipped):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="restore it"):
            read_looks(tmp_path, "table5-mini")


def test_a_table_without_a_reference_row_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["run", "table8", "--profile", "smoke", "--until-settled"]) == 2
    assert "table8: has no reference row with an AP" in capsys.readouterr().err
    assert run_cli(["run", "table5", "--profile", "smoke", "--until-settled", "--seeds", "3"]) == 2
    assert "allows no --seeds" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_runs_looks_and_a_budget_stops_it(capsys: pytest.CaptureFixture[str]) -> None:
    """At smoke scale nothing is trained, so every row stops after one look."""
    command = ["run", "table5", "--profile", "smoke", "--until-settled", "--jobs", "2", "--device", "cpu"]
    assert run_cli([*command, "--budget", "0.0000001"]) == 0
    assert "of the budget are left: stopped" in capsys.readouterr().out
    assert run_cli(command) == 0
    printed = capsys.readouterr().out
    assert "for the next look at table5: 11 runs" in printed
    assert "table5: 1 of at most 6 looks" in printed
    assert "finished" in printed
    plan = make_plan(TABLES, read_profile("smoke"), Store(), seeds=range(1), device="cpu")
    assert not plan.to_do()
    status = ["status", "table5", "--profile", "smoke", "--device", "cpu"]
    assert run_cli(status) == 0
    assert "finished" in capsys.readouterr().out
    assert run_cli([*status, "--json"]) == 0
    [looked] = json.loads(capsys.readouterr().out)["looks"]
    assert (looked["table"], looked["looks"], looked["next"]) == ("table5", 1, {})
    assert set(looked["rows"]) == set(EFFECTS) - {"dice + BCE"}
    assert {row["kind"] for row in looked["rows"].values()} == {"futile"}
    [file] = Path("results/looks").glob("*.json")
    file.write_text("{")
    assert run_cli([*status, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (len(printed["runs"]), printed["looks"]) == (9, None)
    assert "restore it" in printed["looks_error"]


def test_power(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without several seeds nothing is known. With them, a larger difference needs fewer seeds."""
    command = ["plan", "table5", "--profile", "mini", "--results", str(tmp_path / "results"), "--power", "--device", "cpu"]
    assert run_cli([*command, "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)["power"]
    assert [line["detectable"] for line in lines] == [None] * 3
    store = Store(tmp_path / "results")
    finish({"table5": dict.fromkeys(EFFECTS, 4)}, store)
    assert run_cli([*command, "--json", "--seeds", "4"]) == 0
    printed = json.loads(capsys.readouterr().out)
    lines = printed["power"]
    cost = {stage["stage"]: stage["cost_hours"] for stage in printed["stages"]}
    each = cost["train"] + cost["evaluate"]
    assert {"table", "row", "detectable", "seeds_for", "hours_for", "floor"} <= lines[0].keys()
    for line in lines:
        needed = [line["seeds_for"][size] for size in ("0.5", "1", "2")]
        known = [seeds for seeds in needed if seeds is not None]
        assert known == sorted(known, reverse=True)
        hours = line["hours_for"]
        for size, seeds in line["seeds_for"].items():
            assert hours[size] == (None if seeds is None else pytest.approx(2 * seeds * each, abs=1e-3))
        assert line["detectable"] > line["floor"] > 0
    assert run_cli(command) == 0
    assert "What 1 seed of each row can settle" in capsys.readouterr().out


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_a_detectable_difference_is_found_with_the_stated_power(seeds: int) -> None:
    """Two equally noisy rows have 2 (seeds - 1) degrees of freedom; the test exceeds its quantile in 80 % of cases."""
    level, degrees = 0.025, 2 * (seeds - 1)
    found = _detectable([1.0, 1.0], seeds, 0.0, level)
    noncentrality = found / np.sqrt(2 / seeds)
    assert stats.nct.sf(stats.t.isf(level, degrees), degrees, noncentrality) == pytest.approx(0.8, abs=1e-6)
    measured = Difference(0.0, (SeedNoise(1.0, seeds - 1, seeds),) * 2, 0.0)
    assert found == pytest.approx(measured.with_more_seeds(0).reach(level))


def test_a_look_names_the_seeds_that_records_hold(tmp_path: Path) -> None:
    """Somebody ran more seeds than the look asks for."""
    store = Store(tmp_path / "results")
    finish({"table5": dict.fromkeys(EFFECTS, 3)}, store)
    advance(TABLES, TABLES, MINI, store, "cpu")
    [first, *_] = read_looks(store.results, look_name(TABLES[0], MINI))
    assert set(first.seeds.values()) == {3}


def test_looks_of_another_design_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path / "results")
    old = write_look(store.results, "table5-mini-01234567", make_look(0, {}, {}))
    write_look(store.results, "table5-small-01234567", old)
    finish(advance(TABLES, TABLES, MINI, store, "cpu"), store)
    assert advance(TABLES, TABLES, MINI, store, "cpu")
    assert "looks/table5-mini-01234567-1.json) belong to other settings" in caplog.text
    caplog.clear()
    assert advance(TABLES, TABLES, MINI, store, "cpu")
    assert not caplog.text


def test_retry_reads_the_seeds_of_the_look(capsys: pytest.CaptureFixture[str]) -> None:
    """The reference row has a second seed, which `retry` without --until-settled does not know."""
    Path("slurm").symlink_to(EXPERIMENTS.parent / "slurm")
    plan = plan_looks(TABLES, advance(TABLES, TABLES, MINI, Store(), "cpu"), MINI, Store(), "cpu")
    [failed] = [run for run in plan.runs.values() if run.stage == "train" and run.label.endswith("dice + BCE seed 1")]
    with pytest.raises(RuntimeError), Attempt.begin(run_folder(failed.key)):
        raise RuntimeError("the card fell out")
    for run in plan.runs.values():
        if run.stage == "pretrain":
            Store().write(Record("pretrain", run.key, {"steps": 1}))
    command = ["retry", "table5", "--profile", "mini", "--cluster", "local", "--dry-run"]
    assert run_cli(command) == 0
    assert "would send 0" in capsys.readouterr().out
    assert run_cli([*command, "--until-settled"]) == 0
    assert "would send 2" in capsys.readouterr().out, "the training and its evaluation"
    assert read_looks(Store().results, look_name(TABLES[0], MINI)) == []
