"""Name every file that a run writes. No other module spells these names out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

WEIGHTS = "model.safetensors"
SHIPPED = Path(__file__).parent / "shipped"
"""Weights and records that come with the package, by key."""
SHIPPED_MODELS = ("demo",)
"""Names of the trained models that the package contains. `demo` is the default row of the profile `small`."""


@dataclass(frozen=True)
class RunPaths:
    """The files of one run below its folder."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def name(self) -> Path:
        """The run's name for people, in one line: table, row, seed, stage, profile. Only runs of tables have the file."""
        return self.root / "name.txt"

    def read_name(self) -> str:
        """Return the run's name. Bytes that are not UTF-8 are shown as a replacement character."""
        return self.name.read_text(encoding="utf-8", errors="replace").strip()

    def title(self) -> str:
        """Return the name with the key, `table5 dice seed 1, train, profile mini (0ae70553)`; the folder if it has no name."""
        if not self.name.exists():
            return str(self.root)
        return f"{self.read_name()} ({self.root.name[:8]})"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def metrics(self) -> Path:
        """The losses of training steps and the metrics of evaluations, as one JSON object per line."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def loggers(self) -> Path:
        """The runs of `train.loggers`, and the last steps that were sent to them."""
        return self.root / "loggers.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def checkpoint(self, iteration: int) -> Path:
        return self.checkpoints / f"{iteration:08d}.pt"

    def saved_checkpoints(self) -> list[Path]:
        """Return the checkpoints, newest first."""
        return sorted(self.checkpoints.glob("[0-9]*.pt"), reverse=True)

    @property
    def best(self) -> Path:
        """The weights with the highest AP in the evaluations during training, if there were any."""
        return self.root / "best.safetensors"

    @property
    def weights(self) -> Path:
        """The trained model with its config. The file exists once training is done."""
        return self.root / WEIGHTS

    @property
    def start(self) -> Path:
        """The folder of the stage `pretrain`, if this training alone needed it."""
        return self.root / "pretrain"

    @property
    def evaluation(self) -> Path:
        """The metrics of an evaluation, with its settings and data."""
        return self.root / "evaluation.json"

    @property
    def code(self) -> Path:
        """The code that trained, as one JSON object per line for each process that began or continued the training."""
        return self.root / "code.jsonl"

    @property
    def predictions(self) -> Path:
        """An evaluation's instances in COCO's result format, compressed."""
        return self.root / "predictions.json.gz"

    @property
    def submitted(self) -> Path:
        """The job that last sent the stage to a cluster."""
        return self.root / "submitted.json"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    def attempt(self, number: int) -> Path:
        """The process that began the attempt with this number."""
        return self.attempts / f"{number:04d}.json"

    def beat(self, number: int, rank: int) -> Path:
        """The last heartbeat of one rank of an attempt."""
        return self.attempts / f"{number:04d}.{rank}.beat"

    def end(self, number: int, rank: int) -> Path:
        """The outcome of an attempt for one rank."""
        return self.attempts / f"{number:04d}.{rank}.end"

    def stacks(self, number: int, rank: int) -> Path:
        """The stacks of a rank's threads when it hung."""
        return self.attempts / f"{number:04d}.{rank}.stacks"


RUNS = Path("runs")
"""The folder of all runs, in the working folder."""
JOBS = RUNS / "jobs"
"""submitit's files: the jobs as they were sent, and the outputs of their processes."""
NAMES = RUNS / "by-name"
"""Links to the folders of runs of tables. Each has the run's name."""
RETIRED = RUNS / "retired"
"""The folders of runs that were set aside; see `launch.retire`."""
SNAPSHOTS = RUNS / "snapshots"
"""Copies of the package. Jobs on a cluster run these."""


def look_of_process(pid: int) -> Path:
    """Return the file with the seeds of each row in one look, for the processes that `run --until-settled --jobs N` starts."""
    return RUNS / f"look-{pid}.json"


def run_folder(key: str) -> RunPaths:
    """Return the folder in which the stage with this key works."""
    return RunPaths(RUNS / key)


def stored_weights(key: str) -> Path | None:
    """Return the weights that the stage with this key made, from the package or from its folder; None if they are gone."""
    candidates = (SHIPPED / f"{key}.safetensors", run_folder(key).weights)
    return next((path for path in candidates if path.exists()), None)
