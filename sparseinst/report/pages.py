"""Write the report: tables, plots and the index. Only files that change are written. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sparseinst.ablation.store import Store
from sparseinst.files import atomic
from sparseinst.report.collect import TableResult
from sparseinst.report.figures import PLOTS, SUFFIXES, figure_file, figure_texts, forest_file
from sparseinst.report.tables import FORMATS
from sparseinst.report.webpage import web_page
from sparseinst.section import content_hash

_WRITERS = 8
"""The number of files that are written at the same time."""


def write_report(results: Sequence[TableResult], folder: Path, *, page: Sequence[TableResult] = ()) -> list[Path]:
    """Write the tables and plots of results below `folder`, and the index of all tables there.

    Args:
        page: the results of all tables. They are also written on one web page, see `page_file`, with a plot of all comparisons.

    Returns:
        The files that are new or changed; an empty list if no record is new.
    """
    changed: list[Path] = []
    with ThreadPoolExecutor(_WRITERS) as writers:  # the disk may need as long for the files as the plots need to be drawn
        written = []
        for result in results:
            texts = {folder / "tables" / f"{result.name}.{suffix}": write(result).encode() for suffix, write in FORMATS.items()}
            new = {path: text for path, text in texts.items() if not _holds(path, text)}
            source = content_hash({path.name: text.decode() for path, text in texts.items()})
            for name in figure_texts(result):
                path = folder / "figures" / f"{figure_file(result, name)}.svg"
                if not _is_drawn_from(path, source):
                    new |= _draw(result, name, path, source)
            written += [writers.submit(_write_bytes, path, content) for path, content in new.items()]
            changed += new
        for future in written:
            future.result()
    if page:
        path = folder / "figures" / f"{forest_file(page[0].profile)}.svg"
        changed += _draw_forest(page, path)
        path = page_file(folder, page[0].profile)
        if _write(path, web_page(page, Store(folder), folder / "figures")):
            changed.append(path)
    index = folder / "README.md"
    if _write(index, _index(folder)):
        changed.append(index)
    return changed


def _is_drawn_from(path: Path, source: str) -> bool:
    """Return whether a plot's files exist and were drawn from this content of the table, which holds all that plots show."""
    if not path.exists() or not path.with_suffix(".png").exists():
        return False
    return f"<dc:source>{source}</dc:source>".encode() in path.read_bytes()


def _draw(result: TableResult, name: str, path: Path, source: str) -> dict[Path, bytes]:
    """Draw a plot as PNG and SVG, and return the content of its files. If there is nothing to show, remove them."""
    from sparseinst.report.plots import plots  # matplotlib is not imported if no plot changes
    from sparseinst.report.style import render

    figure = plots(result)[name].draw(result)
    if figure is None:
        _remove(path)
        return {}
    return {path.with_suffix(suffix): content for suffix, content in render(figure, source).items()}


def _remove(path: Path) -> None:
    """Remove the files of a plot that shows nothing any more."""
    for suffix in SUFFIXES:
        path.with_suffix(suffix).unlink(missing_ok=True)


def _draw_forest(page: Sequence[TableResult], path: Path) -> list[Path]:
    """Draw the plot of all comparisons as SVG and PNG if its bytes change; return the files that change."""
    from sparseinst.report.forest import forest
    from sparseinst.report.style import render

    figure = forest(page)
    if figure is None:
        _remove(path)
        return []
    drawn = {path.with_suffix(suffix): content for suffix, content in render(figure).items()}
    changed = [file for file, content in drawn.items() if not _holds(file, content)]
    for file in changed:
        _write_bytes(file, drawn[file])
    return changed


def page_file(folder: Path, profile: str) -> Path:
    """Return the path of the web page with a profile's results."""
    return folder / f"{profile}.html"


def _write(path: Path, text: str) -> bool:
    """Write a text file if its content changes; return whether it does."""
    content = text.encode()
    if _holds(path, content):
        return False
    _write_bytes(path, content)
    return True


def _holds(path: Path, content: bytes) -> bool:
    return path.exists() and path.read_bytes() == content


def _write_bytes(path: Path, content: bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def _index(folder: Path) -> str:
    """Return the index: all tables below `folder`, each with its plots."""
    parts = [
        "# Results\n\nGenerated by `sparseinst report` from `records/`; do not edit. Each table is also there as CSV, LaTeX and "
        "HTML, each figure as PNG and SVG.\n"
    ]
    for table in sorted((folder / "tables").glob("*.md")):
        text = table.read_text(encoding="utf-8", errors="replace").replace("# ", "## ", 1).rstrip()
        title, _, body = text.partition("\n")
        others = ", ".join(f"[{suffix}](tables/{table.stem}.{suffix})" for suffix in FORMATS if suffix != "md")
        parts.append(f"{title}\n{body}\n\n{others}\n")
        pictures = (folder / "figures" / f"{table.stem}-{name}.png" for name in sorted(PLOTS))
        parts += [f"![{picture.stem}](figures/{picture.name})\n" for picture in pictures if picture.exists()]
    return "\n".join(parts)
