"""Specs are shared, so their names and labels must not leave their folder, break a format or run as code."""

import re
from pathlib import Path

import pytest

from sparseinst.ablation.store import Store
from sparseinst.ablation.study import CSV_COLUMNS, read_profile, read_spec, read_tables
from sparseinst.cli import run_cli
from sparseinst.errors import UserError
from sparseinst.launch.cluster import read_cluster
from sparseinst.report import escape
from sparseinst.report.collect import collect
from sparseinst.report.pages import write_report
from sparseinst.report.tables import FORMATS
from tests.report.conftest import evaluation, row_config

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
EVIL = r"[/red] $\frac$ {x} <script>alert(1)</script> =1+1 \input | `code` & 50% _a_ #"


def spec(**changes: str) -> str:
    """Return a table whose second row has an evil name and label."""
    values = {"title": EVIL, "name": EVIL.replace("/", ":").replace("\\", ":"), "label": f"=cmd {EVIL}", **changes}
    quoted = {key: "'" + value.replace("'", "''") + "'" for key, value in values.items()}
    return (
        f"title: {quoted['title']}\ncolumns: [what]\nfigures: [AP]\nreference: plain\nrows:\n"
        "  - {name: plain, labels: {what: plain}, paper: {AP: 30}}\n"
        f"  - name: {quoted['name']}\n    labels: {{what: {quoted['label']}}}\n    paper: {{AP: 29}}\n"
        "    set: {model.decoder.depth: 2}\n"
    )


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiments").symlink_to(EXPERIMENTS)
    monkeypatch.chdir(tmp_path)


def test_every_form_shows_evil_text_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "evil.yaml"
    file.write_text(spec())
    for command in ("plan", "status"):
        assert run_cli([command, str(file), "--profile", "mini", "--device", "cpu"]) == 0
    assert run_cli(["report", str(file), "--profile", "mini", "--show", "--html"]) == 0
    assert "[/red]" in capsys.readouterr().out.replace("[:red]", "[/red]")
    store, profile, [table] = Store(tmp_path / "results"), read_profile("mini"), read_tables([str(file)])
    for number, row in enumerate(table.spec.rows):
        for seed in range(2):
            key = row_config(table.spec, row, profile, seed).evaluate_key()
            store.write(evaluation(key, 30.0 + 3 * number + seed, seed))
    result = collect(table, profile, store, {}, {})
    write_report([result], store.results, page=[result])  # draws the plots, too
    tables = store.results / "tables"
    for file in (tables / "evil-mini.md", tables / "evil-mini.html", store.results / "mini.html"):
        assert "<script>alert" not in file.read_text(), file
    assert re.search(r"(^|,)=", (tables / "evil-mini.csv").read_text(), re.M) is None
    latex = (tables / "evil-mini.tex").read_text()
    assert "\\input" not in latex
    assert "\\{x\\}" in latex


@pytest.mark.parametrize("name", ["../../x", "a/b", ".hidden", "", "two\nlines", "x" * 101, "bell\a"])
def test_a_row_cannot_leave_its_folder(name: str, tmp_path: Path) -> None:
    file = tmp_path / "evil.yaml"
    file.write_text(spec().replace("name: plain", "name: " + repr(name).replace("'", '"')).replace("reference: plain\n", ""))
    with pytest.raises(UserError, match="row|rows") as raised:
        read_spec(str(file))
    assert len(str(raised.value).splitlines()) == 1


def test_a_line_break_in_a_slurm_setting_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "evil.yaml"
    file.write_text('partition: "x\\n#SBATCH --uid=0"\ntrain: {cpus_per_task: 1}\n')
    with pytest.raises(UserError, match="partition"):
        read_cluster(str(file))


@pytest.mark.parametrize(
    ("text", "expected"), [("=1", "'=1"), ("-", "-"), ("-8.1", "-8.1"), ("@x", "'@x"), ("1x1", "1x1"), ("+5", "+5")]
)
def test_formulas_are_quoted_and_numbers_are_not(text: str, expected: str) -> None:
    assert escape.csv(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("![x](http://a)", "![x\\](http://a)"),
        ("[x][y] [x]: z", "[x\\][y] [x\\]: z"),
        ("*a* **b**", "\\*a\\* \\*\\*b\\*\\*"),
        ("_a_ __b__", "\\_a\\_ \\_\\_b\\_\\_"),
        ("a \\| b\\", "a \\\\\\| b\\\\"),
        ("small_resnet [-1.0, +2.0] 3x3!", "small_resnet [-1.0, +2.0] 3x3!"),
    ],
)
def test_links_pictures_and_emphasis_are_shown_as_text_in_markdown(text: str, expected: str) -> None:
    assert escape.markdown(text) == expected


def test_headers_and_all_texts_of_a_csv_file_are_quoted(tmp_path: Path) -> None:
    file = tmp_path / "=t.yaml"
    file.write_text(spec().replace("columns: [what]", "columns: ['@what']").replace("{what:", "{'@what':"))
    [table], profile = read_tables([str(file)]), read_profile("mini")
    header, *lines = FORMATS["csv"](collect(table, profile, Store(tmp_path / "results"), {}, {})).splitlines()
    assert header.split(",") == [*CSV_COLUMNS[:3], "'@what", *CSV_COLUMNS[3:]]
    assert all(line.startswith("'=t,") for line in lines)


@pytest.mark.parametrize("column", ["row", "measured", "p_sign"])
def test_a_label_cannot_replace_a_column_of_the_csv_file(column: str, tmp_path: Path) -> None:
    file = tmp_path / "evil.yaml"
    file.write_text(spec().replace("columns: [what]", f"columns: [what, {column}]"))
    with pytest.raises(UserError, match=f"columns: '{column}' is a column of every CSV file"):
        read_spec(str(file))
    file.write_text(spec().replace("columns: [what]", "columns: [what, what]"))
    with pytest.raises(UserError, match="two columns are called 'what'"):
        read_spec(str(file))


@pytest.mark.parametrize("name", ["a}\\input{x%", "a%b", "a#b", "a](x"])
def test_names_of_files_that_would_act_in_a_report_are_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.yaml"
    file.write_text(spec())
    with pytest.raises(UserError, match="would act in LaTeX or Markdown: rename the file") as raised:
        read_tables([str(file)])
    assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(UserError, match="would act in LaTeX or Markdown"):
        read_profile(str(file))


def test_a_protocol_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "evil.yaml"
    protocol = 'protocols: {p: {device: "a\\n# b", description: x, source: y}}\n'
    file.write_text(spec() + protocol)
    with pytest.raises(UserError, match=r"protocols.p.device: .*cannot be printed, such as a line break"):
        read_spec(str(file))
