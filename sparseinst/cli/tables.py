"""Commands for the tables: plan, run, status, logs, report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from sparseinst.ablation.store import RESULTS
from sparseinst.cli.options import (
    Budget,
    Device,
    Json,
    OfCluster,
    ProfileName,
    Results,
    RowText,
    Seeds,
    TableNames,
    Tables,
    make_plan,
    tell_overruled,
    within_budget,
)
from sparseinst.errors import RunFailed

app = typer.Typer()


@app.command()
def plan(
    tables: Tables = None,
    profile: ProfileName = "coco",
    seeds: Seeds = 1,
    row: RowText = None,
    results: Results = RESULTS,
    device: Device = None,
    budget: Budget = None,
    as_json: Json = False,
    cluster: OfCluster = None,
) -> None:
    """What the tables need: rows, distinct runs, what is done, and what the rest costs."""
    from sparseinst.ablation.plan import as_json as plan_json
    from sparseinst.ablation.plan import costs, show

    made, store = make_plan(tables, profile, seeds, row, results, device, cluster=cluster)
    cost = costs(made, store)
    if as_json:
        print(json.dumps(plan_json(made, cost)))
    else:
        show(made, cost)
        tell_overruled(made)
    within_budget(made, store, budget)


@app.command()
def run(
    tables: TableNames,
    profile: ProfileName = "coco",
    seeds: Seeds = 1,
    row: RowText = None,
    results: Results = RESULTS,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the work; GPUs are taken by turns.")] = 1,
    budget: Budget = None,
    pictures: Annotated[Path | None, typer.Option(help="Draw predictions of each row below this folder.")] = None,
    device: Device = None,
) -> None:
    """Do, here and now, what the tables still need; what is done is not done again."""
    from sparseinst.ablation.run import run_in_processes, run_plan
    from sparseinst.ablation.work import draw

    made, store = make_plan(tables, profile, seeds, row, results, device)
    tell_overruled(made)
    within_budget(made, store, budget)
    if jobs > 1:
        from sparseinst.ablation.plan import gpu_names
        from sparseinst.ablation.status import plan_status

        again = [*tables, "--profile", profile, "--seeds", str(seeds), "--results", str(results)]
        again += ["--row", row] if row is not None else []
        devices: list[str | None] = [f"cuda:{index}" for index in range(len(gpu_names()))] or [None]
        failures = run_in_processes(
            ["run", *again],
            jobs,
            [device] if device is not None else devices,
            lambda: plan_status(make_plan(tables, profile, seeds, row, results, device)[0]),
        )
        if failures:
            raise RunFailed(f"{failures} of {jobs} processes failed; `sparseinst status` says why")
    else:
        failed = run_plan(made, store, device=device)
        if failed:
            raise RunFailed(f"{len(failed)} of {len(made.runs)} runs failed; `sparseinst status` says why")
    if pictures is not None:
        for planned in made.rows:
            if planned.seed == 0 and "train" in planned.keys:
                key = planned.keys["train"]
                draw(key, made.runs[key].config, pictures / planned.table.name / planned.row.name, device)
    already = len(made.runs) - len(made.to_do())
    print(f"{len(made.runs)} runs done" + (f", {already} of them before" if already else ""))
    where = f" --results {results}" if results != RESULTS else ""
    print(f"to see the tables: sparseinst report {' '.join(tables)} --profile {profile}{where} --show")


@app.command()
def status(
    tables: Tables = None,
    profile: ProfileName = "coco",
    seeds: Seeds = 1,
    row: RowText = None,
    results: Results = RESULTS,
    device: Device = None,
    watch: Annotated[bool, typer.Option(help="Keep it up to date; stop with Ctrl-C.")] = False,
    scheduler: Annotated[bool, typer.Option("--scheduler", help="Also ask SLURM which jobs it has, at most every 30 s.")] = False,
    as_json: Json = False,
    cluster: OfCluster = None,
) -> None:
    """Every run: its state, progress and ETA, and why it failed. Told from files; no scheduler is needed."""
    from sparseinst.ablation import status as states
    from sparseinst.ablation.launch import JOBS
    from sparseinst.ablation.submission import ask_queue

    def look() -> list[states.Status]:
        queue = ask_queue(JOBS) if scheduler else None
        made, _ = make_plan(tables, profile, seeds, row, results, device, cluster=cluster)
        return states.plan_status(made, queue)

    if as_json:
        print(json.dumps(states.as_json(look())))
    elif watch:
        states.watch(look, lambda: True)
    else:
        states.show(look())


@app.command()
def logs(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A key, its beginning, or a part of the row's name.")],
    profile: ProfileName = "coco",
    seeds: Seeds = 1,
    results: Results = RESULTS,
    rank: Annotated[int | None, typer.Option(min=0, help="What this process of its job on a cluster said.")] = None,
    follow: Annotated[bool, typer.Option(help="Go on as it grows; stop with Ctrl-C.")] = False,
    cluster: OfCluster = None,
) -> None:
    """The log of a run."""
    from sparseinst.ablation.status import find_log
    from sparseinst.ablation.status import follow as lines_of

    path = find_log(run, make_plan(None, profile, seeds, None, results, None, cluster=cluster)[0], rank)
    if not follow:
        print(path.read_text(encoding="utf-8"), end="")
        return
    for line in lines_of(path):
        sys.stdout.write(line)
        sys.stdout.flush()


@app.command()
def report(
    tables: Tables = None,
    profile: ProfileName = "coco",
    results: Results = RESULTS,
    show: Annotated[bool, typer.Option(help="Also print the tables.")] = False,
    html: Annotated[bool, typer.Option("--html", help="Also one page with all, results/PROFILE.html; needs no network.")] = False,
) -> None:
    """Tables and figures from the records, in results/; missing runs are visible gaps."""
    from sparseinst.ablation.status import plan_status
    from sparseinst.report.collect import read_results
    from sparseinst.report.pages import page_file, write_report
    from sparseinst.report.terminal import print_table

    made, _ = make_plan(tables, profile, 1, None, results, None)
    states = {found.run.key: found.state for found in plan_status(made)}
    collected = read_results(tables or [], profile, results, states)
    # The page holds every table, also where fewer are written anew.
    named = [name for name in tables or [] if name != "all"]
    page = read_results(["all", *named], profile, results, states) if html else []
    changed = write_report(collected, results, page=page)
    if show:
        for result in collected:
            print_table(result)
    if html:
        print(f"the page: {page_file(results, made.profile.name)}")
    print(f"{len(changed)} files changed in {results}" if changed else f"{results}: nothing new")
