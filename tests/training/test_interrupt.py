"""Check that Ctrl-C and SIGTERM leave a checkpoint and one line."""

import io
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseinst.cli import STOPPED, end_in_order_when_terminated, run_cli
from sparseinst.inference.weights import file_tensors_digest
from sparseinst.paths import RunPaths
from sparseinst.training.checkpoint import write_state
from sparseinst.training.interrupt import StopRequest
from tests.attacks.runs import metrics
from tests.test_cli import small_settings

WITH_CTRL_C = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
"""Shells start background jobs with Ctrl-C ignored, and a test suite that is such a job would pass this on to the command."""


def test_an_interrupted_command_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparseinst.data.shapes.write_shapes", interrupted)
    assert run_cli(["data", "shapes", "--output", str(tmp_path / "data")]) == 1
    assert capsys.readouterr().err == f"{STOPPED}\n"


def test_sigterm_raises_what_ctrl_c_raises_and_a_training_only_notes_it() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        end_in_order_when_terminated()
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def command(root: Path, run: Path) -> list[str]:
    settings = small_settings(**{"train.iterations": 150, "train.checkpoint_every": 1000, "train.log_every": 3})
    return [sys.executable, "-m", "sparseinst", "train", "--data", str(root), "--output", str(run), "--device", "cpu", *settings]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_the_run_continues_to_the_same_bits(
    number: signal.Signals, shapes_root: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = RunPaths(tmp_path / "stopped")
    started = [sys.executable, "-c", WITH_CTRL_C, *command(shapes_root, run.root)]
    process = subprocess.Popen(started, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run.metrics.exists() and run.metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    [line] = re.findall(r"stopped after step (\d+) of 150 with a checkpoint; the same command continues there", errors)
    assert "Traceback" not in errors
    assert run.checkpoint(int(line)).exists()
    again = subprocess.run(command(shapes_root, run.root), env=environment, capture_output=True, text=True, check=True)
    assert f"resuming after step {line}" in again.stderr
    undisturbed = RunPaths(tmp_path / "undisturbed")
    subprocess.run(command(shapes_root, undisturbed.root), env=environment, capture_output=True, check=True)
    assert file_tensors_digest(run.weights) == file_tensors_digest(undisturbed.weights)
    assert metrics(run) == metrics(undisturbed)


@pytest.mark.parametrize("stop", [SystemExit, KeyboardInterrupt])
def test_an_interrupt_during_a_save_stays_an_interrupt(
    stop: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal comes during the fifth write. torch.save turns it into a RuntimeError, and a job would count as failed."""
    writes = itertools.count()

    class Interrupted(io.FileIO):
        def write(self, data: Any) -> int:
            if next(writes) == 4:
                raise stop("asked to stop")
            return super().write(data)

    monkeypatch.setattr(Path, "open", lambda path, mode: Interrupted(path, mode))
    with pytest.raises(stop, match="asked to stop"):
        write_state({"weight": torch.rand(1000)}, tmp_path / "state")
