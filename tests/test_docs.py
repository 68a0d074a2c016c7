"""What the README and the pages below docs/ say: links lead somewhere, commands are understood, shapes are the model's."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from sparseinst.cli import app
from sparseinst.config import MODELS, Config
from sparseinst.models.sparseinst import build_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "slurm/README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    for link in links:
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def commands() -> list[str]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
            found += [line for line in block.splitlines() if line.startswith("sparseinst ")]
        found += [code for code in re.findall(r"`(sparseinst [^`\n]+)`", text) if "..." not in code]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line: str) -> None:
    """Every option and number of arguments; nothing is run."""
    command: Any = typer.main.get_command(app)
    _, *arguments = shlex.split(line, comments=True)
    context = command.make_context("sparseinst", arguments.copy())
    name, command, rest = command.resolve_command(context, arguments)
    while hasattr(command, "commands"):
        context = command.make_context(name, rest.copy(), parent=context)
        name, command, rest = command.resolve_command(context, rest)
    understood = command.make_context(name, rest, parent=context)
    assert understood.command is command
    assert not understood.args, "nothing is left over"


def test_the_method_s_shapes() -> None:
    text = (ROOT / "docs/method.md").read_text()
    told = {(where, shape) for where, shape in re.findall(r"^\|[^|]+\| `([\w.]+)` \| ([\dx ]+) \|$", text, re.M)}
    assert len(told) == 15
    config = Config().replace({**MODELS["r50-giam"], "model.backbone.pretrained": False})
    model = build_model(config.model, load_pretrained=False).eval()
    seen: set[tuple[str, str]] = {("SparseInst.normalise", "3 x 640 x 864")}

    def note(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            for tensor in [output] if isinstance(output, torch.Tensor) else output:
                seen.add((name, " x ".join(map(str, tensor.shape[1:]))))

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    with torch.no_grad():
        model(torch.zeros(1, 3, 640, 864))
    assert told <= seen, told - seen
