"""Each notebook runs from top to bottom, on the committed records and the model `demo`, and is committed without output."""

import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_SECONDS = 120


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that links to the project's files, but has its own runs."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("experiments", "results", "notebooks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_there_are_four_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"tables", "speed_accuracy", "activation_maps", "ablation_walkthrough"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_output(path: Path) -> None:
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_from_top_to_bottom(path: Path, project: Path) -> None:
    notebook = nbformat.read(path, 4)
    began = time.perf_counter()
    NotebookClient(notebook, timeout=MOST_SECONDS, resources={"metadata": {"path": str(project)}}).execute()
    assert time.perf_counter() - began < MOST_SECONDS
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr" or "Traceback" not in output["text"]
    CHECKS[path.stem](texts(notebook))


def texts(notebook: Any) -> str:
    """Return all text that a notebook shows."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in outputs) + str(
        [kind for output in outputs for kind in output.get("data", {})]
    )


def check_tables(shown: str) -> None:
    for text in ("| 32.0", "prefers_own"):
        assert text in shown


def check_speed_accuracy(shown: str) -> None:
    assert shown.count("image/png") == 2
    assert "| 35.5" in shown, "the paper's AP at size 448"


def check_activation_maps(shown: str) -> None:
    assert shown.count("image/png") >= 4, "an overlay, three sheets of maps and the mean maps"
    assert "prefers_own" in shown


def check_ablation_walkthrough(shown: str) -> None:
    for text in ("did you mean 'model.decoder.iam.kernel_size'", "13 runs done", "verdict: cannot be told", "verdict: None"):
        assert text in shown


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}
