"""Log the looks at a table whose seeds are added until its comparisons are settled. Imports no torch.

Each look is one file that is never changed. The log shows how often a row was tested, so that its p-values can be
corrected for the repeated tests.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, with_config

from sparseinst.ablation.provenance import code_version
from sparseinst.ablation.sequential import BOUNDARIES, LEAST_POWER, LOOKS, LOWER_LEVELS, PENALTIES, Decision
from sparseinst.ablation.statistics import FALSE_DISCOVERIES, TEST
from sparseinst.ablation.study import Profile, Table, row_config
from sparseinst.checked import read_checked, with_checksum
from sparseinst.errors import UserError
from sparseinst.files import atomic
from sparseinst.section import content_hash


@with_config(ConfigDict(extra="forbid"))  # a damaged `checksum` is an unknown field
@dataclass(frozen=True)
class Look:
    """One look at the results of a table."""

    number: int
    """Counted from 0."""
    seeds: dict[str, int]
    """The number of seeds with a record of each row that took part, the reference row included."""
    decisions: dict[str, Decision]
    """What happened to each row that took part."""
    commit: str | None
    """The commit of the code that decided."""
    ended: str


def look_name(table: Table, profile: Profile) -> str:
    """Return the name of a table's log. It changes with every setting that changes a result or a verdict, and with the looks."""
    spec = table.spec
    rows = {row.name: row_config(spec, row, profile).evaluate_key() for row in spec.rows}
    paper = {row.name: row.paper.get("AP") for row in spec.rows}
    # The penalties follow from the boundaries, but their last digits may differ between machines.
    design = {"looks": LOOKS, "boundaries": BOUNDARIES, "level": FALSE_DISCOVERIES, "power": LEAST_POWER, "factor": LOWER_LEVELS}
    design["test"] = TEST
    identity = content_hash({"rows": rows, "paper": paper, "margin": spec.margin, "reference": spec.reference, **design})
    return f"{table.name}-{profile.name}-{identity[:8]}"


def look_file(results: Path, name: str, number: int) -> Path:
    """Return the file of a look. `name` comes from `look_name`."""
    return results / "looks" / f"{name}-{number + 1}.json"


def other_looks(results: Path, table: Table, profile: Profile) -> list[Path]:
    """Return the files of looks at a table that its verdicts do not account for, because the table or the design has changed."""
    own = look_name(table, profile)
    logged = sorted((results / "looks").glob(f"{escape(f'{table.name}-{profile.name}')}-????????-*.json"))
    return [file for file in logged if not file.name.startswith(f"{own}-")]


def read_looks(results: Path, name: str) -> list[Look]:
    """Return the looks at a table so far. Raises `UserError` if a file is damaged, or missing before a later one."""
    looks = []
    files = [look_file(results, name, number) for number in range(len(LOOKS))]
    count = max((number for number, file in enumerate(files, start=1) if file.exists()), default=0)
    for file in files[:count]:
        try:
            looks.append(TypeAdapter(Look).validate_python(read_checked(file.read_bytes())))
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"{file}: is damaged ({reason}); restore it, because verdicts depend on the number of looks"
            ) from None
    return looks


def make_look(number: int, seeds: Mapping[str, int], decisions: Mapping[str, Decision]) -> Look:
    """Return a look that ends now."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Look(number, dict(seeds), dict(decisions), code_version()["commit"], now)


def write_look(results: Path, name: str, look: Look) -> Look:
    """Log a look, unless another process has logged it, and return the look that is logged."""
    file = look_file(results, name, look.number)
    file.parent.mkdir(parents=True, exist_ok=True)
    own = file.with_name(f".{file.name}.{os.getpid()}.new")
    with atomic(own) as temporary:
        temporary.write_text(with_checksum(asdict(look)), encoding="utf-8")
    try:
        os.link(own, file)  # fails if the file exists, so that the first process wins
    except FileExistsError:
        return read_looks(results, name)[look.number]
    finally:
        own.unlink(missing_ok=True)
    return look


def last_decisions(looks: Sequence[Look]) -> dict[str, Decision]:
    """Return the newest decision about each row."""
    return {row: decision for look in looks for row, decision in look.decisions.items()}


def penalties(looks: Sequence[Look]) -> dict[str, float]:
    """Return the factor for the p-values of each row that was looked at.

    It is that of its newest look, so that a report settles nothing that the look left open. The first look tests nothing, and a
    row that then gets more seeds has the factor of the first test.
    """
    return {row: _penalty(look.number, decision) for look in looks for row, decision in look.decisions.items()}


def _penalty(number: int, decision: Decision) -> float:
    return PENALTIES[max(number, 1) if decision.kind == "more seeds" else number]
