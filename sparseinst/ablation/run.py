"""Run the rows of a table here, one after the other, and print what came out. Imports no torch by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from sparseinst.ablation.study import Row, Spec, row_config

if TYPE_CHECKING:
    from sparseinst.engine.evaluate import Evaluation

RUNS = Path("runs")


def run_rows(
    spec: Spec, rows: Sequence[Row], profile: dict[str, object], *, device: str | None, pictures: Path | None
) -> dict[str, Evaluation]:
    """Train and evaluate each row in the folder its config's content hash names; what is done already is not done again.

    Args:
        pictures: also draw the predictions for the first validation images of each row below this folder.

    Returns:
        The evaluations by row name.
    """
    # The engine brings torch, which planning and printing do without.
    from sparseinst.data.coco import val_split
    from sparseinst.engine.device import pick_device
    from sparseinst.engine.evaluate import evaluate_run
    from sparseinst.engine.predict import load_model
    from sparseinst.engine.predict_files import predict_files
    from sparseinst.engine.train import train

    chosen = pick_device(device)
    results = {}
    for row in rows:
        config = row_config(spec, row, profile)
        folder = RUNS / config.content_hash()
        print(f"{row.name}: {folder}", flush=True)
        train(config, folder, device=chosen)
        results[row.name] = evaluate_run(folder, device=chosen)
        if pictures is not None:
            images = [image.path for image in val_split(config.data).images[:6]]
            predict_files(load_model(folder, device), images, pictures / row.name, score=0.4)
    return results


def show(spec: Spec, rows: Sequence[Row], results: dict[str, Evaluation], profile: str) -> None:
    """Print measured figures with the paper's beside them."""
    table = Table(title=f"{spec.title}\nmeasured at {profile} scale | the paper's, on COCO at full scale", min_width=72)
    for column in spec.columns:
        table.add_column(column)
    for figure in spec.figures:
        table.add_column(figure, justify="right")
    for row in rows:
        figures = results[row.name].figures
        cells = (f"{_number(figures[name])} | {_number(row.paper.get(name))}" for name in spec.figures)
        table.add_row(*(str(row.labels.get(column, "")) for column in spec.columns), *cells)
    Console().print(table)
    for note in spec.footnotes:
        print(note)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
