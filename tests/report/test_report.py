"""Check tables and figures of made-up records, whose values are known."""

import io
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import pydantic_core
import pytest

from sparseinst import checked, overrides
from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.study import Table, read_profile, read_spec, read_tables, row_config
from sparseinst.report import escape, fidelity
from sparseinst.report.collect import collect, read_results, repeated_comparisons, typical_noises
from sparseinst.report.pages import write_report
from sparseinst.report.plots import differences
from sparseinst.report.records import Column, find_records, image_error
from sparseinst.report.style import _STYLE, save
from sparseinst.report.tables import FORMATS, _csv_texts, comparisons_json, frame, notes
from sparseinst.report.terminal import print_table
from tests.report.conftest import EXPERIMENTS, MEASURED, MINI, evaluation, table5


def test_cells_differences_and_verdicts(store: Store) -> None:
    data = frame(table5(store))
    assert list(data["AP"]) == ["10.0 ± 1.0 (3)", "29.8 ± 0.3 (2)", "pending", "31.0 ± 1.0 (3)"]
    assert list(data["paper: AP"]) == ["23.9", "31.0", "31.5", "32.0"]
    assert data["verdict"][0] == "same sign, other size"
    assert data["verdict"][1].startswith("undecided (+")
    assert list(data["verdict"])[2:] == ["", ""]
    assert list(data["in the paper"]) == ["-8.1", "-1.0", "-0.5", ""]
    assert data["difference in AP"][0].startswith("-21.0 [-2")
    assert data["APl"][0] == "-"
    assert list(data.columns).index("verdict") < list(data.columns).index("AP")


def test_a_row_that_is_not_trained_has_no_verdict_and_does_not_count(store: Store) -> None:
    spec = read_spec("table5", EXPERIMENTS)
    before = typical_noises([Table(name="table5", spec=spec)], MINI, store, store.keys())["AP"]
    for seed in range(3):
        config = row_config(spec, spec.rows[2], MINI, seed)
        store.write(evaluation(config.evaluate_key(), 0.1 * seed))
        result = {"steps": 1, "not_trained": ["the Dice loss ends at 99 % of its maximum"] if seed == 1 else []}
        store.write(Record("train", config.train_key(), result))
    found = table5(store)
    assert frame(found)["verdict"][2] == "not trained"
    assert found.rows[2].judgement is None
    assert "seed 1: the Dice loss ends at 99 % of its maximum" in found.rows[2].not_trained
    assert any("AP 0.0 is near zero" in note for note in notes(found))
    assert typical_noises([found.table], MINI, store, store.keys())["AP"] == before
    assert found.comparisons == 2


def test_evaluations_of_the_same_trainings_are_compared_on_the_seeds_of_both(store: Store) -> None:
    """The row's further seed is no difference: the reference row lacks it."""
    [table] = read_tables(["table6"], EXPERIMENTS)
    row = next(row for row in table.spec.rows if row.name == "CE without rescoring")
    reference = next(row for row in table.spec.rows if row.name == table.spec.reference)
    for chosen, values in ((row, (30.0, 30.0, 45.0)), (reference, (29.9, 29.9))):
        keys = [row_config(table.spec, chosen, MINI, seed).evaluate_key() for seed in range(3)]
        for key in keys:
            store.path(key).unlink(missing_ok=True)
        for seed, ap in enumerate(values):
            store.write(evaluation(keys[seed], ap, seed))
    result = collect(table, MINI, store, {}, {})
    [cell] = [found.cells[Column("AP")] for found in result.rows if found.row.name == row.name]
    assert cell.measured is not None
    assert cell.measured.mean == 35.0
    assert cell.difference is not None
    assert cell.difference.value == pytest.approx(0.1)
    assert [noise.seeds for noise in cell.difference.rows] == [2]
    assert not any("evaluates trainings of" in note for note in notes(result)), "the reference row has no further seed"


def test_a_row_with_fewer_seeds_of_the_same_trainings_says_what_it_is_compared_on(store: Store) -> None:
    """The difference of the two cells would compare seed 0 with the mean of all seeds."""
    [table] = read_tables(["table6"], EXPERIMENTS)
    reference = next(row for row in table.spec.rows if row.name == table.spec.reference)
    for seed, ap in enumerate((30.0, 40.0, 50.0)):
        config = row_config(table.spec, reference, MINI, seed)
        store.write(evaluation(config.evaluate_key(), ap, seed), again=True)
        store.write(Record("train", config.train_key(), {"steps": 1, "seconds": 1.0, "losses": {}, "parameters": 1}), again=True)
    key = row_config(table.spec, table.spec.rows[1], MINI, 0).evaluate_key()
    store.write(evaluation(key, 29.0, 0), again=True)
    result = collect(table, MINI, store, {}, {})
    [row] = [found for found in result.rows if found.compared_seeds is not None]
    assert (row.row.name, row.compared_seeds) == ("CE without rescoring", (0,))
    [note] = [note for note in notes(result) if "evaluates trainings of" in note]
    assert "compared on the same trainings (seed 0)" in note
    ranks, _ = fidelity._ranks([result], {training: {1: 2.0} for found in result.rows for training in found.trainings})
    [rank] = [rank for rank in ranks if rank.name == "table6 CE without rescoring"]
    assert rank.measured.values == pytest.approx((29.0, 39.0, 49.0)), "one below the reference row, as on seed 0"
    assert rank.history == {}, "the evaluations during the training were those of the reference row"
    assert all(rank.history for rank in ranks if rank.name == "table6 CE")


def test_a_metric_that_one_image_decides_has_no_interval(store: Store) -> None:
    """All resamplings with this image have one value, which shows nothing about the noise over images."""
    spec = read_spec("table5", EXPERIMENTS)
    for name, value in (("dice + BCE", 0.0), ("dice alone", 25.0)):
        row = next(row for row in spec.rows if row.name == name)
        key = row_config(spec, row, MINI, 0).evaluate_key()
        record = store.load(key)
        assert record is not None
        result = {**record.result, "resampled": {**record.result["resampled"], "APl": [value, None, value]}}
        store.write(replace(record, result=result), again=True)
    rows = {row.row.name: find_records(table5(store).table, row.row, MINI, store, {}, store.keys()) for row in table5(store).rows}
    assert image_error(rows["dice alone"], rows["dice + BCE"], "APl", [0]) is None
    assert image_error(rows["dice alone"], rows["dice + BCE"], "AP", [0]) is not None
    assert image_error(rows["dice alone"], rows["dice alone"], "AP", [0]) == 0.0, "the same evaluation differs by nothing"


def test_a_row_of_other_images_has_no_difference_and_says_so(store: Store) -> None:
    spec = read_spec("table5", EXPERIMENTS)
    key = row_config(spec, spec.rows[0], MINI, 0).evaluate_key()
    record = store.load(key)
    assert record is not None
    store.path(key).unlink()
    store.write(replace(record, provenance={**record.provenance, "data": "d2"}))
    found = table5(store)
    assert found.rows[0].cells[Column("AP")].difference is None
    assert any("'BCE alone' was evaluated on other images than 'dice + BCE'" in note for note in notes(found))


def test_other_tables_change_a_verdict_only_through_the_typical_noise(store: Store) -> None:
    """Without the seeds of another table, the difference and each row's own noise stay the same."""
    others = read_tables(["table5", "table3"], EXPERIMENTS)
    spec = others[1].spec
    for row in spec.rows:
        for seed in range(3):
            store.write(evaluation(row_config(spec, row, MINI, seed).evaluate_key(), 20.0 + seed * 4, seed))
    keys = store.keys()
    alone, together = (typical_noises(tables, MINI, store, keys) for tables in (others[:1], others))
    assert together["AP"].variance > alone["AP"].variance
    with_others = collect(others[0], MINI, store, {}, together, keys)
    shown = {row_config(others[0].spec, row, MINI, seed).evaluate_key() for row in others[0].spec.rows for seed in range(3)}
    fewer = keys & shown
    assert len(fewer) < len(keys)
    same_noise = collect(others[0], MINI, store, {}, together, fewer)
    assert [row.judgement for row in with_others.rows] == [row.judgement for row in same_noise.rows]


def test_the_order_of_the_tables_does_not_change_the_typical_noise(store: Store) -> None:
    """Two rows of Table 6 evaluate the trainings of the default, and one of them has a single seed."""
    tables = read_tables(["table5", "table6"], EXPERIMENTS)
    row = next(row for row in tables[1].spec.rows if row.name == "CE without rescoring")
    store.write(evaluation(row_config(tables[1].spec, row, MINI, 0).evaluate_key(), 20.0, 0))
    keys = store.keys()
    assert typical_noises(tables, MINI, store, keys) == typical_noises(tables[::-1], MINI, store, keys)


def test_every_comparison_is_listed_for_scripts(store: Store) -> None:
    lines = comparisons_json([table5(store)])
    assert [line["row"] for line in lines] == ["BCE alone", "dice alone"]
    assert len(lines[0].pop("evaluations")) == len(lines[0].pop("reference_evaluations")) == 3
    assert "device A card" in lines[0].pop("provenance")
    assert lines[0] | {"interval": 0, "p_sign": 0, "p_equivalence": 0} == {
        "table": "table5",
        "row": "BCE alone",
        "reference": "dice + BCE",
        "difference": -21.0,
        "interval": 0,
        "confidence": 0.975,
        "seeds_known": True,
        "one_seed": False,
        "paper": -8.1,
        "verdict": "same sign, other size",
        "p_sign": 0,
        "p_equivalence": 0,
        "more_seeds": None,
        "not_trained": [],
        "counts": True,
    }


def test_a_comparison_that_two_tables_show_counts_once(store: Store) -> None:
    one = table5(store)
    found = [one, replace(one, table=Table(name="other", spec=one.table.spec))]
    counts = [line["counts"] for line in comparisons_json(found)]
    assert counts == [True, True, False, False]
    assert repeated_comparisons(found[:1]) == set()


def test_other_images_are_no_comparison(tmp_path: Path) -> None:
    """The annotations can be the same while the images are not."""
    store, spec = Store(tmp_path / "results"), read_spec("table5", EXPERIMENTS)
    row = spec.rows[0]
    for seed, ap in enumerate(MEASURED[row.name]):
        found = evaluation(row_config(spec, row, MINI, seed).evaluate_key(), ap, seed)
        store.write(replace(found, provenance={**found.provenance, "images": "other"}))
        reference = evaluation(row_config(spec, spec.rows[-1], MINI, seed).evaluate_key(), 30.0 + seed, seed)
        store.write(replace(reference, provenance={**reference.provenance, "images": "these"}))
    assert table5(store).rows[0].cells[Column("AP")].difference is None


def test_a_printed_table_has_at_most_100_columns(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(table5(store))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "verdict" in printed
    assert "paper: APl" in printed.partition("Not shown")[2]


def test_a_narrow_terminal_shows_ap_and_prefers_own(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """They are the columns that the README announces. AP50 and the like go first."""
    print_table(table5(store))
    printed, _, left_out = capsys.readouterr().out.partition("Not shown")
    [head] = [line for line in printed.splitlines() if "Dice" in line]
    assert head.split()[-1] == "prefers_own"
    assert "AP" in head.split()
    named = left_out.partition(". The written table")[0]
    assert "AP75" in named
    assert "own," in named


def test_a_missing_value_shows_its_state(store: Store) -> None:
    spec = read_spec("table5", EXPERIMENTS)
    key = row_config(spec, spec.rows[2], MINI).evaluate_key()
    assert frame(table5(store, {key: "failed"}))["AP"][2] == "failed"


def test_every_format_contains_values_notes_and_provenance(store: Store) -> None:
    result = table5(store)
    for suffix, write in FORMATS.items():
        text = write(result)
        assert "31.0" in text, suffix
        if suffix != "csv":
            assert "A card" in text
            assert "abcdef0123" in text
            assert "our choice" in text
    latex = FORMATS["tex"](result)
    assert "\\toprule" in latex
    assert "31.0 $\\pm$ 1.0 (3)" in latex
    assert "95 \\%" in latex


def test_csv_latex_and_html_are_those_of_pandas(store: Store) -> None:
    """The formats are written without pandas, whose import takes a fifth of a second."""
    result = table5(store)
    data = frame(result)
    assert data.to_html(index=False) in FORMATS["html"](result).replace(' class="dataframe"', ' border="1" class="dataframe"')
    data.columns = data.columns.map(escape.tex)
    rows = data.map(escape.tex).style.hide(axis="index").to_latex(hrules=True)
    assert rows.partition("\\toprule")[2].partition("\\end{tabular}")[0] in FORMATS["tex"](result)
    text = FORMATS["csv"](result)
    read = pd.read_csv(io.StringIO(text), keep_default_na=False, na_values=[""]).astype({"more_seeds": "Int64"})
    assert read.to_csv(index=False, float_format="%.4f", lineterminator="\n") == text
    assert _csv_texts([1, None, 2]) == ["1", "", "2"]
    assert _csv_texts([1, 0.5, float("nan")]) == ["1.0000", "0.5000", ""]
    assert _csv_texts(["x", 0.5]) == ["x", "0.5"]


def test_devices_never_share_a_column(tmp_path: Path) -> None:
    store = Store(tmp_path)
    [table] = read_tables(["table8"], EXPERIMENTS)
    config = row_config(table.spec, table.spec.rows[0], MINI)
    for device, factor in (("Card A", 1.0), ("Card B", 2.0)):
        modules = dict.fromkeys(("backbone", "encoder", "decoder", "post"), factor)
        ranges = {key: [0.9 * factor, 1.1 * factor] for key in modules} if device == "Card B" else {}
        result = {"whole_ms": {"median": 4 * factor}, "modules_ms": modules, "modules_range_ms": ranges}
        store.write(Record("latency", config.latency_key(device), result, provenance={"device": device}))
    whole = {"whole_ms": {"median": 4.0}, "modules_ms": {"network": 3.0, "post": 1.0}}  # as for a compiled network
    store.write(Record("latency", config.latency_key("Card C"), whole, provenance={"device": "Card C"}))
    data = frame(collect(table, MINI, store, {}, {}))
    assert (data["backbone (Card A)"][0], data["backbone (Card B)"][0]) == ("1.00", "2.00 (1.80-2.20)")
    assert data["backbone (Card A)"][1] == "pending"
    assert (data["post (Card C)"][0], data["backbone (Card C)"][0]) == ("1.00", "-")


def test_protocols_of_quoted_rows_are_marked(tmp_path: Path) -> None:
    [table] = read_tables(["table1"], EXPERIMENTS)
    assert not (frame(collect(table, MINI, Store(tmp_path), {}, {}))["method"] == "CondInst").any(), "values of COCO stay apart"
    data = frame(collect(table, read_profile("coco", EXPERIMENTS), Store(tmp_path), {}, {}))
    row = data[data["method"] == "CondInst"].iloc[0]
    assert (row["FPS"], row["AP"]) == ("quoted 20.4 [published]", "quoted 35.4")


def test_a_missing_timing_is_not_done_in_the_csv(tmp_path: Path) -> None:
    [table] = read_tables(["table8"], EXPERIMENTS)
    data = pd.read_csv(io.StringIO(FORMATS["csv"](collect(table, MINI, Store(tmp_path), {}, {}))))
    assert set(data["state"]) == {"pending"}


def test_a_report_reads_each_record_and_each_spec_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of records are read at each report, and rows of several tables share them."""
    read: Counter[bytes] = Counter()
    parsed: Counter[str] = Counter()

    def from_json(content: bytes) -> Any:
        read[content] += 1
        return pydantic_core.from_json(content)

    def parse_yaml(text: str, where: str) -> Any:
        parsed[where] += 1
        return original(text, where)

    original = overrides.parse_yaml
    monkeypatch.setattr(checked, "from_json", from_json)
    monkeypatch.setattr(overrides, "parse_yaml", parse_yaml)
    overrides._parsed.cache_clear()
    results = read_results([], "mini", store.results)
    assert [result for result in results if any(row.evaluations for row in result.rows)]
    assert set(read.values()) == {1}
    assert len(read) == sum(map(len, MEASURED.values()))
    read_results([], "mini", store.results)
    assert set(parsed.values()) == {1}
    assert set(read.values()) == {2}, "a record that changed in between would be seen"


def test_a_report_without_new_records_imports_no_plots(store: Store) -> None:
    code = (
        "import sys; from sparseinst.cli import run_cli; "
        f"assert run_cli(['report', 'table5', '--profile', 'mini', '--results', {str(store.results)!r}]) == 0; "
        "assert not {'matplotlib.figure', 'pandas', 'scipy.stats'} & set(sys.modules)"
    )
    assert write_report(read_results(["table5"], "mini", store.results), store.results)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_figures_are_the_same_bytes_each_time(store: Store, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_report([table5(store)], tmp_path / folder)
    for name in ("table5-mini-differences.png", "table5-mini-differences.svg"):
        assert (tmp_path / "a" / "figures" / name).read_bytes() == (tmp_path / "b" / "figures" / name).read_bytes()


def test_a_saved_figure_is_laid_out_as_by_matplotlib(store: Store, tmp_path: Path) -> None:
    """The layout is computed without an extra drawing. The PNG is that of a plain call of `savefig`; the SVG has its layout."""
    figure = differences(table5(store))
    plain = differences(table5(store))
    assert figure is not None
    assert plain is not None
    save(figure, tmp_path / "saved")
    with mpl.rc_context(_STYLE):
        plain.savefig(tmp_path / "plain.png", dpi=150, metadata={"Software": None})
        layout = plain.get_layout_engine()
        plain.set_layout_engine(None)
        plain.savefig(tmp_path / "plain.svg", dpi=150, metadata={"Date": None})
        plain.set_layout_engine(layout)
    for name in ("png", "svg"):
        assert (tmp_path / f"saved.{name}").read_bytes() == (tmp_path / f"plain.{name}").read_bytes()
    assert (figure.dpi, type(figure.get_layout_engine())) == (plain.dpi, type(plain.get_layout_engine()))


@pytest.mark.slow
def test_a_crowded_plot_is_the_same_each_time(tmp_path: Path) -> None:
    """The plot moves overlapping names apart in a fixed number of steps."""
    [table] = read_tables(["figure1"], EXPERIMENTS)
    result = collect(table, read_profile("coco", EXPERIMENTS), Store(tmp_path), {}, {})
    for folder in ("a", "b"):
        write_report([result], tmp_path / folder)
    name = "figures/figure1-coco-speed-accuracy.svg"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_missing_timing_shows_its_state(tmp_path: Path) -> None:
    [table] = read_tables(["figure1"], EXPERIMENTS)
    store = Store(tmp_path)
    config = row_config(table.spec, table.spec.rows[0], MINI)
    store.write(evaluation(config.evaluate_key(), 30.0))
    result = collect(table, MINI, store, {config.latency_key("A card"): "failed"}, {})
    assert result.rows[0].missing == "timing failed"
    assert frame(result)["FPS"][0] == "failed"
    assert result.rows[1].missing == "pending, timing pending"


def test_rows_that_share_one_run_are_noted(tmp_path: Path) -> None:
    """Here one backbone replaces two of the paper's backbones, so two rows are one training."""
    [table] = read_tables(["table1"], EXPERIMENTS)
    same = {"name": "small_resnet"}
    profile = MINI.model_copy(update={"backbones": {"resnet50.tv_in1k": same, "resnet50d.ra2_in1k": same}})
    store = Store(tmp_path)
    store.write(evaluation(row_config(table.spec, table.spec.rows[0], profile).evaluate_key(), 30.0))
    assert "At mini scale 'R-50' and 'R-50-d' are one and the same run." in notes(collect(table, profile, store, {}, {}))
