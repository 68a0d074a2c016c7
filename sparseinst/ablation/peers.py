"""Records of other systems that were measured here, for the speed-accuracy plots. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparseinst.ablation.provenance import describe
from sparseinst.ablation.store import Record, Store
from sparseinst.section import content_hash

PREFIX = "peer-"


@dataclass
class PeerResult:
    """The recorded results of one system at one input size."""

    name: str
    short_side: int
    figures: dict[str, float | None] = field(default_factory=dict)
    """COCO mask metrics in percent, if it was evaluated."""
    whole_ms: dict[str, float] = field(default_factory=dict)
    """The median in milliseconds, by device, if it was timed."""


def keep_peer(
    store: Store, name: str, short_side: int, result: Mapping[str, Any], *, profile: str, device: str, seconds: float,
    data: str | None = None,
) -> str:  # fmt: skip
    """Write the result of a measurement; it replaces an earlier one of the same system, size, profile and data or device.

    Args:
        result: `figures` and `images`, their number, from an evaluation, or `whole_ms` from a timing in torch and fp32.
        profile: the profile's name.
        device: the name of the device.
        seconds: wall time of the measurement.
        data: hash of the annotation file of an evaluation.

    Returns:
        The record's key.
    """
    kind = "evaluate" if "figures" in result else "latency"
    where = [data, result["images"]] if kind == "evaluate" else device
    key = PREFIX + content_hash({"peer": name, "short_side": short_side, "kind": kind, "where": where, "profile": profile})
    about = describe(profile=profile, device=device, world_size=1, attempts=1, seed=0, seconds=seconds, data=data)
    store.write(Record("peer", key, {"peer": name, "short_side": short_side, **result}, provenance=about), again=True)
    return key


Evaluated = tuple[str | None, int | None]
"""What was evaluated: the hash of the annotation file, and the number of its images."""


def find_peers(
    store: Store, names: Iterable[str], profile: str, keys: set[str], evaluated_on: Collection[Evaluated] = ()
) -> list[PeerResult]:
    """Return the recorded results of these systems in a profile, ordered by name as given and by input size.

    Args:
        keys: the keys of all records.
        evaluated_on: what our models were evaluated on; evaluations on anything else are left out. If it is empty, the newest
            evaluation of each system counts.
    """
    wanted = list(names)
    results: dict[tuple[str, int], PeerResult] = {}
    loaded = [store.load(key) for key in sorted(keys) if key.startswith(PREFIX)] if wanted else []
    for record in sorted((r for r in loaded if r is not None), key=lambda record: record.provenance.get("ended", "")):
        if record.provenance.get("profile") != profile or record.result["peer"] not in wanted:
            continue
        name, side = record.result["peer"], record.result["short_side"]
        entry = results.setdefault((name, side), PeerResult(name, side))
        if "whole_ms" in record.result:
            entry.whole_ms[record.provenance.get("device", "unknown device")] = record.result["whole_ms"]["median"]
        elif not evaluated_on or (record.provenance.get("data"), record.result.get("images")) in evaluated_on:
            entry.figures = record.result["figures"]
    return sorted(results.values(), key=lambda entry: (wanted.index(entry.name), entry.short_side))
