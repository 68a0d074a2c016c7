"""Check the README and the pages below docs/: links have a target, commands can be parsed, and shapes are the model's."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from sparseinst.cli import app
from sparseinst.config import MODELS, Config
from sparseinst.models.sparseinst import build_model
from sparseinst.words import install_extra

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "slurm/README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes from a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_have_a_target(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    for link in links:
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_extras_are_installed_from_the_clone() -> None:
    """No registry has the package, so `pip install 'sparseinst[video]'` would fail. Without quotes, zsh reads a pattern."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    files = [*PAGES, *(ROOT / "sparseinst").rglob("*.py")]
    named = [line for file in files for line in re.findall(r"pip install [^\n`]*\[\w+\][^\s`;,\"]*", file.read_text())]
    assert len(named) > 5
    assert set(named) <= {install_extra(extra) for extra in extras}


def commands() -> list[str]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
            found += [line for line in block.splitlines() if line.startswith("sparseinst ")]
        found += [code for code in re.findall(r"`(sparseinst [^`\n]+)`", text) if "..." not in code]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("line", commands())
def test_commands_can_be_parsed(line: str) -> None:
    """The test checks the options and the number of arguments, and runs nothing."""
    command: Any = typer.main.get_command(app)
    _, *arguments = shlex.split(line, comments=True)
    context = command.make_context("sparseinst", arguments.copy())
    name, command, rest = command.resolve_command(context, arguments)
    while hasattr(command, "commands"):
        context = command.make_context(name, rest.copy(), parent=context)
        name, command, rest = command.resolve_command(context, rest)
    parsed = command.make_context(name, rest, parent=context)
    assert parsed.command is command
    assert not parsed.args, "no argument is left over"


@pytest.mark.slow
def test_the_shapes_in_method_md_are_those_of_the_model() -> None:
    text = (ROOT / "docs/method.md").read_text()
    documented = {(where, shape) for where, shape in re.findall(r"^\|[^|]+\| `([\w.]+)` \| ([\dx ]+) \|$", text, re.M)}
    assert len(documented) == 15
    config = Config().replace({**MODELS["r50-giam"], "model.backbone.pretrained": False})
    model = build_model(config.model, load_pretrained=False).eval()
    found: set[tuple[str, str]] = {("SparseInst.normalise", "3 x 640 x 864")}

    def record(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            for tensor in [output] if isinstance(output, torch.Tensor) else output:
                found.add((name, " x ".join(map(str, tensor.shape[1:]))))

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(record(name))
    with torch.no_grad():
        model(torch.zeros(1, 3, 640, 864))
    assert documented <= found, documented - found


def test_every_model_is_named() -> None:
    page = (ROOT / "docs" / "train.md").read_text()
    assert [name for name in MODELS if f"`{name}`" not in page] == []
