"""The command `retire`, and the notes of `plan` and `run` about results that it can set aside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sparseinst.ablation.store import RESULTS
from sparseinst.cli.options import Device, ProfileName, Results, RowText, Seeds, Tables, TimingCluster, make_plan
from sparseinst.errors import UserError
from sparseinst.paths import RETIRED
from sparseinst.words import counted

if TYPE_CHECKING:
    from sparseinst.ablation.plan import Plan
    from sparseinst.ablation.store import Record, Store

app = typer.Typer()


@app.command()
def retire(
    tables: Tables = None,
    profile: ProfileName = "coco",
    seeds: Seeds = 1,
    row: RowText = None,
    results: Results = RESULTS,
    device: Device = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="train|evaluate|latency",
            help="Only these stages; repeat the option for more. A training takes its evaluations with it.  [default: all three]",
        ),
    ] = None,
    other_code: Annotated[
        bool, typer.Option("--other-code", help="Only what code with other uncommitted changes measured.")
    ] = False,
    unused: Annotated[
        bool,
        typer.Option(
            "--unused",
            help="List the records of the profile that no row of any table needs, or with --yes, set them aside. TABLE names "
            "specs outside experiments/ whose records are needed, too.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --unused: set the records aside.")] = False,
    cluster: TimingCluster = None,
) -> None:
    """Set results aside, so that `run` measures them again.

    This is needed after a change of the code. Nothing is deleted: a record is renamed to KEY.retired, and the run's folder moves
    to runs/retired. Rows of other tables that share a run lose its result, too. Pretrainings stay.
    """
    from sparseinst.ablation.plan import by_other_code
    from sparseinst.launch.retire import retire as set_aside
    from sparseinst.launch.status import plan_status

    if not unused and not tables:
        raise UserError("retire: name the tables, or give --unused for the records that no row needs")
    if unused and (row is not None or stage or other_code or seeds != 1):
        raise UserError("retire: --unused takes all such records of a profile, so it allows no other choice")
    table_plan, store = make_plan(tables, profile, seeds, row, results, device, cluster=cluster)
    if unused:
        records = _unused(table_plan, store)
        if not yes:
            print("\n".join(map(_name_of, records)))
            print(f"no row needs {counted(len(records), 'record')}; name the specs to keep, or add --yes to set them aside")
            return
        keys = [record.key for record in records]
    else:
        stages = set(stage or ("train", "evaluate", "latency"))
        if unknown := stages - {"train", "evaluate", "latency"}:
            raise UserError(f"retire: --stage: {sorted(unknown)[0]!r}: choose train, evaluate or latency")
        chosen = by_other_code(table_plan, store) if other_code else [*table_plan.runs.values()]
        keys = [run.key for run in chosen if run.stage in stages]
    busy = {status.run.key for status in plan_status(table_plan) if status.state in ("queued", "running")}
    retired = set_aside(keys, store, busy)
    if not retired:
        raise UserError("retire: no such run has a record or a folder, so nothing was set aside")
    print(f"{counted(len(retired), 'run')} set aside: records as {store.folder}/*.retired, folders in {RETIRED}")


def print_notes(table_plan: Plan, store: Store) -> None:
    """Print what a user may not expect of the records: that other code made them, or that no row needs them."""
    print_other_code(table_plan, store)
    try:
        unused = _unused(table_plan, store)
    except UserError as error:  # another table's draft must not hide this plan
        print(f"note: records that no row needs cannot be listed ({error})")
        return
    if unused:
        print(
            f"note: no row needs {counted(len(unused), 'record')} of profile {table_plan.profile.name} (the newest is "
            f"{_name_of(unused[-1])}). They belong to a spec that is not in experiments/, or a row was changed or removed, or a "
            "setting was added without `Neutral` (docs/structure.md). "
            f"`sparseinst retire --unused --profile {table_plan.profile.name}` lists them"
        )


def print_other_code(table_plan: Plan, store: Store) -> None:
    from sparseinst.ablation.plan import by_other_code

    if others := by_other_code(table_plan, store):
        print(
            f"note: {len(others)} of {len(table_plan.done)} results come from code that differs from the present code by "
            "uncommitted changes. If these can change a result, set them aside, `sparseinst retire TABLE --other-code`, and run "
            "again"
        )


def _unused(table_plan: Plan, store: Store) -> list[Record]:
    """Return the records of the plan's profile that no row needs, in this profile or another one, the newest last."""
    from sparseinst.ablation.plan import unused_records
    from sparseinst.ablation.study import all_tables, list_profiles, read_profile

    tables = {table.name: table for table in (*all_tables(), *(planned.table for planned in table_plan.rows))}
    unused = unused_records(list(tables.values()), table_plan.profile, store)
    for name in list_profiles() if unused else ():  # profiles can share runs
        kept = {record.key for record in unused}
        needed = kept - {r.key for r in unused_records(list(tables.values()), read_profile(name), store, kept)}
        unused = [record for record in unused if record.key not in needed]
    return sorted(unused, key=lambda record: record.provenance.get("ended", ""))


def _name_of(record: Record) -> str:
    """Return the kind and the key of a record, with the name of its run if it was made here."""
    from sparseinst.paths import run_folder

    paths = run_folder(record.key)
    return f"{record.kind} {record.key}" + (f", {paths.read_name()}" if paths.name.exists() else "")
