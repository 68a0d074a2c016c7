"""The commands for the runs of tables: plan, run, status, logs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparseinst.ablation.store import HERE, RESULTS, Store
from sparseinst.cli.options import (
    Budget,
    Device,
    FromScratch,
    Json,
    ProfileName,
    Results,
    RowText,
    Seeds,
    TableNames,
    Tables,
    TimingCluster,
    UntilSettled,
    check_budget,
    check_costs_are_known,
    make_plan,
    warn_about_overruled_rows,
)
from sparseinst.cli.retire import print_notes, print_other_code
from sparseinst.errors import RunFailed, UserError

if TYPE_CHECKING:
    from sparseinst.ablation.plan import Costs, Plan
    from sparseinst.report.power import RowPower

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
    power: Annotated[bool, typer.Option("--power", help="Show which differences the planned seeds can settle.")] = False,
    cluster: TimingCluster = None,
) -> None:
    """Show which runs the tables need and what they cost.

    Several rows can share a run. Runs that have a record are done, and the cost counts only the other runs.
    """
    from sparseinst.ablation.plan import as_json as plan_json
    from sparseinst.ablation.plan import costs, show

    table_plan, store = make_plan(tables, profile, seeds, row, results, device, cluster=cluster)
    cost = costs(table_plan, store)
    settles = _power(tables, profile, table_plan, cost, seeds, results) if power else []
    if as_json:
        found = {"power": [line.as_json() for line in settles]} if power else {}
        print(json.dumps({**plan_json(table_plan, cost), **found}))
    elif power:
        from sparseinst.report.power import show as show_power

        show_power(settles, seeds, cost.unit)
    else:
        show(table_plan, cost)
        warn_about_overruled_rows(table_plan)
        print_notes(table_plan, store)
    check_budget(table_plan, store, budget)


def _power(tables: list[str] | None, profile: str, plan: Plan, cost: Costs, seeds: int, results: Path) -> list[RowPower]:
    from sparseinst.ablation.study import all_tables, read_tables
    from sparseinst.report.collect import read_results, typical_noises
    from sparseinst.report.power import power

    store = Store(results)
    every = [*read_tables(tables or []), *all_tables()]
    typical = typical_noises(every, plan.profile, store, store.keys()).get("AP")
    hours = [cost.hours[stage] for stage in ("train", "evaluate") if stage in cost.hours]
    planned = {(planned.table.name, planned.row.name) for planned in plan.rows}
    every_row = power(read_results(tables or [], profile, results), typical, seeds, sum(hours) if hours else None)
    return [line for line in every_row if (line.table, line.row) in planned]


@app.command()
def run(
    tables: TableNames,
    profile: ProfileName = "coco",
    seeds: Seeds = 1,
    row: RowText = None,
    results: Results = RESULTS,
    jobs: Annotated[
        int, typer.Option(min=1, max=256, help="Number of processes that share the work; they are spread over the GPUs.")
    ] = 1,
    budget: Budget = None,
    pictures: Annotated[Path | None, typer.Option(help="Draw predictions into this folder; each row gets a subfolder.")] = None,
    device: Device = None,
    until_settled: UntilSettled = False,
    again: Annotated[
        bool,
        typer.Option("--again", help=f"Repeat on this machine what was measured elsewhere. The new records go to {HERE}."),
    ] = False,
    from_scratch: FromScratch = False,
    seeds_of: Annotated[Path | None, typer.Option(hidden=True, help="A file with the seeds of each row of one look.")] = None,
) -> None:
    """Do the runs that the tables still need, on this machine. Runs that are done are not repeated."""
    from sparseinst.launch.run import made_elsewhere, run_plan
    from sparseinst.paths import RUNS

    if again and results != RESULTS:
        raise UserError("run: --again chooses the folder of the records, so it cannot be used with --results")
    results = HERE if again else results
    if seeds_of is not None:
        from sparseinst.launch.settle import plan_wanted

        wanted = plan_wanted(seeds_of, tables, profile, Store(results), device)
        if run_plan(wanted, Store(results), device=device, from_scratch=from_scratch):
            raise RunFailed("some runs failed")
        return
    if until_settled:
        if row is not None or pictures is not None or seeds != 1:
            raise UserError("run: --until-settled chooses the seeds of all rows, so it allows no --seeds, --row or --pictures")
        _run_until_settled(tables, profile, results, jobs, budget, device, from_scratch)
        return
    table_plan, store = make_plan(tables, profile, seeds, row, results, device, read_records=True)
    warn_about_overruled_rows(table_plan)
    check_budget(table_plan, store, budget)
    if table_plan.to_do():
        store.check_writable()
    if jobs > 1:
        arguments = [*tables, "--profile", profile, "--seeds", str(seeds), "--results", str(results)]
        arguments += ["--row", row] if row is not None else []
        planned = partial(make_plan, tables, profile, seeds, row, results, device)
        _run_in_processes(arguments, jobs, device, from_scratch, planned)
    elif failed := run_plan(table_plan, store, device=device, from_scratch=from_scratch):
        raise RunFailed(f"{len(failed)} of {len(table_plan.runs)} runs failed; `sparseinst status` shows why")
    if pictures is not None:
        _draw(table_plan, pictures, device)
    already = len(table_plan.runs) - len(table_plan.to_do())
    print(f"{len(table_plan.runs)} runs done" + (f", {already} of them before this command" if already else ""))
    if foreign := made_elsewhere(table_plan, store):
        print(f"{len(foreign)} of {len(table_plan.runs)} results were not measured here: {store.folder} has their records, but")
        print(f"{RUNS} has no folders of these runs. To measure them here, add --again and leave out --results.")
    print_other_code(make_plan(tables, profile, seeds, row, results, device)[0], store)
    _print_how_to_report(tables, profile, results)


def _run_in_processes(
    arguments: list[str], jobs: int, device: str | None, from_scratch: bool, planned: Callable[[], tuple[Plan, Store]]
) -> None:
    """Run a plan in several processes, and show the state of its runs meanwhile. Raises `RunFailed` if a process failed."""
    from sparseinst.launch.run import run_in_processes
    from sparseinst.launch.status import plan_status

    command = ["run", *arguments, *(["--from-scratch"] if from_scratch else [])]
    if failures := run_in_processes(command, jobs, _devices(device), lambda: plan_status(planned()[0])):
        raise RunFailed(f"{failures} of {jobs} processes failed; `sparseinst status` shows why")


def _draw(table_plan: Plan, pictures: Path, device: str | None) -> None:
    """Draw the predictions of each row's first seed into a folder of its own."""
    from sparseinst.launch.work import draw

    for planned in table_plan.rows:
        if planned.seed == 0 and "train" in planned.keys:
            key = planned.keys["train"]
            draw(key, table_plan.runs[key].config, pictures / planned.table.name / planned.row.name, device)


def _print_how_to_report(tables: list[str], profile: str, results: Path) -> None:
    where = f" --results {results}" if results != RESULTS else ""
    print(f"to see the tables: sparseinst report {' '.join(tables)} --profile {profile}{where} --show")


def _run_until_settled(
    names: list[str],
    profile: str,
    results: Path,
    jobs: int,
    budget: float | None,
    device: str | None,
    from_scratch: bool,
) -> None:
    """Train more seeds, look by look, until no row needs more or the budget is too small for the next look."""
    from sparseinst.ablation.plan import costs
    from sparseinst.ablation.study import all_tables, read_profile, read_tables
    from sparseinst.launch.run import run_in_processes, run_plan
    from sparseinst.launch.settle import advance, plan_looks, show_looks, wanted_file
    from sparseinst.launch.status import plan_status

    tables, scale, store = read_tables(names), read_profile(profile), Store(results)
    others = all_tables()
    spent = 0.0
    while wanted := advance(tables, others, scale, store, device):
        next_look = plan_looks(tables, wanted, scale, store, device)
        cost = costs(next_look, store)
        hours = cost.of(next_look.to_do())
        if budget is not None:
            check_costs_are_known(cost, scale)
            if spent + hours > budget:
                left = budget - spent
                print(f"the next look costs about {hours:.1f} {cost.unit}, and {left:.1f} of the budget are left: stopped")
                break
        spent += hours
        store.check_writable()
        print(
            f"for the next look at {', '.join(wanted)}: {len(next_look.to_do())} runs, about {hours:.2g} {cost.unit}", flush=True
        )
        if jobs > 1:
            with wanted_file(wanted) as file:
                command = ["run", *names, "--profile", profile, "--results", str(results), "--seeds-of", str(file)]
                command += ["--from-scratch"] if from_scratch else []
                failures = run_in_processes(command, jobs, _devices(device), partial(plan_status, next_look))
        else:
            failures = len(run_plan(next_look, store, device=device, from_scratch=from_scratch))
        if failures or plan_looks(tables, wanted, scale, store, device).to_do():
            raise RunFailed("some runs failed; `sparseinst status` shows why")
    show_looks(tables, scale, store)
    _print_how_to_report(names, profile, results)


def _devices(device: str | None) -> list[str | None]:
    """Return the devices that several processes use in turn; None lets a process choose."""
    from sparseinst.machine import gpu_names

    if device is not None:
        return [device]
    return [f"cuda:{index}" for index in range(len(gpu_names()))] or [None]


@app.command()
def status(
    tables: Tables = None,
    profile: ProfileName = "coco",
    seeds: Seeds = 1,
    row: RowText = None,
    results: Results = RESULTS,
    device: Device = None,
    watch: Annotated[bool, typer.Option(help="Keep the list up to date until Ctrl-C.")] = False,
    scheduler: Annotated[bool, typer.Option("--scheduler", help="Also ask SLURM which jobs it has, at most every 30 s.")] = False,
    as_json: Json = False,
    cluster: TimingCluster = None,
) -> None:
    """Show the state, progress and ETA of each run.

    A failed run also shows its reason. For tables that --until-settled has looked at, the command prints what is settled and
    which seeds come next (not with --watch). It reads files and needs no scheduler.
    """
    from sparseinst.ablation.study import read_profile, read_tables
    from sparseinst.launch import status as states
    from sparseinst.launch.settle import look_states, show_looks
    from sparseinst.launch.submission import ask_queue
    from sparseinst.paths import JOBS

    def current_states() -> list[states.Status]:
        queue = ask_queue(JOBS) if scheduler else None
        table_plan, _ = make_plan(tables, profile, seeds, row, results, device, cluster=cluster)
        return states.plan_status(table_plan, queue)

    if watch and not as_json:
        states.watch(current_states, lambda: True)
        return
    looked_at = (read_tables(tables or []), read_profile(profile), Store(results))
    if as_json:
        found = states.as_json(current_states())
        try:
            found["looks"] = [state.as_json() for state in look_states(*looked_at)]
        except UserError as error:  # a damaged log must not hide the states of the runs
            found |= {"looks": None, "looks_error": str(error)}
        print(json.dumps(found))
    else:
        states.show(current_states())
        show_looks(*looked_at)


@app.command()
def logs(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run's folder, a key or its beginning, TABLE/ROW, or a part of a row's name.")
    ],
    profile: ProfileName = "coco",
    seeds: Seeds = 1,
    results: Results = RESULTS,
    rank: Annotated[int | None, typer.Option(min=0, help="Print the log of this process of a cluster job.")] = None,
    follow: Annotated[bool, typer.Option(help="Print new lines until Ctrl-C.")] = False,
    cluster: TimingCluster = None,
) -> None:
    """Print the log of a run."""
    from sparseinst.launch.status import find_log
    from sparseinst.launch.status import follow as follow_lines

    path = find_log(run, make_plan(None, profile, seeds, None, results, None, cluster=cluster)[0], rank)
    if not follow:
        print(path.read_text(encoding="utf-8", errors="replace"), end="")
        return
    for line in follow_lines(path):
        sys.stdout.write(line)
        sys.stdout.flush()
