"""Check the files of a report: which are written, when, and what the index shows."""

from dataclasses import replace

from sparseinst.ablation.store import Store
from sparseinst.ablation.study import read_spec, row_config
from sparseinst.report.pages import write_report
from tests.report.conftest import EXPERIMENTS, MINI, evaluation, table5


def test_an_unchanged_report_is_not_written_again(store: Store) -> None:
    results = [table5(store)]
    assert write_report(results, store.results)
    files = {path: path.read_bytes() for path in store.results.rglob("*") if path.is_file()}
    assert write_report(results, store.results) == []
    assert {path: path.read_bytes() for path in store.results.rglob("*") if path.is_file()} == files
    index = (store.results / "README.md").read_text()
    assert "figures/table5-mini-differences.png" in index
    for link in ("tables/table5-mini.csv", "figures/table5-mini-differences.png"):
        assert (store.results / link).exists()


def test_a_figure_that_is_lost_or_older_than_its_table_is_drawn_again(store: Store) -> None:
    """A stop between the two files, or a deleted picture, must not leave an old plot beside a new table."""
    figure = store.results / "figures" / "table5-mini-differences.svg"
    write_report([table5(store)], store.results)
    before = figure.read_bytes()
    spec = read_spec("table5", EXPERIMENTS)
    store.write(evaluation(row_config(spec, spec.rows[0], MINI, 3).evaluate_key(), 12.0, 3))
    write_report([table5(store)], store.results)
    after = figure.read_bytes()
    figure.write_bytes(before)
    figure.with_suffix(".png").unlink()
    assert set(write_report([table5(store)], store.results)) >= {figure, figure.with_suffix(".png")}
    assert figure.read_bytes() == after != before
    renamed = table5(store)
    renamed = replace(
        renamed, table=renamed.table.model_copy(update={"spec": renamed.table.spec.model_copy(update={"title": "B"})})
    )
    assert figure in write_report([renamed], store.results), "the title is drawn, too"
    for record in store.folder.iterdir():
        record.unlink()
    write_report([table5(store)], store.results)
    assert not figure.exists(), "nothing is measured any more"
    assert "differences.png" not in (store.results / "README.md").read_text()


def test_the_index_shows_each_figure_at_its_own_table(store: Store) -> None:
    """One profile's name may begin with another one's."""
    longer = MINI.model_copy(update={"name": "mini-doubled"})
    write_report([table5(store), table5(store, profile=longer)], store.results)
    index = (store.results / "README.md").read_text()
    assert index.count("figures/table5-mini-doubled-differences.png") == 1


def test_a_damaged_table_is_written_again_or_shown(store: Store) -> None:
    results, folder = [table5(store)], store.folder.parent
    write_report(results, folder)
    own, other = (folder / "tables" / f"{name}.md" for name in (results[0].name, "another"))
    own.write_bytes(b"\xff")
    other.write_bytes(b"# caf\xe9\n")
    write_report(results, folder)
    assert own.read_text().startswith("# ")
    assert "## caf\ufffd\n" in (folder / "README.md").read_text()
