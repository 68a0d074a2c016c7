"""python -m tests.attacks [MODULE ...] [--count N] [--seed S]: print the table of what the attacks left."""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

import torch

from tests.attacks import MODULES
from tests.attacks.report import Tally

parser = argparse.ArgumentParser(prog="python -m tests.attacks")
parser.add_argument("modules", nargs="*", default=MODULES)
parser.add_argument("--count", type=int, default=20, help="attacks of each kind")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

torch.set_num_threads(1)  # the attacked commands run in forks, which a pool of threads would not survive
tally = Tally()
for name in options.modules:
    module = importlib.import_module(f"tests.attacks.{name}")
    with tempfile.TemporaryDirectory() as folder:
        for kind, outcome in module.attacks(Path(folder), options.count, options.seed):
            tally.add(kind, outcome)
            print(f"{kind}: {outcome.word}  {outcome.detail}"[:300], file=sys.stderr, flush=True)
print(tally.markdown())
sys.exit(1 if tally.bad() else 0)
