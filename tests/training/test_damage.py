"""Check that damaged files of a run are named, and cost no more than what they held."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparseinst.config import Config
from sparseinst.errors import RunFailed, UserError
from sparseinst.evaluation.weights import evaluate_run
from sparseinst.inference.checkpoints import read_checkpoint
from sparseinst.inference.weights import load_weights, save_weights
from sparseinst.overrides import load_config
from sparseinst.paths import RunPaths
from sparseinst.report.curves import read_metrics
from sparseinst.training.checkpoint import newest_checkpoint, remove_if_all_damaged
from sparseinst.training.train import train
from tests.conftest import CPU, THREADS, TINY, run


@pytest.fixture(scope="module")
def trained(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train with the number of threads that the tests use, since the bits depend on it."""
    torch.set_num_threads(THREADS)
    output = tmp_path_factory.mktemp("trained")
    run(load_config(overrides={**TINY, "data.root": str(shapes_root)}), output)
    return output


@pytest.fixture
def stopped(trained: Path, tmp_path: Path) -> RunPaths:
    """Return a copy of a finished run whose weights are gone, so that it resumes from its checkpoints."""
    shutil.copytree(trained, tmp_path / "run")
    paths = RunPaths(tmp_path / "run")
    paths.weights.unlink()
    return paths


def same(paths: RunPaths, trained: Path) -> bool:
    ours, theirs = load_file(paths.weights), load_file(RunPaths(trained).weights)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_flipped_bit_in_a_header_of_the_archive_falls_back(stopped: RunPaths, tiny: Config) -> None:
    """25 seeded flips in the headers of the zip archive; some of them change nothing that is read."""
    path = stopped.checkpoint(6)
    content = path.read_bytes()
    random = np.random.default_rng(0)
    places = [at + int(random.integers(46)) for at in _find(content, b"PK\x01\x02")] + list(
        range(len(content) - 98, len(content))
    )
    fallen = 0
    for place in random.choice(places, 25, replace=False):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        found = newest_checkpoint(stopped)
        assert found in (path, stopped.checkpoint(4))
        fallen += found != path
        path.with_suffix(".damaged").unlink(missing_ok=True)
    assert fallen > 8


def _find(content: bytes, mark: bytes) -> list[int]:
    places, at = [], content.find(mark)
    while at >= 0:
        places.append(at)
        at = content.find(mark, at + 1)
    return places


@pytest.mark.parametrize("state", [{"weights": torch.zeros(3)}, {"iteration": 6, "model": {}}, {"iteration": 5}])
def test_foreign_content_falls_back(stopped: RunPaths, trained: Path, tiny: Config, state: Any) -> None:
    torch.save(state, stopped.checkpoint(6))
    run(tiny, stopped.root)
    assert len(list(stopped.checkpoints.glob("00000006.*damaged"))) == 1
    assert same(stopped, trained)


def test_a_run_with_damaged_checkpoints_alone_stays_refused(stopped: RunPaths, trained: Path, tiny: Config) -> None:
    for path in stopped.checkpoints.iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    for _ in range(3):
        with pytest.raises(RunFailed, match="every checkpoint is damaged; --from-scratch"):
            train(tiny, stopped.root, device=CPU, progress=False)
    train(tiny, stopped.root, device=CPU, progress=False, from_scratch=True)
    assert same(stopped, trained)
    assert not list(stopped.checkpoints.glob("*.damaged"))


def test_from_scratch_removes_content_that_does_not_fit_the_run(stopped: RunPaths, trained: Path, tiny: Config) -> None:
    """Such a file is whole, so it would get its name back each time if it were only read."""
    for step in (4, 6):
        torch.save({"iteration": step, "model": {}}, stopped.checkpoint(step))
    with pytest.raises(RunFailed, match="every checkpoint is damaged"):
        train(tiny, stopped.root, device=CPU, progress=False)
    train(tiny, stopped.root, device=CPU, progress=False, from_scratch=True)
    assert same(stopped, trained)


def test_from_scratch_gives_a_whole_checkpoint_its_name_back(stopped: RunPaths, caplog: Any) -> None:
    for step in (4, 6):
        stopped.checkpoint(step).rename(stopped.checkpoint(step).with_suffix(".damaged"))
    stopped.checkpoint(6).with_suffix(".damaged").write_bytes(b"damaged")
    remove_if_all_damaged(stopped)
    assert newest_checkpoint(stopped) == stopped.checkpoint(4)
    assert "00000004.pt is whole after all" in caplog.text


FAILURES = [
    (OSError(errno.EIO, "Input/output error"), RunFailed, "cannot be read now"),
    (OSError(errno.ESTALE, "Stale file handle"), RunFailed, "cannot be read now"),
    (PermissionError(errno.EACCES, "Permission denied"), RunFailed, "cannot be read now"),
    (MemoryError("no memory"), MemoryError, "no memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."), RuntimeError, "Allocator"),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError, "CUDA error"),
]


@pytest.mark.parametrize("place", ["zipfile.ZipFile.testzip", "torch.load", "restore"])
@pytest.mark.parametrize(("error", "kind", "words"), FAILURES, ids=lambda value: str(value)[:20])
def test_a_failure_of_the_machine_condemns_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception, kind: type[Exception], words: str
) -> None:
    """The checkpoint may be whole, so it is neither renamed nor removed."""
    paths = RunPaths(tmp_path)
    paths.checkpoints.mkdir()
    torch.save({"iteration": 4, "model": {}}, paths.checkpoint(4))
    torch.save({"iteration": 6, "model": {}}, paths.checkpoint(6))
    paths.checkpoint(4).rename(paths.checkpoint(4).with_suffix(".damaged"))
    before = sorted(path.name for path in paths.checkpoints.iterdir())

    def fail(*_: Any, **__: Any) -> None:
        raise error

    if place != "restore":
        monkeypatch.setattr(place, fail)
        with pytest.raises(kind, match=words):
            remove_if_all_damaged(paths)
    if place == "torch.load":
        with pytest.raises(kind, match=words):
            read_checkpoint(paths.checkpoint(6))
    with pytest.raises(kind, match=words):
        newest_checkpoint(paths, fail)
    assert sorted(path.name for path in paths.checkpoints.iterdir()) == before


def test_a_disk_that_fails_in_the_directory_of_the_archive_condemns_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """zipfile reports every error there as a file that is no archive."""
    paths = RunPaths(tmp_path)
    paths.checkpoints.mkdir()
    torch.save({"iteration": 6}, paths.checkpoint(6))

    def fail(_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("zipfile._EndRecData", fail)
    with pytest.raises(RunFailed, match="00000006.pt: cannot be read now"):
        newest_checkpoint(paths)
    assert paths.checkpoint(6).exists()


def test_from_scratch_keeps_a_run_whose_checkpoint_is_whole(stopped: RunPaths, trained: Path, tiny: Config) -> None:
    train(tiny, stopped.root, device=CPU, progress=False, from_scratch=True)
    assert same(stopped, trained)
    assert "resuming after step 6" in stopped.log.read_text()


@pytest.mark.parametrize("damage", [b"12\n", b"{}\n", b"\xff\xfe\n", b'{"iteration": "1"}\n', b"[" * 5000 + b"\n", b'{"iterat'])
def test_a_damaged_line_of_metrics_blocks_nothing(stopped: RunPaths, tiny: Config, damage: bytes, caplog: Any) -> None:
    lines = stopped.metrics.read_bytes().splitlines(keepends=True)
    stopped.metrics.write_bytes(b"".join([*lines[:2], damage.rstrip(b"\n") + b"\n", *lines[2:]]))
    assert [entry["iteration"] for entry in read_metrics(stopped.root)] == [1, 2, 3, 4, 5, 6]
    assert "metrics.jsonl: line 3 is damaged or incomplete and left out" in caplog.text
    run(tiny, stopped.root)
    assert stopped.metrics.read_bytes() == b"".join(lines)


def test_temporaries_of_killed_writers_are_removed(stopped: RunPaths, tiny: Config) -> None:
    left = [stopped.root / ".model.safetensors.0a.tmp", stopped.checkpoints / ".00000006.pt.0b.tmp", stopped.attempts / ".0c.tmp"]
    for path in left:
        path.write_text("half")
    os.utime(left[-1], (0, 0))
    fresh = stopped.attempts / ".0d.tmp"
    fresh.write_text("half")
    run(tiny, stopped.root)
    assert not any(path.exists() for path in left)
    assert fresh.exists(), "another process may be trying to begin"


def test_an_emptied_config_is_called_empty(stopped: RunPaths, tiny: Config) -> None:
    stopped.config.write_text("")
    with pytest.raises(UserError, match=r"config\.yaml: is empty"):
        run(tiny, stopped.root)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(trained: Path, tmp_path: Path, value: float) -> None:
    model, config, categories = load_weights(trained)
    state = model.state_dict()
    name = next(name for name, tensor in state.items() if tensor.is_floating_point())
    state[name].view(-1)[0] = value
    save_weights(tmp_path / "model.safetensors", state, config, categories)
    with pytest.raises(UserError, match="holds NaN or infinite values"):
        load_weights(tmp_path)


def test_a_kept_evaluation_is_that_of_the_weights(tiny: Config, tmp_path: Path) -> None:
    run(tiny, tmp_path / "run")
    first = evaluate_run(tmp_path / "run", tiny, device=CPU)
    model, config, categories = load_weights(tmp_path / "run")
    state = {name: tensor * 0.5 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    save_weights(RunPaths(tmp_path / "run").weights, state, config, categories)
    assert evaluate_run(tmp_path / "run", tiny, device=CPU).mechanism != first.mechanism
