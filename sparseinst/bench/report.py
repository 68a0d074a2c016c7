"""Print and write the results of `bench`."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparseinst.bench.rows import Setting
from sparseinst.bench.timed import MODULES
from sparseinst.config import MODELS
from sparseinst.files import atomic
from sparseinst.training.step import PHASES

_SETTING = tuple(field.name for field in fields(Setting))


def report_results(results: dict[str, Any], output: Path | None, *, as_json: bool) -> None:
    """Print the results as a table or as JSON.

    Args:
        results: the machine, and either `rows` or `compare`, as `measure_request` returns them.
        output: also write the JSON to this file.
    """
    write_json(results, output, as_json=as_json)
    if as_json:
        return
    if "compare" in results:
        _print_comparison(results)
    else:
        _print_rows(results)


def write_json(results: dict[str, Any], output: Path | None, *, as_json: bool) -> None:
    """Write the results to the file `output`, unless it is None, and print them if `as_json` is set."""
    if output is not None:
        with atomic(output) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(results))


def _print_rows(results: dict[str, Any]) -> None:
    rows, train = results["rows"], results["rows"][0]["train"]
    Console(width=max(Console().width, 220)).print(_latency_table(rows, train, results["device"]))
    for row in rows:
        if row.get("roofline"):
            _print_roofline(row)
    print("sum: each module is synchronised separately. Synchronisation overhead: the sum minus the median.")
    if train:
        print("GFLOPs count one forward pass of one image. The weights do not change, so every step does the same work.")
        print("plain downsamples the masks in the step; the other modes get downsampled masks. Sizes are not jittered.")
    elif any(row["model"] in MODELS for row in rows):
        print("Models by name have random weights, which keep every map: this is the slowest case.")
    for row in rows:
        _print_warnings(row)


def _latency_table(rows: list[dict[str, Any]], train: bool, device: str) -> Table:
    """Return the table of medians, percentiles and modules, in milliseconds."""
    modules: tuple[str, ...] = PHASES if train else MODULES
    if any("network" in row["modules_ms"] for row in rows):
        modules = (*modules, "network")
    table = Table(title=f"milliseconds per {'training step' if train else 'batch'} on {device}", title_justify="left")
    for column in (*_SETTING, "median", "p5", "p95", "images/s", *modules, "sum", "GFLOPs", "M parameters", "MB"):
        table.add_column(column)
    for row in rows:
        whole, parts = row["whole_ms"], row["modules_ms"]
        table.add_row(
            *(str(row[name]) for name in _SETTING),
            *(f"{whole[name]:.1f}" for name in ("median", "p5", "p95")),
            f"{row['images_per_second']:.3g}",
            *(f"{parts[name]:.1f}" if name in parts else "" for name in modules),
            f"{sum(parts.values()):.1f}" if parts else "",
            f"{row['flops'] / 1e9:.1f}" if row["flops"] else "",
            f"{row['parameters'] / 1e6:.1f}",
            str(row["peak_memory_mb"] or ""),
        )
    return table


def _print_roofline(row: dict[str, Any]) -> None:
    bound = row["roofline"]
    rates = f"{bound['peak']['flops'] / 1e12:.2f} TFLOP/s and {bound['peak']['bytes'] / 1e9:.0f} GB/s measured"
    print(
        f"{_setting_of(row)}: the network alone, operator by operator, takes at least {bound['bound_ms']:.1f} ms, "
        f"{bound['share']:.0%} of the median ({bound['bytes'] / 1e9:.2f} GB of memory traffic; {rates})"
    )


def _print_warnings(row: dict[str, Any]) -> None:
    """Print a line if the times drifted by more than 5 %, and the GPU's clocks if they are known."""
    if not 0.95 < row["drift"] < 1.05:
        causes = "throttling, other work on the machine, or too short a warm-up"
        print(f"{_setting_of(row)}: the last third took {row['drift']:.2f} x the time of the first: not steady ({causes})")
    if row["clocks"]:
        print(f"clocks before | after: {row['clocks']}")


def _setting_of(row: dict[str, Any]) -> Setting:
    return Setting(**{name: row[name] for name in _SETTING})


def _print_comparison(results: dict[str, Any]) -> None:
    comparison = results["compare"]
    for side in ("first", "second"):
        times = comparison[f"{side}_ms"]
        print(f"{Setting(**comparison[side])}: {times['median']:.1f} ms ({times['p5']:.1f} to {times['p95']:.1f})")
    ratio, pairs = comparison["ratio"], comparison["repetitions"]
    print(f"ratio {ratio['median']:.2f} (p5 {ratio['p5']:.2f}, p95 {ratio['p95']:.2f}) over {pairs} pairs of runs")
    print(f"on {results['device']}")
