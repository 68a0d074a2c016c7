"""Options that several commands share, and what they do with them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sparseinst.ablation.store import Store
from sparseinst.ablation.study import read_profile, read_tables
from sparseinst.errors import UserError

if TYPE_CHECKING:
    from sparseinst.ablation.plan import Plan

Overrides = Annotated[
    list[str], typer.Option("-o", "--override", metavar="KEY=VALUE", help="A setting by its path; repeat for more.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU where there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]

_TABLES = "table1 ... table8, figure1, a spec, or all."
Tables = Annotated[list[str] | None, typer.Argument(metavar="[TABLE ...]", help=_TABLES)]
TableNames = Annotated[list[str], typer.Argument(metavar="TABLE ...", help=_TABLES)]
ProfileName = Annotated[str, typer.Option("--profile", help="The scale: a file in experiments/profiles, by name or path.")]
Seeds = Annotated[int, typer.Option(min=1, max=10, help="Train every row with this many seeds, from 0 on.")]
RowText = Annotated[str | None, typer.Option("--row", help="Only the rows whose name holds this text.")]
Results = Annotated[Path, typer.Option(help="Where records, tables and figures are kept.")]
OfCluster = Annotated[str | None, typer.Option("--cluster", help="Timings are those of this cluster's device.")]
Optimize = Annotated[
    Literal["folded", "compiled", "graph", "best"] | None,
    typer.Option(help="Make the model fast first; compiling takes from seconds (compiled) to minutes (best)."),
]
Record = Annotated[bool, typer.Option("--record", help="Keep a peer's figures in the records, for the speed-accuracy plot.")]
Budget = Annotated[float | None, typer.Option(help="Refuse to start where the rest of the plan costs more hours than this.")]


def make_plan(
    tables: list[str] | None,
    profile: str,
    seeds: int,
    row: str | None,
    results: Path,
    device: str | None,
    *,
    cluster: str | None = None,
) -> tuple[Plan, Store]:
    """The plan that the options ask for, and the store it looks into. Raises `UserError`."""
    from sparseinst.ablation import plan
    from sparseinst.ablation.cluster import read_cluster

    there = read_cluster(cluster) if cluster is not None else None
    if there is not None and not there.gpus:
        device = "cpu"

    store = Store(results)
    made = plan.make_plan(
        read_tables(tables or []),
        read_profile(profile),
        store,
        seeds=range(seeds),
        row=row,
        device=device,
        name=there.device if there is not None else None,
    )
    return made, store


def within_budget(plan: Plan, store: Store, budget: float | None) -> None:
    """Raises `UserError` where what is left of the plan costs more."""
    from sparseinst.ablation.plan import costs

    if budget is None:
        return
    cost = costs(plan, store)
    if not cost.hours:
        raise UserError(f"profile {plan.profile.name!r} states no cost and nothing is recorded yet: --budget cannot be kept")
    hours = cost.of(plan.to_do())
    if hours > budget:
        raise UserError(f"the plan costs about {hours:.1f} {cost.unit}, over the budget of {budget:g}: nothing was started")


def tell_overruled(plan: Plan) -> None:
    """Say it where a profile sets what rows set: their values have no effect then."""
    from sparseinst.ablation.study import overruled

    for table in {planned.table.name: planned.table for planned in plan.rows}.values():
        for path, rows in overruled(table.spec, plan.profile).items():
            names = ", ".join(map(repr, rows))
            text = f"{table.name}: profile {plan.profile.name} sets {path} itself, so what these rows set has no effect: {names}"
            print(text, file=sys.stderr)
