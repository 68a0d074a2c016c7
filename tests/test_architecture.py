"""Imports point one way, and the command line starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sparseinst"

ALLOWED = {
    "errors": set(),
    "paths": set(),
    "attempts": {"errors", "paths"},
    "section": set(),
    "config": {"overrides", "section"},  # inside `Config.replace` alone
    "overrides": {"config", "section", "errors"},
    "models": {"config", "overrides", "errors"},
    "data": {"config", "overrides", "errors", "paths"},
    "matcher": {"config", "models"},
    "criterion": {"config", "matcher", "models"},
    "paste": set(),
    "postprocess": {"config", "models", "paste"},
    "integrations": {"config", "overrides", "models", "errors", "data", "criterion", "postprocess", "engine"},
    "ablation": {"section", "config", "overrides", "errors", "paths", "attempts", "data", "engine"},
    "report": {"config", "overrides", "errors", "paths", "ablation"},
    "engine": {
        "config",
        "overrides",
        "errors",
        "paths",
        "attempts",
        "models",
        "data",
        "matcher",
        "criterion",
        "postprocess",
        "paste",
    },
}
"""What each room of the package may import from; `cli` may import all."""

WITHOUT_TORCH = [
    "errors",
    "paths",
    "attempts",
    "section",
    "config",
    "overrides",
    "cli",
    "data.coco",
    "data.transforms",
    "data.scenes",
    "data.shapes",
    "data.collage",
    "data.check",
    "ablation.study",
    "ablation.plan",
    "ablation.store",
    "ablation.run",
    "ablation.work",
    "ablation.compare",
    "ablation.status",
    "ablation.statistics",
    "ablation.arrange",
    "ablation.cluster",
    "ablation.job",
    "ablation.launch",
    "ablation.submission",
    "ablation.provenance",
    "report.collect",
    "report.tables",
    "report.plots",
    "report.pages",
    "report.curves",
    "report.style",
    "report.terminal",
    "report.webpage",
]


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sparseinst":
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("sparseinst.")}
    return {name.split(".")[1] for name in names if "." in name}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room: str) -> None:
    files = sorted((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
    for file in files:
        foreign = imported_rooms(file) - ALLOWED[room] - {room}
        assert not foreign, f"{file.name} imports {sorted(foreign)}"


def test_every_room_is_listed() -> None:
    rooms = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__", "cli"} == set(ALLOWED)


def test_nothing_light_imports_torch() -> None:
    modules = ", ".join(f"sparseinst.{name}" for name in WITHOUT_TORCH)
    code = f"import sys, sparseinst, {modules}; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
