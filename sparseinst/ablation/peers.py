"""Records of other systems that were measured here, for the speed-accuracy plots. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    """Write the result of a measurement; it replaces an earlier one.

    Args:
        result: `figures` from an evaluation, or `whole_ms` from a timing.
        profile: the profile's name.
        device: the name of the device.
        seconds: wall time of the measurement.
        data: hash of the annotation file of an evaluation.

    Returns:
        The record's key.
    """
    kind = "evaluate" if "figures" in result else "latency"
    where = data if kind == "evaluate" else device
    key = PREFIX + content_hash({"peer": name, "short_side": short_side, "kind": kind, "where": where, "profile": profile})
    about = describe(profile=profile, device=device, world_size=1, attempts=1, seed=0, seconds=seconds, data=data)
    store.path(key).unlink(missing_ok=True)
    store.write(Record("peer", key, {"peer": name, "short_side": short_side, **result}, provenance=about))
    return key


def find_peers(store: Store, names: Iterable[str], profile: str, keys: set[str]) -> list[PeerResult]:
    """Return the recorded results of these systems in a profile, ordered by name as given and by input size.

    Args:
        keys: the keys of all records.
    """
    wanted = list(names)
    results: dict[tuple[str, int], PeerResult] = {}
    for key in sorted(key for key in keys if key.startswith(PREFIX)) if wanted else []:
        record = store.load(key)
        if record is None or record.provenance.get("profile") != profile or record.result["peer"] not in wanted:
            continue
        name, side = record.result["peer"], record.result["short_side"]
        entry = results.setdefault((name, side), PeerResult(name, side))
        if "whole_ms" in record.result:
            entry.whole_ms[record.provenance.get("device", "unknown device")] = record.result["whole_ms"]["median"]
        entry.figures |= record.result.get("figures", {})
    return sorted(results.values(), key=lambda entry: (wanted.index(entry.name), entry.short_side))
