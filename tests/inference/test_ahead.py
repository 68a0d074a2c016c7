"""Check that a module compiled ahead of time is found again, and only if it still computes the same."""

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseinst.inference import ahead
from sparseinst.inference.ahead import CannotCompile, compiled

needs_compiler = pytest.mark.skipif(not ahead.has_compiler(), reason="no C++ compiler")
EXAMPLE = (torch.linspace(-1, 1, 60).view(3, 4, 5),)
OTHER = (torch.linspace(-2, 1, 14).view(1, 2, 7),)
SIDES = [[0, 1, 2]]


class Scale(nn.Module):
    def __init__(self, power: int = 2) -> None:
        super().__init__()
        self.power = power
        self.weight = nn.Parameter(torch.tensor([3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.relu(x) ** self.power


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a compiled `Scale()`."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEINST_CACHE", str(folder))
        compiled(Scale(), EXAMPLE, SIDES, [OTHER], "a test")
    [file] = (folder / "torch").iterdir()
    return file


@pytest.fixture
def cache(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the compiled `Scale()`; nothing else can be compiled."""
    monkeypatch.setenv("SPARSEINST_CACHE", str(tmp_path))
    monkeypatch.setattr(ahead, "_compile", fails)
    (tmp_path / "torch").mkdir()
    return Path(shutil.copy(library, tmp_path / "torch"))


def fails(*_: Any) -> None:
    raise AssertionError("no such operator\nand a long explanation")


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler gives warnings of its own
class TestLibrary:
    def test_it_serves_all_sizes_and_is_found_again(self, cache: Path) -> None:
        run = compiled(Scale(), EXAMPLE, SIDES, [], "a test")
        for x in (*EXAMPLE, *OTHER, torch.ones(1, 1, 1), torch.ones(9, 1, 30)):
            torch.testing.assert_close(run(x), Scale()(x))

    def test_the_folder_of_another_user_serves(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def forbidden(*_: object) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(ahead.os, "utime", forbidden)
        torch.testing.assert_close(compiled(Scale(), EXAMPLE, SIDES, [], "a test")(*OTHER), Scale()(*OTHER))

    @pytest.mark.parametrize("change", ["weight", "attribute", "threads", "code", "type"])
    def test_another_module_or_machine_needs_another_library(
        self, cache: Path, change: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module, example = Scale(3 if change == "attribute" else 2), EXAMPLE
        if change == "weight":
            module.weight.data += 1e-6
        elif change == "threads":
            monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
        elif change == "code":
            monkeypatch.setattr(ahead, "file_digest", lambda _: "edited")
        elif change == "type":
            example = (EXAMPLE[0].double(),)
        with pytest.raises(CannotCompile, match="^no such operator$"):
            compiled(module, example, SIDES, [], "a test")
        [refused] = {*cache.parent.iterdir()} - {cache}
        assert refused.suffix == ".refused", "nothing half-made is left"
        monkeypatch.setattr(ahead, "_compile", None)
        with pytest.raises(CannotCompile, match="^no such operator; so an earlier start found, remove .*refused to try again$"):
            compiled(module, example, SIDES, [], "a test")

    @pytest.mark.parametrize("replaced", ["hook", "method"])
    def test_a_module_that_no_key_describes_is_not_compiled(self, cache: Path, replaced: str) -> None:
        module = Scale()
        if replaced == "hook":
            module.register_forward_hook(lambda *_: None)
        else:
            module.forward = lambda x: x
        with pytest.raises(CannotCompile, match="has hooks or a method of its own"):
            compiled(module, EXAMPLE, SIDES, [], "a test")

    @pytest.mark.parametrize("short", [True, False])
    def test_a_damaged_library_is_made_again(
        self, short: bool, cache: Path, library: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        content = bytearray(cache.read_bytes())
        content[len(content) // 2] ^= 1
        cache.write_bytes(content[:2000] if short else content)
        monkeypatch.setattr(ahead, "_compile", lambda *_: library.read_bytes())
        with caplog.at_level(logging.WARNING):
            run = compiled(Scale(), EXAMPLE, SIDES, [OTHER], "a test")
        assert "is damaged" in caplog.text
        torch.testing.assert_close(run(*OTHER), Scale()(*OTHER))

    def test_a_library_that_computes_something_else_is_not_used(
        self, cache: Path, library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ahead, "_compile", lambda *_: library.read_bytes())
        for _ in range(2):
            with pytest.raises(CannotCompile, match=r"its outputs for inputs of shape \(3, 4, 5\) differ"):
                compiled(Scale(power=3), EXAMPLE, SIDES, [], "a test")

    def test_a_full_disk_is_not_remembered(self, cache: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise RuntimeError("a file was not written") from OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(ahead, "_compile", full)
        with pytest.raises(CannotCompile, match="a file was not written"):
            compiled(Scale(3), EXAMPLE, SIDES, [], "a test")
        assert [*cache.parent.iterdir()] == [cache]

    def test_old_libraries_and_what_killed_processes_left_go(
        self, cache: Path, library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The library that was not used for the longest time goes first."""
        old, left, recent = (cache.parent / name for name in ("old.pt2", ".left.tmp", ".recent.tmp"))
        shutil.copy(library, old)
        for folder in (left, recent):
            folder.mkdir()
            (folder / "file").write_text("x")
        for path in (old, left):
            os.utime(path, (1, 1))
        monkeypatch.setattr(ahead, "_MOST_BYTES", library.stat().st_size + 1)
        with pytest.raises(CannotCompile):
            compiled(Scale(5), EXAMPLE, SIDES, [], "a test")
        assert {path for path in cache.parent.iterdir() if path.suffix != ".refused"} == {cache, recent}


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_length_that_is_a_constant_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporters take the number of steps of `linspace` for a constant and do not say so."""

    class Positions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.linspace(0, 1, x.shape[0])[:, None, None]

    monkeypatch.setenv("SPARSEINST_CACHE", str(tmp_path))
    with pytest.raises(CannotCompile):
        compiled(Positions(), EXAMPLE, SIDES, [(torch.zeros(6, 2, 7),)], "a test")
