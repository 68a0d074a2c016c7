"""Copy weights of runs into the package: the pretraining of a small backbone, or the model `demo`. Used before a release.

python -m sparseinst.publish.ship start KEY      copies a pretraining from runs/KEY, with its record in results/
python -m sparseinst.publish.ship demo RUN       copies the model in a run's folder, in half precision
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from sparseinst.ablation.store import Store
from sparseinst.errors import UserError
from sparseinst.files import atomic
from sparseinst.inference.weights import load_weights, save_weights
from sparseinst.paths import SHIPPED, run_folder


def ship_start(key: str) -> Path:
    """Copy the weights and the record of a pretraining into the package. Raises `UserError` if either is missing."""
    weights, record = run_folder(key).weights, Store().path(key)
    for path in (weights, record):
        if not path.exists():
            raise UserError(f"{path}: no such file")
    for file, suffix in ((record, "json"), (weights, "safetensors")):
        with atomic(SHIPPED / f"{key}.{suffix}") as temporary:
            shutil.copyfile(file, temporary)
    return SHIPPED / f"{key}.safetensors"


def ship_demo(run: Path) -> Path:
    """Save the model in a run's folder, in half precision, as the package's `demo`.

    Its data become the first 200 validation scenes of the embedded set, so that these images are generated in seconds.
    """
    model, config, categories = load_weights(run)
    config = config.replace({"data.root": "runs/data/shapes-demo", "data.shapes.train": 16, "data.shapes.val": 200})
    path = SHIPPED / "demo.safetensors"
    save_weights(path, model.state_dict(), config, categories, half=True)
    return path


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["start", key]:
            print(ship_start(key))
        case ["demo", run]:
            print(ship_demo(Path(run)))
        case _:
            sys.exit(str(__doc__))
