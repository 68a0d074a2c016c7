"""The commands for a cluster: launch, retry, cancel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparseinst.ablation.store import RESULTS, Store
from sparseinst.cli.options import (
    Budget,
    FromScratch,
    ProfileName,
    Results,
    RowText,
    Seeds,
    TableNames,
    TimingCluster,
    UntilSettled,
    check_budget,
    make_plan,
    warn_about_overruled_rows,
)
from sparseinst.errors import UserError
from sparseinst.launch.cluster import Cluster, read_cluster
from sparseinst.paths import JOBS, SNAPSHOTS

if TYPE_CHECKING:
    from sparseinst.ablation.plan import Plan

app = typer.Typer()

ClusterName = Annotated[str, typer.Option("--cluster", help="The cluster profile: a name in slurm/, or the path of a YAML file.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the batch scripts and submit nothing.")]


@app.command()
def launch(
    tables: TableNames,
    cluster: ClusterName,
    profile: ProfileName = "coco",
    seeds: Seeds = 1,
    row: RowText = None,
    results: Results = RESULTS,
    budget: Budget = None,
    dry_run: DryRun = False,
    until_settled: UntilSettled = False,
    from_scratch: FromScratch = False,
) -> None:
    """Send to a cluster the runs that the tables still need.

    Runs that are done, queued or running are not sent again.

    With --until-settled, seeds are added in rounds, called looks. Each call looks at the results and sends the runs of the next
    look. Call the command again when these runs are done.
    """
    options = {"until_settled": until_settled, "from_scratch": from_scratch}
    _send(tables, cluster, profile, seeds, row, results, budget, dry_run, retry=False, **options)


@app.command()
def retry(
    tables: TableNames,
    cluster: ClusterName,
    profile: ProfileName = "coco",
    seeds: Seeds = 1,
    row: RowText = None,
    results: Results = RESULTS,
    budget: Budget = None,
    dry_run: DryRun = False,
    until_settled: UntilSettled = False,
    from_scratch: FromScratch = False,
) -> None:
    """Send failed, lost, cancelled or interrupted runs again.

    A training continues from its last checkpoint.

    With --until-settled, the command sends the runs of the latest look of `launch --until-settled` again.
    """
    options = {"until_settled": until_settled, "from_scratch": from_scratch}
    _send(tables, cluster, profile, seeds, row, results, budget, dry_run, retry=True, **options)


def _send(
    tables: TableNames,
    name: str,
    profile: str,
    seeds: int,
    row: str | None,
    results: Results,
    budget: float | None,
    dry_run: bool,
    *,
    retry: bool,
    until_settled: bool,
    from_scratch: bool,
) -> None:
    from sparseinst.launch import arrange
    from sparseinst.launch import submit as launcher
    from sparseinst.launch.status import plan_status
    from sparseinst.launch.submission import ask_queue

    if until_settled and (row is not None or seeds != 1):
        command = "retry" if retry else "launch"
        raise UserError(f"{command}: --until-settled chooses the seeds of all rows, so it allows no --seeds and no --row")
    cluster = read_cluster(name)
    if until_settled:
        looked = _plan_look(tables, cluster, profile, results, log=not dry_run and not retry)
        if looked is None:
            return
        plan, store = looked
    else:
        plan, store = make_plan(tables, profile, seeds, row, results, None, cluster=name, read_records=True)
    warn_about_overruled_rows(plan)
    check_budget(plan, store, budget)
    # Ask SLURM: the files alone show a job that an administrator removed as queued, so it would not be sent again.
    queue = ask_queue(JOBS) if cluster.kind == "slurm" and not dry_run else None
    selection = arrange.select(plan_status(plan, queue), retry=retry)
    warning = arrange.layout_warning(selection.runs, cluster)
    if warning is not None:
        typer.echo(f"warning: {warning}", err=True)
    arrays = arrange.arrange(selection.runs, cluster, 1000 if dry_run else launcher.largest_array(cluster))
    if dry_run:
        for array in arrays:
            print(launcher.sbatch_text(array, cluster, SNAPSHOTS / "<copy of the code>"))
    else:
        launcher.launch(plan, arrays, store, cluster, name, from_scratch=from_scratch)
    print(f"{len(plan.done)} of {len(plan.runs)} runs are done; {'would send' if dry_run else 'sent'} {len(selection.runs)}:")
    for line in arrange.describe_arrays(arrays, cluster):
        print(f"  {line}")
    if selection.active:
        print(f"  {selection.active} are already queued or running")
    if selection.to_retry:
        print(f"  {selection.to_retry} failed, were lost or were cancelled; `sparseinst retry` sends them again")


def _plan_look(names: list[str], cluster: Cluster, profile: str, results: Path, *, log: bool) -> tuple[Plan, Store] | None:
    """Look at tables whose runs are done, print what is settled, and plan the next look. None if all tables are finished."""
    from sparseinst.ablation.study import all_tables, read_profile, read_tables
    from sparseinst.launch.settle import advance, plan_looks, show_looks

    tables, scale, store = read_tables(names), read_profile(profile), Store(results)
    device = None if cluster.gpus else "cpu"
    wanted = advance(tables, all_tables(), scale, store, device, cluster.device, log=log)
    show_looks(tables, scale, store)
    return (plan_looks(tables, wanted, scale, store, device, cluster.device), store) if wanted else None


@app.command()
def cancel(
    runs: Annotated[list[str], typer.Argument(metavar="RUN ...", help="Run keys, beginnings of keys, or parts of row names.")],
    profile: ProfileName = "coco",
    seeds: Seeds = 1,
    results: Results = RESULTS,
    cluster: TimingCluster = None,
) -> None:
    """Cancel runs on their cluster. The runs that wait for them are cancelled, too."""
    from sparseinst.launch import submit as launcher
    from sparseinst.launch.status import find_runs

    plan, _ = make_plan(None, profile, seeds, None, results, None, cluster=cluster)
    wanted = {run.key: run for text in runs for run in find_runs(text, plan)}
    jobs = launcher.cancel(list(wanted.values()), plan)
    print(f"cancelled {len(jobs)} {'job' if len(jobs) == 1 else 'jobs'}: {', '.join(jobs)}")
