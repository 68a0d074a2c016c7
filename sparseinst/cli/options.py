"""Options that several commands share, and functions that use them."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparseinst.ablation.store import Store
from sparseinst.ablation.study import SEEDS, read_profile, read_tables
from sparseinst.config import OptimizeMode
from sparseinst.errors import UserError
from sparseinst.files import check_is_file
from sparseinst.paths import SHIPPED_MODELS

if TYPE_CHECKING:
    from sparseinst.ablation.plan import Costs, Plan
    from sparseinst.ablation.study import Profile


Overrides = Annotated[
    list[str],
    typer.Option(
        "-o", "--override", metavar="KEY=VALUE", help="Change a setting, given by its path; repeat the option for more."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")]
Weights = Annotated[Path, typer.Option(help="A weights file, or the folder of a run, which may be unfinished.")]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        metavar="last|best|STEP",
        help="The weights of a run. last (default): the final weights, or the newest checkpoint of an unfinished run; best: the "
        "weights with the best AP during training; STEP: the checkpoint after this step.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]

_TABLES = "table1 ... table8, figure1, the path of a spec, or all."
Tables = Annotated[list[str] | None, typer.Argument(metavar="[TABLE ...]", help=_TABLES)]
TableNames = Annotated[list[str], typer.Argument(metavar="TABLE ...", help=_TABLES)]
ProfileName = Annotated[str, typer.Option("--profile", help="The scale: a file in experiments/profiles, by name or path.")]
Seeds = Annotated[int, typer.Option(min=1, max=len(SEEDS), help="Train every row with this many seeds, starting at 0.")]
RowText = Annotated[
    str | None, typer.Option("--row", help="Use only the row of this name, or the rows whose name contains this text.")
]
Results = Annotated[Path, typer.Option(help="Folder of the records, tables and figures.")]
TimingCluster = Annotated[
    str | None, typer.Option("--cluster", help="Use the timings on this cluster's device instead of this machine's.")
]
Optimize = Annotated[
    OptimizeMode | None,
    typer.Option(help="Optimise the model first; compiling takes up to minutes, on a CPU only at the first start."),
]
EngineChoice = Annotated[
    str | None,
    typer.Option(
        metavar="torch|onnxruntime|openvino",
        help="The library that runs the network. onnxruntime and openvino need the extras of the same names.  [default: torch]",
    ),
]
NetworkPrecisionChoice = Annotated[
    str | None,
    typer.Option(
        metavar="fp32|tf32|bf16|fp16|int8",
        help="The number format in which the network computes.  [default: inference.precision of the weights]",
    ),
]
Record = Annotated[bool, typer.Option("--record", help="Record a peer's metrics for the speed-accuracy plot.")]
FromScratch = Annotated[
    bool,
    typer.Option(
        "--from-scratch",
        help="If all checkpoints of a training are damaged, train again from step 0. Without this option, the training fails.",
    ),
]


def finite(value: float | None) -> float | None:
    """Refuse NaN, which typer's limits let through."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


Budget = Annotated[
    float | None,
    typer.Option(min=0.0, callback=finite, help="Start nothing if the remaining runs cost more hours than this."),
]
UntilSettled = Annotated[
    bool,
    typer.Option(
        "--until-settled",
        help="Replaces --seeds: add seeds to each row until its comparison with the reference row has a verdict, or has little "
        "chance of one. With --budget, a look whose estimated cost exceeds what is left of the budget is not started.",
    ),
]


def check_paths(*, weights: Path | None = None, data: Path | None = None) -> None:
    """Refuse weights or a folder of data that do not exist. Commands call this before they import torch, which takes seconds."""
    if weights is not None and str(weights) not in SHIPPED_MODELS and not weights.is_dir():
        check_is_file(weights)
    if data is not None and not data.is_dir():
        raise UserError(f"{data}: {'a folder was expected, and this is a file' if data.exists() else 'no such folder'}")


def engine_overrides(engine: str | None, precision: str | None) -> dict[str, str]:
    """Return the options --engine and --precision as overrides. Raises `UserError` if there is no such engine."""
    if engine in ("hotcoco", "pycocotools"):
        raise UserError(f"--engine chooses what runs the network; {engine} computes the metrics: use --evaluator {engine}")
    found: dict[str, str] = {}
    if engine is not None:
        from sparseinst.engines.names import check_engine

        found["inference.engine"] = check_engine(engine)
    if precision is not None:
        found["inference.precision"] = precision
    return found


def make_plan(
    tables: list[str] | None,
    profile: str,
    seeds: int,
    row: str | None,
    results: Path,
    device: str | None,
    *,
    cluster: str | None = None,
    read_records: bool = False,
) -> tuple[Plan, Store]:
    """Return the plan that the options ask for, and its store of records.

    Args:
        read_records: read the records of all stages that are done. A damaged record is renamed, and its stage counts as not done.

    Raises:
        UserError: an option is not valid.
    """
    from sparseinst.ablation import plan
    from sparseinst.launch.cluster import read_cluster

    target = read_cluster(cluster) if cluster is not None else None
    if target is not None and not target.gpus:
        device = "cpu"

    store = Store(results)
    planned = partial(
        plan.make_plan,
        read_tables(tables or []),
        read_profile(profile),
        store,
        seeds=range(seeds),
        row=row,
        device=device,
        name=target.device if target is not None else None,
    )
    table_plan = planned()
    if read_records and None in [store.load(key) for key in table_plan.done]:
        table_plan = planned()
    return table_plan, store


def check_costs_are_known(cost: Costs, profile: Profile) -> None:
    """Raise `UserError` if there is nothing to estimate the cost of a profile's runs from."""
    if not cost.hours:
        raise UserError(f"profile {profile.name!r} states no cost and nothing is recorded yet, so --budget cannot be checked")


def check_budget(plan: Plan, store: Store, budget: float | None) -> None:
    """Raise `UserError` if the remaining runs of the plan cost more hours than the budget."""
    from sparseinst.ablation.plan import costs

    if budget is None:
        return
    cost = costs(plan, store)
    check_costs_are_known(cost, plan.profile)
    hours = cost.of(plan.to_do())
    if hours > budget:
        raise UserError(f"the plan costs about {hours:,.1f} {cost.unit}, over the budget of {budget:,g}: nothing was started")


def warn_about_overruled_rows(plan: Plan) -> None:
    """Print a warning for each setting that the profile and some rows set: the profile's value replaces the rows' values."""
    from sparseinst.ablation.study import overruled

    for table in {planned.table.name: planned.table for planned in plan.rows}.values():
        for path, rows in overruled(table.spec, plan.profile).items():
            names = ", ".join(map(repr, rows))
            text = f"{table.name}: profile {plan.profile.name} sets {path}, so the values in these rows have no effect: {names}"
            print(text, file=sys.stderr)
