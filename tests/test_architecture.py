"""Check imports: each part of the package imports only allowed parts, and the command line starts without torch."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sparseinst"

BASE = {"errors", "words", "paths", "files", "checked", "machine", "section", "plain", "nested", "config", "overrides"}
ALLOWED = {
    "errors": set(),
    "words": set(),
    "paths": set(),
    "files": {"errors", "words"},
    "checked": set(),
    "machine": {"errors", "words"},
    "progress": set(),
    "attempts": {"attempt_files", "errors", "files", "machine", "paths"},
    "attempt_files": {"files", "machine", "paths"},
    "section": set(),
    "plain": {"errors", "words"},
    "nested": {"section", "errors", "words"},
    "config": {"nested", "section", "words"},
    "overrides": {"config", "files", "nested", "plain", "errors", "words"},
    "models": BASE,
    "data": BASE | {"progress"},
    "matcher": {"config", "models"},
    "criterion": {"config", "matcher", "models"},
    "paste": set(),
    "postprocess": {"config", "models", "paste"},
    "half_products": set(),
    "device": {"config", "errors", "half_products", "words"},
    "distributed": {"criterion"},
    "engines": BASE | {"models", "device"},
    "inference": BASE | {"models", "data", "paste", "postprocess", "device", "engines"},
    "evaluation": BASE
    | {"attempts", "progress", "models", "data", "matcher", "criterion", "paste", "postprocess", "device", "distributed"}
    | {"inference", "engines"},
    "training": BASE
    | {"attempts", "progress", "models", "data", "criterion", "device", "distributed", "evaluation", "inference"},
    "visualize": BASE | {"progress", "data", "postprocess", "evaluation", "inference"},
    "bench": BASE
    | {"models", "data", "paste", "postprocess", "device", "inference", "training", "integrations"}
    | {"engines", "evaluation", "report"},
    "integrations": BASE
    | {"progress", "models", "data", "criterion", "distributed", "postprocess", "engines", "inference", "evaluation", "training"},
    "ablation": BASE | {"data"},
    "launch": BASE
    | {"attempts", "attempt_files", "data", "device", "distributed", "inference", "evaluation", "training", "visualize"}
    | {"bench", "ablation", "report"},
    "report": BASE | {"ablation"},
    "publish": BASE | {"data", "device", "inference", "evaluation", "visualize", "ablation", "report"},
}
"""For each part of the package, the parts that it may import. `cli` may import all parts."""

WITHOUT_TORCH = [
    "errors",
    "words",
    "paths",
    "machine",
    "attempts",
    "attempt_files",
    "section",
    "plain",
    "nested",
    "files",
    "checked",
    "progress",
    "config",
    "overrides",
    "cli",
    "data.annotations",
    "data.coco",
    "data.coco_folder",
    "data.images",
    "data.masks",
    "data.transforms",
    "data.augmentation",
    "data.scenes",
    "data.shapes",
    "data.shape_scenes",
    "data.collage",
    "data.check",
    "data.convert",
    "data.split",
    "ablation.study",
    "ablation.plan",
    "ablation.store",
    "launch.run",
    "launch.work",
    "launch.timing",
    "ablation.gate",
    "ablation.looks",
    "ablation.sequential",
    "launch.settle",
    "launch.verify",
    "launch.status",
    "ablation.statistics",
    "launch.arrange",
    "launch.cluster",
    "launch.job",
    "launch.submit",
    "launch.submission",
    "ablation.provenance",
    "report.collect",
    "report.figures",
    "engines.names",
    "inference.compact",
    "report.grid",
    "report.tables",
    "report.plots",
    "report.pages",
    "report.curves",
    "report.evaluations",
    "report.fidelity",
    "report.fidelity_views",
    "report.forest",
    "report.records",
    "report.power",
    "report.escape",
    "report.style",
    "report.terminal",
    "report.webpage",
    "publish.card",
    "visualize.inputs",
]


FOUNDATION = {"errors", "words", "paths", "files", "checked", "machine", "section", "plain", "nested", "progress"} | {
    "attempts",
    "attempt_files",
    "config",
    "overrides",
}
"""The parts that docs/structure.md draws as one."""


def imported_parts(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sparseinst":
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("sparseinst.")}
    return {name.split(".")[1] for name in names if "." in name}


@pytest.mark.parametrize("part", ALLOWED)
def test_each_part_imports_only_allowed_parts(part: str) -> None:
    files = sorted((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]
    for file in files:
        foreign = imported_parts(file) - ALLOWED[part] - {part}
        assert not foreign, f"{file.name} imports {sorted(foreign)}"


def test_every_part_is_listed() -> None:
    parts = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert parts - {"__init__", "__main__", "cli"} == set(ALLOWED)


@pytest.mark.slow
def test_listed_modules_do_not_import_torch() -> None:
    modules = ", ".join(f"sparseinst.{name}" for name in WITHOUT_TORCH)
    code = f"import sys, sparseinst, {modules}; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_there_are_no_import_cycles() -> None:
    """Imports inside functions count, too."""
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    graph = {name: imported_modules(path) & set(names) - {name} for name, path in names.items()}
    ordered = list(TopologicalSorter(graph).static_order())  # a cycle raises CycleError, which names its modules
    assert set(ordered) == set(names)


def imported_modules(path: Path) -> set[str]:
    """Return the modules that a file imports, including those of `from package import module`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def files_of(part: str) -> list[Path]:
    return sorted((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]


def test_the_picture_of_the_structure_is_that_of_the_code() -> None:
    """docs/structure.md draws every import between parts, except where another path of arrows leads to the same part."""
    drawn = {part: "foundation" if part in FOUNDATION else part for part in (*ALLOWED, "cli")}
    imports: dict[str, set[str]] = {name: set() for name in drawn.values()}
    for part, name in drawn.items():
        for file in files_of(part):
            imports[name] |= {drawn[other] for other in imported_parts(file) if other in drawn} - {name}
    below: dict[str, set[str]] = {}
    for name in TopologicalSorter(imports).static_order():
        below[name] = imports[name].union(*(below[other] for other in imports[name]))
    arrows = {(a, b) for a, others in imports.items() for b in others if not any(b in below[other] for other in others)}
    page = (PACKAGE.parent / "docs/structure.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^ +(\w+) --> (\w+)$", page, re.M)) == arrows
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == set(drawn.values()) - {"foundation"}
