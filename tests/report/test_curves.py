"""Check the training curves: their names, their units, and what may be compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparseinst.cli import run_cli
from sparseinst.report.curves import different_losses, draw_curves, run_names

ENTRIES: list[dict[str, Any]] = [
    {"iteration": 1, "loss": 2.0, "loss_dice": 1.5, "learning_rate": 4e-4},
    {"iteration": 1, "AP": 0.0, "own": 0.25, "prefers_own": 0.5, "border": 0.1, "matching_stability": None},
    {"iteration": 2, "loss": 1.0, "loss_dice": 0.5, "learning_rate": 4e-4},
]


def write_run(folder: Path, settings: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(settings)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES))
    return folder


def test_every_share_is_in_percent_and_no_line_touches_the_edge() -> None:
    panels = {axes.get_title(loc="left"): axes for axes in draw_curves({"a": ENTRIES}).axes}
    assert panels["mass of maps on their own object (%)"].lines[0].get_ydata() == pytest.approx([25])
    assert panels["maps that prefer their own object (%)"].lines[0].get_ydata() == pytest.approx([50])
    assert panels["mass of maps on the border (%)"].lines[0].get_ydata() == pytest.approx([10])
    assert not any("matched as before" in title for title in panels), "a metric without a value has no panel"
    for axes in panels.values():
        bottom, top = axes.get_ylim()
        assert bottom == 0
        assert top > 1.1 * max(axes.lines[0].get_ydata())
        assert not axes.lines[0].get_clip_on(), "a marker at zero would be cut"


def test_runs_are_named_by_their_folders_unless_two_have_one_name(tmp_path: Path) -> None:
    one, two, other = (write_run(tmp_path / name) for name in ("x/seed-0", "y/seed-0", "y/seed-1"))
    assert run_names([one, other]) == ["seed-0", "seed-1"]
    assert run_names([one, two, other]) == [str(one), str(two), "seed-1"]
    (other / "name.txt").write_text("table5 dice seed 1")
    assert run_names([other]) == ["table5 dice seed 1 (seed-1)"]


def test_a_note_names_the_settings_in_which_losses_differ(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    focal = write_run(tmp_path / "focal", "loss: {pixel: focal}")
    assert different_losses([one, two]) == []
    assert different_losses([one, two, focal]) == ["loss.pixel"]
    (two / "config.yaml").unlink()
    assert different_losses([two, one]) == []
    for runs, noted in (([one, two], False), ([one, focal], True)):
        assert run_cli(["curves", *map(str, runs), "--output", str(tmp_path / "c.png")]) == 0
        assert ("differ in loss.pixel" in (tmp_path / "c.svg").read_text()) == noted
