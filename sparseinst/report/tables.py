"""Format a table's results as Markdown, CSV, LaTeX and HTML. The functions change nothing and read no files. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from sparseinst.ablation.peers import PeerResult
from sparseinst.ablation.statistics import Difference
from sparseinst.ablation.study import Figure
from sparseinst.report import escape
from sparseinst.report.collect import Cell, TableResult
from sparseinst.report.records import EVALUATED, Column
from sparseinst.words import counted

IMAGES_ALONE = "†"
"""This sign marks an interval that covers the noise of images alone, because too few rows have several seeds."""
SEEDS_ALONE = "‡"
"""This sign marks an interval that covers the noise of seeds alone, because an evaluation has no resamplings of the images."""
DIFFERENCE, PAPER_DIFFERENCE, VERDICT = "difference in AP", "in the paper", "verdict"
AS_RUN = "as run"
"""The titles of the columns that a report adds to those of the spec."""


def frame(result: TableResult) -> pd.DataFrame:
    """Return the table as people read it: its cells are texts, and each row of the table is one row of the frame.

    The comparison with the reference row comes first, then the measured values, then the paper's in columns of their own.
    """
    spec = result.table.spec
    compares = spec.reference is not None and Column("AP") in result.columns
    sizes = {row.as_run for row in result.rows}
    in_paper = [column for column in result.columns if any(row.cells[column].paper is not None for row in result.rows)]
    papers = {paper_title(column): column for column in in_paper}
    rows = []
    for entry in result.rows:
        cells = {name: str(entry.row.labels.get(name, "")) for name in spec.columns}
        if result.profile != "coco" and len(sizes) > 1:
            cells[AS_RUN] = entry.as_run
        if compares:
            ap = entry.cells[Column("AP")]
            cells[DIFFERENCE] = _interval(ap.difference) if entry.row.name != spec.reference else "reference"
            cells[PAPER_DIFFERENCE] = f"{entry.paper_difference:+.1f}" if entry.paper_difference is not None else ""
            cells[VERDICT] = entry.verdict
        cells |= {column.title: _cell(entry.cells[column], entry.state_of(column.metric), column) for column in result.columns}
        cells |= {title: _paper_value(entry.cells[column].paper) for title, column in papers.items()}
        rows.append(cells)
    for peer in result.peers:
        cells = {spec.columns[0]: peer.name, "size": str(peer.short_side)}
        cells = {name: text for name, text in cells.items() if name in spec.columns}
        cells |= {column.title: _peer_cell(peer, column) for column in result.columns}
        rows.append(cells)
    # At another scale than the paper's, no value of COCO may share a column with ours.
    for quoted in spec.quoted if result.profile == "coco" else ():
        cells = {name: str(quoted.labels.get(name, "")) for name in spec.columns}
        for column in result.columns:
            value = _quoted_value(quoted.figures, column.metric)
            mark = f" [{quoted.protocol}]" if column.metric not in EVALUATED else ""
            cells[column.title] = f"quoted {value:.1f}{mark}" if value is not None else ""
        rows.append(cells)
    return pd.DataFrame(rows).fillna("")


def paper_title(column: Column) -> str:
    """Return the title of the column with the paper's values of a metric."""
    return f"paper: {column.metric}"


def _paper_value(value: float | None) -> str:
    return f"{value:.1f}" if value is not None else ""


def _cell(cell: Cell, state: str, column: Column) -> str:
    digits = 1 if column.metric in (*EVALUATED, "FPS") else 2
    if cell.measured is None:
        return "-" if state == "done" else state
    measured = f"{cell.measured.mean:.{digits}f}"
    if cell.measured.deviation is not None:
        measured += f" ± {cell.measured.deviation:.{digits}f} ({len(cell.measured.values)})"
    if cell.spread is not None:
        measured += f" ({cell.spread[0]:.{digits}f}-{cell.spread[1]:.{digits}f})"
    return measured


def _peer_cell(peer: PeerResult, column: Column) -> str:
    if column.metric in EVALUATED:
        value = peer.figures.get(column.metric)
    else:
        median = peer.whole_ms.get(column.device or "")
        value = {"ms": median, "FPS": 1000 / median if median else None}.get(column.metric)
    return f"measured {value:.1f}" if value is not None else ""


def _quoted_value(values: Mapping[Figure, float], metric: Figure) -> float | None:
    """Return a quoted value; milliseconds and images per second are computed from each other. None if it is not quoted."""
    known = dict(values)
    if "ms" in values:
        known.setdefault("FPS", 1000 / values["ms"])
    if "FPS" in values:
        known.setdefault("ms", 1000 / values["FPS"])
    return known.get(metric)


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return ""
    text = f"{difference.value:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]"
    if not difference.seeds_known:
        return f"{text} {IMAGES_ALONE}"
    return text if difference.complete else f"{text} {SEEDS_ALONE}"


def notes(result: TableResult) -> list[str]:
    """Return the notes below the table."""
    lines = []
    if result.profile != "coco":
        lines.append(
            f"Measured at {result.profile} scale; the paper's values are of COCO. Compare the signs and sizes of differences, "
            "not the values."
        )
        sizes = {row.as_run for row in result.rows}
        if len(sizes) == 1:
            lines.append(f"Every row was run with {sizes.pop()}.")
    cells = [cell for row in result.rows for cell in row.cells.values()]
    if any(cell.measured and cell.measured.deviation is not None for cell in cells):
        lines.append("± is the standard deviation over the seeds. The number of seeds is in brackets.")
    if any(cell.spread is not None for cell in cells):
        lines.append("The brackets after a time hold its 5th and 95th percentile.")
    lines += _comparison_notes(result)
    if result.profile == "coco":
        lines += [
            f"[{name}]: {protocol.device}, {protocol.description}; {protocol.source}."
            for name, protocol in result.table.spec.protocols.items()
        ]
    elif result.table.spec.quoted:
        lines.append("The published values of other systems are of COCO, so only the table of the profile coco shows them.")
    lines += list(result.table.spec.footnotes)
    lines += _same_runs(result)
    lines.append("Provenance: " + "; ".join(result.provenance) + "." if result.provenance else "Nothing is measured yet.")
    return lines


def _comparison_notes(result: TableResult) -> list[str]:
    """Return the notes about differences and verdicts."""
    spec = result.table.spec
    if spec.reference is None:
        return []
    lines = [
        f"Differences are from the row '{spec.reference}', with a 95 % interval over seeds and images. The verdicts of this "
        f"table ({counted(result.comparisons, 'comparison')} so far) have a false discovery rate of at most 5 %. 'equivalent' "
        f"means within {spec.margin:g} AP. docs/verdicts.md explains each word."
    ]
    differences = [cell.difference for row in result.rows for cell in row.cells.values() if cell.difference is not None]
    if not all(found.seeds_known for found in differences):
        lines.append(
            f"{IMAGES_ALONE} The interval is over images alone, because there are too few seeds to know their noise. "
            "The difference stays undecided."
        )
    if any(found.seeds_known and not found.complete for found in differences):
        lines.append(
            f"{SEEDS_ALONE} The interval is over seeds alone, because an evaluation holds no resamplings of the images. The "
            "difference stays undecided. Remove the record of the evaluation, and run the table again."
        )
    if any(row.judgement is not None and row.judgement.more_seeds for row in result.rows):
        lines.append(
            "(+n seeds) means: about n more seeds of both rows would settle the comparison with 80 % power, if its estimates "
            "are right."
        )
    for row in result.rows:
        if row.not_trained:
            lines.append(f"'{row.row.name}' is not trained: {'; '.join(row.not_trained)}. It has no verdict.")
    return lines


def _same_runs(result: TableResult) -> list[str]:
    """Return a note for each group of rows that are the same run at this scale, so that their equal values are no finding.

    This happens if a profile replaces the paper's backbones.
    """
    rows: dict[tuple[str, ...], list[str]] = {}
    for entry in result.rows:
        if keys := tuple(sorted(set(entry.keys))):
            rows.setdefault(keys, []).append(f"'{entry.row.name}'")
    same = [names for names in rows.values() if len(names) > 1]
    return [f"At {result.profile} scale {' and '.join(names)} are one and the same run." for names in same]


def markdown(result: TableResult) -> str:
    """Return the table and its notes as Markdown."""
    data = frame(result)

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(map(escape.markdown, cells)) + " |\n"

    text = (
        f"# {escape.markdown(result.table.spec.title)} ({result.profile})\n\n"
        + line(list(data.columns))
        + line(["---"] * len(data.columns))
    )
    text += "".join(line([str(value) for value in row]) for row in data.itertuples(index=False))
    return text + "\n" + "".join(f"- {_plain_html(note)}\n" for note in notes(result))


def _plain_html(text: str) -> str:
    """Return a note for Markdown, in which no HTML can stand."""
    return text.replace("<", "&lt;").replace(">", "&gt;")


def csv(result: TableResult) -> str:
    """Return the values in long format, one line for each, with four decimals, for scripts and notebooks."""
    lines = []
    for entry in result.rows:
        for column, cell in entry.cells.items():
            difference = cell.difference
            judgement = entry.judgement if column.metric == "AP" else None
            lines.append(
                {
                    "table": result.table.name,
                    "profile": result.profile,
                    "row": escape.csv(entry.row.name),
                    **{name: _csv_label(entry.row.labels.get(name, "")) for name in result.table.spec.columns},
                    "figure": column.metric,
                    "device": column.device or "",
                    "state": entry.state,
                    "measured": cell.measured.mean if cell.measured else None,
                    "deviation": cell.measured.deviation if cell.measured else None,
                    "seeds": len(cell.measured.values) if cell.measured else 0,
                    "paper": cell.paper,
                    "difference": difference.value if difference else None,
                    "low": difference.low if difference else None,
                    "high": difference.high if difference else None,
                    "verdict": ("not trained" if entry.not_trained else judgement.verdict if judgement else "")
                    if column.metric == "AP"
                    else "",
                    "p_sign": judgement.p_sign if judgement else None,
                    "p_equivalence": judgement.p_equivalence if judgement else None,
                    "more_seeds": judgement.more_seeds if judgement else None,
                }
            )
    frame_of_lines = pd.DataFrame(lines)
    frame_of_lines["more_seeds"] = frame_of_lines["more_seeds"].astype("Int64")
    return frame_of_lines.to_csv(index=False, float_format="%.4f", lineterminator="\n")


def _csv_label(label: str | float) -> str | float:
    return escape.csv(label) if isinstance(label, str) else label


def comparisons_json(result: TableResult) -> list[dict[str, Any]]:
    """Return every comparison of a table as plain data for scripts."""
    found = []
    for entry in result.rows:
        ap = entry.cells.get(Column("AP"))
        if entry.row.name == result.table.spec.reference or ap is None or ap.difference is None:
            continue
        judgement = entry.judgement
        found.append(
            {
                "table": result.table.name,
                "row": entry.row.name,
                "reference": result.table.spec.reference,
                "difference": round(ap.difference.value, 4),
                "interval": [round(ap.difference.low, 4), round(ap.difference.high, 4)],
                "seeds_known": ap.difference.seeds_known,
                "paper": entry.paper_difference,
                "verdict": "not trained" if entry.not_trained else judgement.verdict if judgement is not None else None,
                "p_sign": round(judgement.p_sign, 6) if judgement is not None else None,
                "p_equivalence": round(judgement.p_equivalence, 6) if judgement is not None else None,
                "more_seeds": judgement.more_seeds if judgement is not None else None,
                "not_trained": list(entry.not_trained),
                "counts": judgement is not None and entry.same_as is None,
            }
        )
    return found


def latex(result: TableResult) -> str:
    """Return the table and its notes as a LaTeX table environment; it needs the package booktabs."""
    data = frame(result)
    data.columns = data.columns.map(escape.tex)
    styled = data.map(escape.tex).style.hide(axis="index")
    below = "".join(f"\\par {escape.tex(note)}\n" for note in notes(result))
    table = styled.to_latex(
        hrules=True, caption=escape.tex(f"{result.table.spec.title} ({result.profile})"), label=f"tab:{result.name}", position="t"
    )
    return table.replace("\\end{table}", f"\\footnotesize\n{below}\\end{{table}}")


def html(result: TableResult) -> str:
    """Return an HTML page with this table and its notes alone."""
    data = frame(result)
    title = escape.html(f"{result.table.spec.title} ({result.profile})")
    below = "".join(f"<li>{escape.html(note)}</li>\n" for note in notes(result))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>\n<style>\n'
        "body { font: 15px/1.45 sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em }\n"
        "table { border-collapse: collapse; border-top: 2px solid; border-bottom: 2px solid }\n"
        "th { border-bottom: 1px solid; text-align: left } th, td { padding: .25em .8em; white-space: nowrap }\n"
        "ul { color: #444; font-size: 13px; padding-left: 1.2em }\n</style></head>\n"
        f"<body>\n<h1>{title}</h1>\n{data.to_html(index=False, border=0)}\n<ul>\n{below}</ul>\n</body>\n</html>\n"
    )


FORMATS: dict[str, Callable[[TableResult], str]] = {"md": markdown, "csv": csv, "tex": latex, "html": html}
