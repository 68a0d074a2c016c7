"""Each notebook runs from top to bottom, on the committed records and the model `demo`, and gives the outputs that it holds."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_SECONDS = 120
VARIES = "varies"
"""The tag of cells whose outputs depend on the machine or on the commit."""
_NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that links to the project's files, but has its own runs."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("experiments", "results", "notebooks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_there_are_five_notebooks() -> None:
    names = {"tables", "speed_accuracy", "activation_maps", "ablation_walkthrough", "verdicts"}
    assert {path.stem for path in NOTEBOOKS} == names


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_run_gives_the_committed_outputs(path: Path, project: Path) -> None:
    """Words are equal, and numbers are within 2 %. Pictures are only counted."""
    committed, notebook = nbformat.read(path, 4), nbformat.read(path, 4)
    NotebookClient(notebook, timeout=MOST_SECONDS, resources={"metadata": {"path": str(project)}}).execute()
    for before, after in zip(committed.cells, notebook.cells, strict=True):
        if before.cell_type != "code":
            continue
        assert pictures(before) == pictures(after), f"{before.id}: make notebooks"
        if VARIES not in before.metadata.get("tags", []):
            expected, found = text(before), text(after)
            assert _NUMBER.sub("#", expected) == _NUMBER.sub("#", found), f"{before.id}: make notebooks"
            numbers = [[float(number) for number in _NUMBER.findall(shown)] for shown in (expected, found)]
            assert numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=0.05), f"{before.id}: make notebooks"
    CHECKS[path.stem]("\n".join(text(cell) for cell in notebook.cells))


def text(cell: Any) -> str:
    """Return all text that a cell shows, without the spaces by which columns are aligned."""
    shown = [output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in cell.get("outputs", [])]
    plain = re.sub(r"<[\w.]+[^<>]* at 0x[0-9a-f]+>|<PIL[^<>]*>", "", "\n".join(shown))
    return re.sub(r"[ \t]+", " ", plain)


def pictures(cell: Any) -> int:
    return sum(kind.startswith("image/") for output in cell.get("outputs", []) for kind in output.get("data", {}))


def check_tables(shown: str) -> None:
    assert "prefers_own" in shown


def check_speed_accuracy(shown: str) -> None:
    assert "35.5" in shown, "the paper's AP at size 448"


def check_activation_maps(shown: str) -> None:
    assert "prefers_own" in shown


def check_verdicts(shown: str) -> None:
    assert "deviation over seeds" in shown
    assert "detectable" in shown


def check_ablation_walkthrough(shown: str) -> None:
    for expected in ("did you mean 'model.decoder.iam.kernel_size'", "13 runs done", "verdict: not trained"):
        assert expected in shown


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}
