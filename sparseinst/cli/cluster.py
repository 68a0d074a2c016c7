"""Commands for a cluster: launch, retry, cancel."""

from __future__ import annotations

from typing import Annotated

import typer

from sparseinst.ablation.cluster import read_cluster
from sparseinst.ablation.store import RESULTS
from sparseinst.cli.options import (
    Budget,
    OfCluster,
    ProfileName,
    Results,
    RowText,
    Seeds,
    TableNames,
    make_plan,
    tell_overruled,
    within_budget,
)

app = typer.Typer()

ClusterName = Annotated[str, typer.Option("--cluster", help="Where to: a file in slurm/, by name or path.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the batch scripts; send nothing.")]


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
) -> None:
    """Send what the tables still need to a cluster; what is done, or there already, is not sent again."""
    _send(tables, cluster, profile, seeds, row, results, budget, dry_run, retry=False)


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
) -> None:
    """Send again what failed, was lost or was cancelled; a training goes on from its last checkpoint."""
    _send(tables, cluster, profile, seeds, row, results, budget, dry_run, retry=True)


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
) -> None:
    from sparseinst.ablation import arrange
    from sparseinst.ablation import launch as launcher
    from sparseinst.ablation.status import plan_status
    from sparseinst.ablation.submission import ask_queue

    cluster = read_cluster(name)
    plan, store = make_plan(tables, profile, seeds, row, results, None, cluster=name)
    tell_overruled(plan)
    within_budget(plan, store, budget)
    # What the files say of a job that an administrator removed would keep it from being sent.
    queue = ask_queue(launcher.JOBS) if cluster.kind == "slurm" and not dry_run else None
    selection = arrange.select(plan_status(plan, queue), retry=retry)
    warning = arrange.layout_warning(selection.runs, cluster)
    if warning is not None:
        typer.echo(f"warning: {warning}", err=True)
    arrays = arrange.arrange(selection.runs, cluster, 1000 if dry_run else launcher.largest_array(cluster))
    if dry_run:
        for array in arrays:
            print(launcher.sbatch_text(array, cluster, launcher.SNAPSHOTS / "<the code as it is now>"))
    else:
        launcher.launch(plan, arrays, store, cluster, name)
    print(f"{len(plan.done)} of {len(plan.runs)} runs are done; {'would send' if dry_run else 'sent'} {len(selection.runs)}:")
    for line in arrange.describe_arrays(arrays, cluster):
        print(f"  {line}")
    if selection.held:
        print(f"  {selection.held} are queued or running already")
    if selection.again:
        print(f"  {selection.again} failed, were lost or cancelled: `sparseinst retry` sends them again")


@app.command()
def cancel(
    runs: Annotated[list[str], typer.Argument(metavar="RUN ...", help="Keys, their beginnings, or parts of rows' names.")],
    profile: ProfileName = "coco",
    seeds: Seeds = 1,
    results: Results = RESULTS,
    cluster: OfCluster = None,
) -> None:
    """Take runs off their cluster, with the evaluations that wait for them."""
    from sparseinst.ablation import launch as launcher
    from sparseinst.ablation.status import find_runs

    plan, _ = make_plan(None, profile, seeds, None, results, None, cluster=cluster)
    wanted = {run.key: run for text in runs for run in find_runs(text, plan)}
    jobs = launcher.cancel(list(wanted.values()), plan)
    print(f"cancelled {len(jobs)} {'job' if len(jobs) == 1 else 'jobs'}: {', '.join(jobs)}")
