"""Format a table's results as Markdown, CSV, LaTeX and HTML. The functions change nothing and read no files. Imports no torch."""

from __future__ import annotations

import csv as csv_module
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sparseinst.ablation.statistics import CONFIDENCE
from sparseinst.report import escape
from sparseinst.report.collect import TableResult, repeated_comparisons
from sparseinst.report.grid import IMAGES_ALONE, ONE_SEED, SEEDS_ALONE, grid
from sparseinst.report.records import Column
from sparseinst.words import counted

if TYPE_CHECKING:
    import pandas as pd


def frame(result: TableResult) -> pd.DataFrame:
    """Return the `grid` of a table as a frame of texts, for notebooks."""
    import pandas as pd  # its import takes a fifth of a second, and a report works without it

    titles, rows = grid(result)
    return pd.DataFrame([dict(zip(titles, row, strict=True)) for row in rows])


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
    for device, sessions in result.sessions.items():
        if sessions > 1:
            lines.append(
                f"The times on {device} were measured in {sessions} sessions, and the speed of a machine changes. To compare "
                f"them, time all rows by turns on that device: `sparseinst retire {result.table.name} --stage latency --profile "
                f"{result.profile}`, then `sparseinst run {result.table.name} --profile {result.profile}`."
            )
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
    differences = [cell.difference for row in result.rows for cell in row.cells.values() if cell.difference is not None]
    interval = ", with a 95 % interval over seeds and images" if any(found.testable for found in differences) else ""
    lines = [
        f"Differences are from the row '{spec.reference}'{interval}. The verdicts of this table "
        f"({counted(result.comparisons, 'comparison')} so far) have a false discovery rate of at most 5 %. 'equivalent' "
        f"means within {spec.margin:g} AP. docs/verdicts.md explains each word."
    ]
    judged = [row.judgement for row in result.rows if row.judgement is not None]
    if any(judgement.confidence > CONFIDENCE for judgement in judged):
        lines.append(
            "The interval of a settled difference is wider than 95 %, because settled differences are a selection; it decides "
            "whether the size is compatible with the paper's."
        )
    if any(not found.seeds_known and not found.guessed for found in differences):
        lines.append(
            f"{IMAGES_ALONE} The interval is over images alone, because there are too few seeds to know their noise. "
            "The difference stays undecided."
        )
    if any(found.seeds_known and not found.complete for found in differences):
        lines.append(
            f"{SEEDS_ALONE} The interval is over seeds alone, because an evaluation holds no resamplings of the images. The "
            "difference stays undecided. Remove the record of the evaluation, and run the table again."
        )
    if any(found.guessed for found in differences):
        lines.append(f"{ONE_SEED}: one seed does not show a row's noise, so the difference has no interval and stays undecided.")
    if any(judgement.more_seeds for judgement in judged):
        lines.append(
            "(+n seeds) means: about n more seeds of both rows would settle the comparison with 80 % power, if its estimates "
            "are right."
        )
    for row in result.rows:
        if row.compared_seeds is not None:
            seeds = ", ".join(map(str, row.compared_seeds))
            lines.append(
                f"'{row.row.name}' evaluates trainings of '{spec.reference}', so the two are compared on the same trainings "
                f"(seed {seeds}). '{spec.reference}' has more seeds, so this is not the difference of the two cells."
            )
        if row.other_images:
            lines.append(
                f"'{row.row.name}' was evaluated on other images than '{spec.reference}', so it has no difference. Remove the "
                "record of the older evaluation, and run the table again."
            )
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
    titles, rows = grid(result)

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(map(escape.markdown, cells)) + " |\n"

    text = f"# {escape.markdown(result.table.spec.title)} ({result.profile})\n\n" + line(titles) + line(["---"] * len(titles))
    text += "".join(map(line, rows))
    return text + "\n" + "".join(f"- {escape.markdown(note)}\n" for note in notes(result))


def csv(result: TableResult) -> str:
    """Return the values in long format, one line for each, with four decimals, for scripts and notebooks.

    With `one_seed`, the interval from `low` to `high` is a guess from the noise of other rows, which the other formats leave out.
    """
    lines = []
    for entry in result.rows:
        for column, cell in entry.cells.items():
            difference = cell.difference
            judgement = entry.judgement if column.metric == "AP" else None
            lines.append(
                {
                    "table": result.table.name,
                    "profile": result.profile,
                    "row": entry.row.name,
                    **{name: entry.row.labels.get(name, "") for name in result.table.spec.columns},
                    "figure": column.metric,
                    "device": column.device or "",
                    "state": entry.state_of(column.metric),
                    "measured": cell.measured.mean if cell.measured else None,
                    "deviation": cell.measured.deviation if cell.measured else None,
                    "seeds": len(cell.measured.values) if cell.measured else 0,
                    "paper": cell.paper,
                    "difference": difference.value if difference else None,
                    "low": difference.low if difference and not difference.guessed else None,
                    "high": difference.high if difference and not difference.guessed else None,
                    "confidence": difference.confidence if difference else None,
                    "one_seed": ("yes" if difference.guessed else "no") if difference else None,
                    "verdict": ("not trained" if entry.not_trained else judgement.verdict if judgement else "")
                    if column.metric == "AP"
                    else "",
                    "p_sign": judgement.p_sign if judgement else None,
                    "p_equivalence": judgement.p_equivalence if judgement else None,
                    "more_seeds": judgement.more_seeds if judgement else None,
                }
            )
    texts = {escape.csv(name): _csv_texts([line[name] for line in lines]) for name in lines[0]}
    written = io.StringIO()
    writer = csv_module.writer(written, lineterminator="\n")
    writer.writerow(texts)
    writer.writerows(zip(*texts.values(), strict=True))
    return written.getvalue()


def _csv_texts(values: list[str | float | None]) -> list[str]:
    """Return the texts of a column, with four decimals if it holds only numbers and they are not all integers."""
    values = [None if value != value else value for value in values]  # NaN is no value, too
    known = [value for value in values if value is not None]
    decimals = any(isinstance(value, float) for value in known) and not any(isinstance(value, str) for value in known)
    return ["" if value is None else f"{value:.4f}" if decimals else escape.csv(str(value)) for value in values]


def comparisons_json(results: Sequence[TableResult]) -> list[dict[str, Any]]:
    """Return every comparison of the tables as plain data for scripts.

    With `one_seed`, the interval is a guess from the noise of other rows, and people are shown none.
    """
    found = []
    repeated = repeated_comparisons(results)
    for result, entry in ((table, row) for table in results for row in table.rows):
        ap = entry.cells.get(Column("AP"))
        if entry.row.name == result.table.spec.reference or ap is None or ap.difference is None:
            continue
        judgement = entry.judgement
        reference = next(row for row in result.rows if row.row.name == result.table.spec.reference)
        found.append(
            {
                "table": result.table.name,
                "row": entry.row.name,
                "reference": result.table.spec.reference,
                "difference": round(ap.difference.value, 4),
                "interval": None if ap.difference.guessed else [round(ap.difference.low, 4), round(ap.difference.high, 4)],
                "confidence": round(ap.difference.confidence, 6),
                "seeds_known": ap.difference.seeds_known,
                "one_seed": ap.difference.guessed,
                "paper": entry.paper_difference,
                "verdict": "not trained" if entry.not_trained else judgement.verdict if judgement is not None else None,
                "p_sign": round(judgement.p_sign, 6) if judgement is not None else None,
                "p_equivalence": round(judgement.p_equivalence, 6) if judgement is not None else None,
                "more_seeds": judgement.more_seeds if judgement is not None else None,
                "not_trained": list(entry.not_trained),
                "counts": judgement is not None and (result.table.name, entry.row.name) not in repeated,
                "evaluations": list(entry.evaluations),
                "reference_evaluations": list(reference.evaluations),
                "provenance": result.provenance,
            }
        )
    return found


def latex(result: TableResult) -> str:
    """Return the table and its notes as a LaTeX table environment; it needs the package booktabs."""
    titles, rows = grid(result)

    def line(cells: list[str]) -> str:
        return " & ".join(map(escape.tex, cells)) + " \\\\\n"

    below = "".join(f"\\par {escape.tex(note)}\n" for note in notes(result))
    return (
        f"\\begin{{table}}[t]\n\\caption{{{escape.tex(f'{result.table.spec.title} ({result.profile})')}}}\n"
        f"\\label{{tab:{result.name}}}\n\\begin{{tabular}}{{{'l' * len(titles)}}}\n"
        f"\\toprule\n{line(titles)}\\midrule\n{''.join(map(line, rows))}\\bottomrule\n"
        f"\\end{{tabular}}\n\\footnotesize\n{below}\\end{{table}}\n"
    )


def html(result: TableResult) -> str:
    """Return an HTML page with this table and its notes alone."""
    titles, rows = grid(result)
    title = escape.html(f"{result.table.spec.title} ({result.profile})")
    below = "".join(f"<li>{escape.html(note)}</li>\n" for note in notes(result))
    head = "".join(f"      <th>{escape.html(text).strip()}</th>\n" for text in titles)
    body = "".join(
        "    <tr>\n" + "".join(f"      <td>{escape.html(text).strip()}</td>\n" for text in row) + "    </tr>\n" for row in rows
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>\n<style>\n'
        "body { font: 15px/1.45 sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em }\n"
        "table { border-collapse: collapse; border-top: 2px solid; border-bottom: 2px solid }\n"
        "th { border-bottom: 1px solid; text-align: left } th, td { padding: .25em .8em; white-space: nowrap }\n"
        "ul { color: #444; font-size: 13px; padding-left: 1.2em }\n</style></head>\n"
        f'<body>\n<h1>{title}</h1>\n<table class="dataframe">\n  <thead>\n    <tr style="text-align: right;">\n{head}'
        f"    </tr>\n  </thead>\n  <tbody>\n{body}  </tbody>\n</table>\n<ul>\n{below}</ul>\n</body>\n</html>\n"
    )


FORMATS: dict[str, Callable[[TableResult], str]] = {"md": markdown, "csv": csv, "tex": latex, "html": html}
