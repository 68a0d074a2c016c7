"""Print the metrics of the activation maps on the terminal."""

from __future__ import annotations

from collections.abc import Mapping


def print_mechanism(metrics: Mapping[str, float | None]) -> None:
    """Print the metrics of `evaluation.mechanism` as sentences."""

    def share(name: str) -> str:
        value = metrics.get(name)
        return f"{100 * value:.0f} %" if value is not None else "-"

    lift, duplicates = metrics.get("lift"), metrics.get("duplicates")
    print("Do the activation maps highlight their objects?")
    print(f"  mass of a map: {share('own')} on its own object", end="")
    print(f" ({lift:.1f} times the object's share of the area)" if lift is not None else "", end="")
    print(f", {share('others')} on others, {share('background')} on neither; {share('border')} on the border")
    print(f"  {share('prefers_own')} of the maps respond most to their own object (chance: {share('chance')})", end="")
    print(f", {share('peak_on_own')} have their peak on it")
    print(f"  pairs of touching objects of one category with both found: {share('neighbours_recall')}", end="")
    print(f"; confident duplicates per found object: {duplicates:.2f}" if duplicates is not None else "")
