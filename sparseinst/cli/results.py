"""The commands for recorded results: verify, report."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from sparseinst.ablation.store import RESULTS, Store
from sparseinst.cli.options import Device, Json, ProfileName, Results, Tables, make_plan
from sparseinst.errors import UserError
from sparseinst.words import counted

app = typer.Typer()


@app.command()
def verify(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A record's key, or its beginning.")],
    results: Results = RESULTS,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of threads; default: the record's.")] = None,
    device: Device = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            help="Only compute the metrics again, from the predictions that the evaluation kept: runs/KEY/predictions.json.gz."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Repeat the run of a record, and compare the results.

    The present code does a training again from its start, which takes as long as the first time. An evaluation is repeated
    together with its training. With --predictions, only its metrics are computed again; the folder of the run that made them
    holds the predictions.
    KEY is the name of a file in results/records; the page of `report --html` shows the key of each row.

    The exit code is 0 if the results have the same bits or are the same within the noise of seeds. It is 1 if they are different,
    or undecided: their bits differ, and there is nothing to judge the difference by (fewer than two trained seeds of the row, no
    evaluation, or no AP).
    """
    from sparseinst.launch import verify as repeat

    if predictions is not None:
        if threads is not None or device is not None:
            raise UserError("verify: --predictions only computes metrics, so it allows no --threads and no --device")
        found = repeat.verify_metrics(key, predictions, Store(results))
    else:
        found = repeat.verify(key, Store(results), device, threads=threads, progress=not as_json)
    if as_json:
        print(json.dumps({"key": found.key, "outcome": found.outcome, "compared": found.lines}))
    else:
        print("\n".join([*found.lines, found.outcome]))
    if found.outcome in ("different", "undecided"):
        raise typer.Exit(1)


@app.command()
def report(
    tables: Tables = None,
    profile: ProfileName = "coco",
    results: Results = RESULTS,
    show: Annotated[bool, typer.Option(help="Also print the tables.")] = False,
    html: Annotated[
        bool, typer.Option("--html", help="Also write results/PROFILE.html, one page with all tables; it needs no network.")
    ] = False,
    fidelity: Annotated[bool, typer.Option(help="Show and plot only how often two rows have the paper's order.")] = False,
    as_json: Json = False,
) -> None:
    """Write tables and plots from the records to results/. For a missing run, the table shows the run's state.

    Without a name, these are the tables of which something is measured.

    --json prints every comparison with its interval and verdict. With --fidelity it prints the agreement with the paper.
    """
    with _no_garbage_collection():
        if fidelity:
            _print_fidelity(tables or [], profile, results, as_json)
        else:
            _print_report(tables, profile, results, show=show, html=html, as_json=as_json)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch the collector of cyclic garbage off: a report is short, and there is almost nothing that it could free."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _print_report(tables: list[str] | None, profile: str, results: Path, *, show: bool, html: bool, as_json: bool) -> None:
    from sparseinst.launch.status import plan_status
    from sparseinst.report.collect import read_results
    from sparseinst.report.pages import page_file, write_report
    from sparseinst.report.tables import comparisons_json

    names = tables or ["all"]
    table_plan, _ = make_plan(names, profile, 1, None, results, None)
    states = {found.run.key: found.state for found in plan_status(table_plan)}
    collected = read_results(names, profile, results, states)
    every = collected
    if not tables:  # a table of pending rows alone is no result, unless it has been asked for
        collected = [r for r in collected if r.provenance or (results / "tables" / f"{r.name}.md").exists()]
        if not collected and not as_json:
            print(f"nothing is measured at profile {profile} in {results} yet; name a table to see its rows")
            return
    page = []
    if html:  # the page holds every table, even if the command writes only some of them
        page = every if "all" in names else read_results(["all", *names], profile, results, states)
    changed = write_report(collected, results, page=page)
    if as_json:
        print(json.dumps({"profile": table_plan.profile.name, "comparisons": comparisons_json(collected)}))
        return
    if show:
        from sparseinst.report.terminal import print_table

        for result in collected:
            print_table(result)
    if html:
        print(f"the page: {page_file(results, table_plan.profile.name)}")
    print(f"{counted(len(changed), 'file')} changed in {results}" if changed else f"no file changed in {results}")


def _print_fidelity(tables: list[str], profile: str, results: Path, as_json: bool) -> None:
    from sparseinst.report import fidelity_views as views
    from sparseinst.report.fidelity import read_fidelity
    from sparseinst.report.style import save

    found = read_fidelity([name for name in tables if name != "all"], profile, results)
    if as_json:
        print(json.dumps(views.as_json(found)))
        return
    views.show(found)
    figure = views.draw(found)
    if figure is not None:
        path = views.fidelity_file(results, found.profile)
        save(figure, path)
        print(f"Plot: {path.with_suffix('.png')}")
