"""Write made-up records: every row of every table has results, and the tests know their values."""

from pathlib import Path

from sparseinst.ablation.plan import stage_key
from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.study import read_profile, read_tables, row_config

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
TABLE5 = {"BCE alone": 19.7, "dice alone": 3.9, "dice + focal": 29.5, "dice + BCE": 33.5}
"""The AP of Table 5's rows. Other rows get the AP of the paper."""
DEVICE = "AMD EPYC"


def write_records(folder: Path, profile: str) -> Store:
    """Fill a results folder with records of all tables, with one seed for each row."""
    store, settings = Store(folder), read_profile(profile, EXPERIMENTS)
    about = {
        "device": DEVICE,
        "seed": 0,
        "profile": profile,
        "commit": "abcdef0123456789",
        "versions": {"torch": "9.9"},
        "data": "d1",
    }
    for table in read_tables(["table5", "all"], EXPERIMENTS):
        for row in table.spec.rows:
            config = row_config(table.spec, row, settings, 0)
            ap = TABLE5[row.name] if table.name == "table5" else row.paper.get("AP", 30.0)
            metrics = {"AP": ap, "AP50": ap + 20, "AP75": ap + 1, "APs": max(0.0, ap - 10), "APm": ap, "APl": ap + 10}
            resampled = {name: [value - 0.5, value, value + 0.5] for name, value in metrics.items()}
            results = {
                "train": {"steps": 1, "seconds": 1.0, "losses": {"loss": 1.0}, "parameters": 1},
                "evaluate": {
                    "figures": metrics,
                    "mechanism": {"prefers_own": 0.5, "own": 0.25},
                    "images": 4,
                    "resampled": resampled,
                },
                "latency": {
                    "whole_ms": {"median": 20.0, "p5": 19.0, "p95": 21.0},
                    "modules_ms": {"backbone": 10.0, "encoder": 3.0, "decoder": 5.0, "post": 2.0},
                },
            }
            for stage in table.spec.stages():
                key = stage_key(config, stage, DEVICE)
                store.write(Record(stage, key, results[stage], config.model_dump(mode="json"), about))
    return store
