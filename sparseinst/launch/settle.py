"""Train seeds until the comparisons of tables are settled. Imports no torch.

Any number of processes may work on the same tables. All of them make the same decision from the same records, and the first one
logs it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparseinst.ablation.looks import last_decisions, look_name, make_look, other_looks, read_looks, write_look
from sparseinst.ablation.plan import Plan, make_plan
from sparseinst.ablation.sequential import LOOKS, Decision, decide, next_seeds
from sparseinst.ablation.store import Store
from sparseinst.ablation.study import Profile, Row, Table, read_profile, read_tables, row_config
from sparseinst.errors import UserError
from sparseinst.files import atomic, read_text
from sparseinst.paths import look_of_process
from sparseinst.report.collect import TableResult, collect, compared_rows, typical_noises
from sparseinst.words import counted

_log = logging.getLogger(__name__)

Wanted = dict[str, dict[str, int]]
"""The number of seeds that each row needs for the current look, by table and row."""


def advance(
    tables: Sequence[Table],
    others: Sequence[Table],
    profile: Profile,
    store: Store,
    device: str | None,
    name: str | None = None,
    *,
    log: bool = True,
) -> Wanted:
    """Look at every table whose runs of the current look are done, and return the seeds that the next looks need.

    Args:
        others: further tables, whose rows also count for the typical noise over seeds.
        device, name: as in `make_plan`.
        log: write the looks to the log. If not, only return what the looks would need.

    Returns:
        For each table that is not finished, the number of seeds that each row needs.

    Raises:
        UserError: a table has no reference row with an AP, or its evaluations cannot be compared.
    """
    wanted: Wanted = {}
    for table in tables:
        names = _names(table, profile)
        looks = read_looks(store.results, look_name(table, profile))
        while len(looks) < len(LOOKS):
            number = len(looks)
            seeds = next_seeds(names, last_decisions(looks), number, str(table.spec.reference))
            if not seeds:
                break
            if plan_looks([table], {table.name: seeds}, profile, store, device, name).to_do():
                wanted[table.name] = seeds
                break
            result = collect(table, profile, store, {}, typical_noises([*tables, *others], profile, store, store.keys()))
            decisions = _decide(result, names, number)
            # A row can have more records than the look asked for, and its decision is made from all of them.
            held = {row.row.name: len(row.evaluations) for row in result.rows if row.row.name in seeds}
            look = make_look(number, held, {row: decisions[row] for row in names if row in seeds})
            if log and not looks and (earlier := other_looks(store.results, table, profile)):
                _log.warning(
                    "%s: earlier looks at this table (%s) belong to other settings or another design; the verdicts do not "
                    "account for them",
                    table.name,
                    ", ".join(map(str, earlier)),
                )
            looks.append(write_look(store.results, look_name(table, profile), look) if log else look)
    return wanted


def _names(table: Table, profile: Profile) -> list[str]:
    """Return the rows that are compared with the reference row. Of rows with the same evaluation, only the first counts."""
    spec = table.spec
    if spec.reference is None or "evaluate" not in spec.stages() or "AP" not in spec.figures:
        raise UserError(f"{table.name}: has no reference row with an AP, so no comparison can be settled")
    keys: dict[str, str] = {}
    for row in sorted(spec.rows, key=lambda row: row.name != spec.reference):
        keys.setdefault(row_config(spec, row, profile).evaluate_key(), row.name)
    return [row.name for row in spec.rows if row.name in keys.values() and row.name != spec.reference]


def _decide(result: TableResult, names: Sequence[str], number: int) -> dict[str, Decision]:
    """Return the decision about each row. A row without a comparison, such as a collapsed one, gets no more seeds.

    Raises:
        UserError: a row was evaluated on other images than the reference row. A look never changes, so it must not decide about
            such a row.
    """
    found = decide(compared_rows(result), number)
    for row in result.rows:
        if row.row.name in names and row.other_images:
            raise UserError(
                f"{result.table.name}: the row '{row.row.name}' was evaluated on other images than the reference row "
                f"'{result.table.spec.reference}': remove the records of the outdated evaluations (of this row: "
                f"{', '.join(row.evaluations)}), and run this command again"
            )
    return {name: found.get(name, Decision("futile", "undecided", 0.0)) for name in names}


def plan_looks(
    tables: Sequence[Table], wanted: Wanted, profile: Profile, store: Store, device: str | None, name: str | None = None
) -> Plan:
    """Plan the runs for the seeds in `wanted`. `device` and `name` are as in `make_plan`."""
    chosen = [table for table in tables if table.name in wanted]

    def seeds_of(table: Table, row: Row) -> Sequence[int]:
        return range(wanted[table.name].get(row.name, 0))

    return make_plan(chosen, profile, store, seeds=seeds_of, device=device, name=name)


@contextmanager
def wanted_file(wanted: Wanted) -> Iterator[Path]:
    """Write the seeds of one look to a file for other processes of this machine. Remove the file after the block."""
    file = look_of_process(os.getpid())
    with atomic(file) as temporary:
        temporary.write_text(json.dumps(wanted), encoding="utf-8")
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def plan_wanted(file: Path, names: Sequence[str], profile: str, store: Store, device: str | None) -> Plan:
    """Plan the runs of the look whose seeds `wanted_file` wrote to a file."""
    return plan_looks(read_tables(names), json.loads(read_text(file)), read_profile(profile), store, device)


@dataclass(frozen=True)
class LookState:
    """What the looks at a table have settled, and what comes next."""

    table: str
    looks: int
    """The number of looks so far."""
    seeds: dict[str, int]
    """The largest number of seeds of each row that a look took, the reference row included."""
    decisions: dict[str, Decision]
    """The newest decision about each row; the reference row has none."""
    following: dict[str, int]
    """The number of seeds that each row needs for the next look; empty if the table is finished."""

    def as_json(self) -> dict[str, Any]:
        return {
            "table": self.table,
            "looks": self.looks,
            "most_looks": len(LOOKS),
            "seeds": self.seeds,
            "rows": {row: asdict(decision) for row, decision in self.decisions.items()},
            "next": self.following,
        }

    def lines(self) -> list[str]:
        """Return lines for people."""
        lines = [f"{self.table}: {self.looks} of at most {len(LOOKS)} looks"]
        for row, seeds in self.seeds.items():
            decision = self.decisions[row].text if row in self.decisions else "the reference row"
            lines.append(f"  {row}: {counted(seeds, 'seed')}, {decision}")
        following = ", ".join(f"{row} to {seeds} seeds" for row, seeds in self.following.items())
        return [*lines, f"  next: {following}" if following else "  finished"]


def look_states(tables: Sequence[Table], profile: Profile, store: Store) -> list[LookState]:
    """Return the state of each table that was looked at."""
    states = []
    for table in tables:
        looks = read_looks(store.results, look_name(table, profile))
        if looks:
            decisions, reference = last_decisions(looks), str(table.spec.reference)
            more = len(looks) < len(LOOKS)
            following = next_seeds(_names(table, profile), decisions, len(looks), reference) if more else {}
            seeds = {row: max(look.seeds.get(row, 0) for look in looks) for row in (*decisions, reference)}
            states.append(LookState(table.name, len(looks), seeds, decisions, following))
    return states


def show_looks(tables: Sequence[Table], profile: Profile, store: Store) -> None:
    """Print what is settled in the tables that were looked at, and what comes next."""
    for state in look_states(tables, profile, store):
        print("\n".join(state.lines()))
