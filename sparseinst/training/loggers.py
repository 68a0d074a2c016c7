"""Log a training to Weights & Biases, MLflow or Trackio (`train.loggers`). A logger that fails never ends a training."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from sparseinst.config import Config
from sparseinst.errors import UserError
from sparseinst.files import atomic
from sparseinst.nested import flatten
from sparseinst.paths import RunPaths
from sparseinst.words import install_extra

_log = logging.getLogger(__name__)

FINAL = "final"
"""The group of the metrics after the training."""
Outcome = Literal["finished", "stopped", "failed"]
"""How a training ended: with all steps, at the user's request and with a checkpoint, or with an error."""


class Logger(Protocol):
    """One logged run."""

    id: str
    """The id by which a resumed training finds the run and continues it."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, outcome: Outcome) -> None: ...


class _WandB:
    """A run of Weights & Biases, whose files are in the folder `wandb` of the training's run."""

    def __init__(self, config: Config, paths: RunPaths, known: str | None) -> None:
        import wandb

        self.id = known or uuid.uuid4().hex[:8]
        self.run = wandb.init(
            project=config.train.log_project,
            id=self.id,
            name=paths.title(),
            dir=str(paths.root),
            config=config.model_dump(mode="json"),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        if all(name.startswith(f"{FINAL}/") for name in values):
            self.run.summary.update(dict(values))  # a continued run accepts no more values for its last step
        else:
            self.run.log(dict(values), step=step)

    def close(self, outcome: Outcome) -> None:
        self.run.finish(exit_code=int(outcome == "failed"))


class _MLflow:
    """A run of MLflow, in the experiment with the project's name."""

    def __init__(self, config: Config, paths: RunPaths, known: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient()
        if known is not None:
            self.id = known
            self.client.update_run(known, status="RUNNING")
            return
        project = config.train.log_project
        experiment = self.client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment is not None else self.client.create_experiment(project)
        self.id = str(self.client.create_run(number, run_name=paths.title()).info.run_id)
        settings = [Param(name, str(value)) for name, value in flatten(config.model_dump(mode="json")).items()]
        for first in range(0, len(settings), 100):  # so many fit into one request
            self.client.log_batch(self.id, params=settings[first : first + 100])

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self, outcome: Outcome) -> None:
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[outcome]
        self.client.set_terminated(self.id, status=status)


class _Trackio:
    """A run of Trackio, which finds a run again by its name."""

    def __init__(self, config: Config, paths: RunPaths, known: str | None) -> None:
        import trackio

        self.id = known or f"{paths.root.resolve().name}-{uuid.uuid4().hex[:8]}"
        self.run = trackio.init(
            project=config.train.log_project, name=self.id, config=flatten(config.model_dump(mode="json")), resume="allow",
            embed=False,
        )  # fmt: skip

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self, outcome: Outcome) -> None:  # noqa: ARG002 (Trackio knows no outcome)
        self.run.finish()


_LOGGERS: dict[str, Callable[[Config, RunPaths, str | None], Logger]] = {
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


def check_installed(names: Sequence[str]) -> None:
    """Raise `UserError` if a logger's package is not installed."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of this name, such as the files of an earlier run, is no package
            raise UserError(f"train.loggers: {name} is not installed: {install_extra(name)}, or leave it out")


class Loggers:
    """All loggers of a training. The process of rank 0 uses them.

    `loggers.json` in the run's folder holds each logger's run, and the last step of each group of values that it has. A
    resumed training therefore continues the same run, and sends no step twice.
    """

    def __init__(self, config: Config, paths: RunPaths) -> None:
        self.config, self.paths = config, paths
        self._open: dict[str, Logger] = {}
        self._sent = self._read()

    def open(self) -> None:
        """Begin or continue the run of each logger."""
        for name in self.config.train.loggers:
            found = self._guarded(name, lambda name=name: self._begin(name))  # type: ignore[misc]
            if found is not None:
                self._open[name] = found
                self._sent.setdefault(name, {"run": found.id})
                _log.info("logging to %s, run %s", name, found.id)
        if self._open:
            self._write()

    def write(self, record: Mapping[str, Any], group: str) -> None:
        """Send the numbers of a record, as `group/name`. The key `iteration` is their step."""
        step = int(record["iteration"])
        values = {f"{group}/{k}": float(v) for k, v in record.items() if k != "iteration" and isinstance(v, int | float)}
        sent = False
        for name, logger in list(self._open.items()):
            if step <= self._sent[name].get(group, -1):
                continue
            if self._guarded(name, lambda logger=logger: logger.log(values, step) or True):  # type: ignore[misc]
                self._sent[name][group] = step
                sent = True
        if sent:
            self._write()

    def close(self, outcome: Outcome) -> None:
        """End the logged runs, which may wait until all values are sent."""
        for name, logger in list(self._open.items()):
            self._guarded(name, lambda logger=logger: logger.close(outcome))  # type: ignore[misc]
        self._open.clear()

    def _begin(self, name: str) -> Logger:
        known = self._sent.get(name, {}).get("run")
        return _LOGGERS[name](self.config, self.paths, known)

    def _guarded(self, name: str, act: Callable[[], Any]) -> Any:
        """Return what `act` returns. If it fails, leave the logger out from now on, with one warning, and return None."""
        try:
            with torch.random.fork_rng(devices=[]):  # the training's random numbers must not depend on a logger
                return act()
        except Exception as error:  # noqa: BLE001 (a network or a foreign package can fail in any way)
            self._open.pop(name, None)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
            _log.warning("%s failed, so the training goes on without it: %s", name, reason)
            return None

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(self.paths.loggers.read_text(encoding="utf-8"))
            return {name: {"run": str(entry.pop("run")), **entry} for name, entry in found.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            _log.warning("%s is damaged (%s), so the loggers begin new runs", self.paths.loggers, error)
            return {}

    def _write(self) -> None:
        with atomic(self.paths.loggers) as temporary:
            temporary.write_text(json.dumps(self._sent, indent=1) + "\n", encoding="utf-8")


def log_evaluation(config: Config, paths: RunPaths, figures: Mapping[str, float | None]) -> None:
    """Send the metrics of a finished training to its logged runs, as `final/AP` and so on."""
    loggers = Loggers(config, paths)
    loggers.open()
    loggers.write({"iteration": config.train.iterations, **figures}, FINAL)
    loggers.close("finished")
