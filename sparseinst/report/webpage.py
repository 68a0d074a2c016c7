"""Show all results on one web page that loads no other file. Imports no torch."""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Container, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sparseinst.ablation.store import Record, Store
from sparseinst.config import Config
from sparseinst.nested import flatten
from sparseinst.report.collect import Cell, RowResult, TableResult, repeated_comparisons
from sparseinst.report.figures import figure_file, figure_texts, forest_file
from sparseinst.report.grid import DIFFERENCE, VERDICT, grid
from sparseinst.report.records import ACCURACY, Column, commit_of
from sparseinst.report.tables import notes
from sparseinst.words import counted

_CHIPS = {
    "same sign, size compatible": "yes",
    "same sign, other size": "sign",
    "opposite sign": "no",
    "equivalent": "yes",
    "not equivalent": "no",
    "higher": "sign",
    "lower": "sign",
    "undecided": "open",
    "not trained": "gap",
}
"""The CSS class of each verdict."""


def web_page(results: Sequence[TableResult], store: Store, figures: Path) -> str:
    """Return an HTML page with these tables, their plots, and every record of the store.

    Args:
        figures: the folder in which `write_report` wrote the plots.
    """
    profile = results[0].profile
    loaded = [record for key in sorted(store.keys()) if (record := store.load(key)) is not None]
    rows = {key: f"{result.name}: {row.row.name}" for result in reversed(results) for row in result.rows for key in row.keys}
    gaps = [
        {"table": _short(result), "row": row.row.name, "state": row.missing}
        for result in results
        for row in result.rows
        if row.missing is not None
    ]
    repeated = repeated_comparisons(results)
    verdicts = Counter(
        _verdict(row)
        for result in results
        for row in result.rows
        if row.verdict and (result.table.name, row.row.name) not in repeated
    )
    measured = sum(any(cell.measured is not None for cell in row.cells.values()) for result in results for row in result.rows)
    counts = [
        (len(results), _noun(len(results), "table")),
        (measured, f"{_noun(measured, 'row')} with results"),
        (len(gaps), f"{_noun(len(gaps), 'row')} with gaps"),
        (len(loaded), _noun(len(loaded), "record")),
        *((verdicts[name], f"{_noun(verdicts[name], 'comparison')}: {name}") for name in _CHIPS if verdicts[name]),
    ]
    folder = files(__package__) / "page"
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string((folder / "page.html.jinja").read_text(encoding="utf-8"))
    overview = figures / f"{forest_file(profile)}.svg"
    return template.render(
        profile=profile,
        forest=base64.b64encode(overview.read_bytes()).decode() if overview.exists() else "",
        counts=counts,
        tables=[_table(result, figures, {record.key for record in loaded}) for result in results],
        gaps=gaps,
        records=[_record_line(record, rows.get(record.key, "")) for record in loaded],
        data=_as_script({record.key: _details(record) for record in loaded}),
        css=Markup((folder / "page.css").read_text(encoding="utf-8")),
        js=Markup((folder / "page.js").read_text(encoding="utf-8")),
    )


def _noun(count: int, noun: str) -> str:
    """Return the noun that follows a count."""
    return counted(count, noun).partition(" ")[2]


def _verdict(row: RowResult) -> str:
    """Return the verdict's word without what would settle it."""
    return row.judgement.verdict if row.judgement is not None and not row.not_trained else row.verdict


def _as_script(data: Any) -> Markup:
    """Return the data as JSON for a script element; `<` is escaped, so that no text in the data can close the element."""
    return Markup(json.dumps(data, sort_keys=True, allow_nan=False).replace("<", "\\u003c"))


def _short(result: TableResult) -> str:
    return result.table.spec.title.partition(":")[0]


def _table(result: TableResult, figures: Path, loaded: Container[str]) -> dict[str, Any]:
    titles, texts = grid(result)
    rows = []
    for number, values in enumerate(texts):
        entry = result.rows[number] if number < len(result.rows) else None
        cells = [_cell(title, text, entry, result) for title, text in zip(titles, values, strict=True)]
        peer = len(result.rows) <= number < len(result.rows) + len(result.peers)
        kind = "row" if entry is not None else "peer" if peer else "quoted"
        labels = " ".join(str(text) for text in values[: len(result.table.spec.columns)] if text)
        name = entry.row.name if entry is not None else labels
        rows.append(
            {"kind": kind, "name": name, "cells": cells, "runs": _distinct(entry.keys, loaded) if entry is not None else ()}
        )
    return {
        "name": result.table.name,
        "short": _short(result),
        "title": f"{result.table.spec.title} ({result.profile})",
        "columns": titles,
        "rows": rows,
        "figures": [
            {
                "data": base64.b64encode(path.read_bytes()).decode(),
                "alt": f"{result.table.spec.title}: {shows}. The numbers are in the table above.",
            }
            for name, shows in figure_texts(result).items()
            if (path := figures / f"{figure_file(result, name)}.svg").exists()
        ],
        "notes": notes(result),
    }


def _distinct(keys: Sequence[str], loaded: Container[str]) -> list[str]:
    """Return each key once, without the keys of damaged records."""
    return [key for key in dict.fromkeys(keys) if key in loaded]


def _cell(title: str, text: str, entry: RowResult | None, result: TableResult) -> dict[str, Any]:
    """Return what a cell shows and the value by which it is sorted."""
    cell = {"title": title, "text": text, "sort": text, "chip": "", "note": ""}
    column = next((column for column in result.columns if column.title == title), None)
    if entry is None:
        return cell | ({"sort": "".join(part for part in text.split() if _is_number(part))} if column is not None else {})
    if column is not None:
        return cell | _metric_cell(entry.cells[column], column, entry.state_of(column.metric), text)
    if title == DIFFERENCE:
        difference = entry.cells[Column("AP")].difference
        return cell | {"sort": difference.value if difference is not None else 0.0 if text == "reference" else ""}
    return cell | {"chip": _CHIPS.get(_verdict(entry), "") if title == VERDICT and text else ""}


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _metric_cell(cell: Cell, column: Column, state: str, text: str) -> dict[str, Any]:
    shown: dict[str, Any] = {"text": text, "sort": cell.measured.mean if cell.measured is not None else ""}
    if cell.measured is None and state != "done":
        shown["chip"] = "gap"
    elif cell.measured is not None and column.metric in ACCURACY and len(cell.measured.values) > 1:
        shown["note"] = "by seed: " + ", ".join(f"{value:.2f}" for value in cell.measured.values)
    return shown


def _record_line(record: Record, row: str) -> dict[str, Any]:
    """Return a record's line in the list of all records.

    Args:
        row: the table and row that show the record; empty if none does.
    """
    about = record.provenance
    values = (
        record.kind,
        row or str(record.result.get("peer", "")),
        _headline(record),
        about.get("profile", ""),
        about.get("seed", "") if record.kind in ("train", "evaluate") else "",
        about.get("device", ""),
        commit_of(about),
        about.get("ended", ""),
        record.key,
    )
    return {"kind": record.kind, "key": record.key, "columns": values}


def _headline(record: Record) -> str:
    """Return the main result of a record as a text; empty if it has none."""
    result = record.result
    if record.kind == "evaluate":
        return f"AP {result['figures']['AP']:.1f}" if result["figures"].get("AP") is not None else ""
    if record.kind == "latency":
        return f"{result['whole_ms']['median']:.1f} ms"
    if record.kind == "peer":
        ap, ms = result.get("figures", {}).get("AP"), result.get("whole_ms", {}).get("median")
        return f"AP {ap:.1f}" if ap is not None else f"{ms:.1f} ms" if ms is not None else ""
    return f"loss {result['losses']['loss']:.3f}" if "loss" in result.get("losses", {}) else ""


def _details(record: Record) -> dict[str, Any]:
    """Return a record's result, its provenance, and the settings that differ from the defaults."""
    changed = {path: value for path, value in flatten(record.config).items() if _defaults().get(path) != value}
    content = {"result": record.result, "config": changed, "provenance": record.provenance}
    return {"kind": record.kind, **_rounded(content)}


@cache
def _defaults() -> dict[str, Any]:
    """Return the default of each setting by its dotted path."""
    return flatten(Config().model_dump(mode="json"))


def _rounded(value: Any) -> Any:
    """Return a value with its floats rounded to four decimals; NaN and infinity become None, because JSON cannot express them."""
    kind = type(value)  # a value that JSON holds, so that no test of a base class is needed; pages hold millions of them
    if kind is float:
        return round(value, 4) if math.isfinite(value) else None
    if kind is dict:
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if kind is list else value
