"""Commands for the tables: plan, run, status, logs, report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparseinst.ablation.store import RESULTS, Store
from sparseinst.ablation.study import read_profile, read_tables
from sparseinst.cli.options import Device, Json
from sparseinst.errors import RunFailed, UserError

if TYPE_CHECKING:
    from sparseinst.ablation.plan import Plan

app = typer.Typer()

Tables = Annotated[list[str] | None, typer.Argument(metavar="[TABLE ...]", help="table1 ... table8, figure1, a spec, or all.")]
ProfileName = Annotated[str, typer.Option("--profile", help="The scale: a file in experiments/profiles, by name or path.")]
Seeds = Annotated[int, typer.Option(min=1, max=10, help="Train every row with this many seeds, from 0 on.")]
RowText = Annotated[str | None, typer.Option("--row", help="Only the rows whose name holds this text.")]
Results = Annotated[Path, typer.Option(help="Where records, tables and figures are kept.")]
Budget = Annotated[float | None, typer.Option(help="Refuse to start where the rest of the plan costs more hours than this.")]


def _plan(
    tables: list[str] | None, profile: str, seeds: int, row: str | None, results: Path, device: str | None
) -> tuple[Plan, Store]:
    from sparseinst.ablation.plan import make_plan

    store = Store(results)
    plan = make_plan(read_tables(tables or []), read_profile(profile), store, seeds=range(seeds), row=row, device=device)
    return plan, store


def _within_budget(plan: Plan, store: Store, budget: float | None) -> None:
    from sparseinst.ablation.plan import costs

    if budget is None:
        return
    cost = costs(plan, store)
    if not cost.hours:
        raise UserError(f"profile {plan.profile.name!r} states no cost and nothing is recorded yet: --budget cannot be kept")
    hours = cost.of(plan.to_do())
    if hours > budget:
        raise UserError(f"the plan costs about {hours:.1f} {cost.unit}, over the budget of {budget:g}: nothing was started")


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
) -> None:
    """What the tables need: rows, distinct runs, what is done, and what the rest costs."""
    from sparseinst.ablation.plan import as_json as plan_json
    from sparseinst.ablation.plan import costs, show

    made, store = _plan(tables, profile, seeds, row, results, device)
    cost = costs(made, store)
    if as_json:
        print(json.dumps(plan_json(made, cost)))
    else:
        show(made, cost)
    _within_budget(made, store, budget)


@app.command()
def run(
    tables: Annotated[list[str], typer.Argument(metavar="TABLE ...", help="table1 ... table8, figure1, a spec, or all.")],
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

    made, store = _plan(tables, profile, seeds, row, results, device)
    _within_budget(made, store, budget)
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
            lambda: plan_status(_plan(tables, profile, seeds, row, results, device)[0]),
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
    as_json: Json = False,
) -> None:
    """Every run: its state, progress and ETA, and why it failed."""
    from sparseinst.ablation import status as states

    def look() -> list[states.Status]:
        return states.plan_status(_plan(tables, profile, seeds, row, results, device)[0])

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
    follow: Annotated[bool, typer.Option(help="Go on as it grows; stop with Ctrl-C.")] = False,
) -> None:
    """The log of a run."""
    from sparseinst.ablation.status import find_log
    from sparseinst.ablation.status import follow as lines_of

    path = find_log(run, _plan(None, profile, seeds, None, results, None)[0])
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
) -> None:
    """Tables and figures from the records, in results/; missing runs are visible gaps."""
    from sparseinst.ablation.status import plan_status
    from sparseinst.report.collect import collect
    from sparseinst.report.pages import write_report
    from sparseinst.report.terminal import print_table

    chosen, settings = read_tables(tables or []), read_profile(profile)
    made, store = _plan(tables, profile, 1, None, results, None)
    states = {found.run.key: found.state for found in plan_status(made)}
    keys = store.keys()
    collected = [collect(table, settings, store, states, keys) for table in chosen]
    changed = write_report(collected, results)
    if show:
        for result in collected:
            print_table(result)
    print(f"{len(changed)} files changed in {results}" if changed else f"{results}: nothing new")
