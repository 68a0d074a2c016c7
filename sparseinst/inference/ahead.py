"""Compile a module ahead of time for this CPU, and keep the compiled library on the disk for the next start.

torch.compile traces a module anew in every process, which takes longer than everything else before the first image. Here, a
process only loads the library (torch's AOTInductor). One library serves all sizes of the inputs.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import io
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseinst.files import atomic, causes, file_digest
from sparseinst.inference.artifacts import libraries_folder
from sparseinst.inference.kept import make_cache_folder
from sparseinst.models.tensors import tensors_digest
from sparseinst.section import content_hash
from sparseinst.words import shorten

_log = logging.getLogger(__name__)
_log.setLevel(logging.INFO)  # compiling can take minutes

_VERSION = 1
"""Goes up when the same module gives another library, so that older ones are made again."""
_MOST_BYTES = 4 * 2**30
"""If the libraries become larger than this together, those that were not used for the longest time are removed."""
_PACKAGE = Path(__file__).parents[1]
_SOURCES = ("models/*.py", *(f"inference/{name}.py" for name in ("ahead", "export", "optimize", "winograd")))
"""The files of this package that decide what is compiled, besides those of the modules' classes."""

Compiled = Callable[..., Any]


class CannotCompile(Exception):
    """A module cannot be compiled ahead of time. The message says why."""


def has_compiler() -> bool:
    """Return whether torch finds a C++ compiler on this machine. Compiling needs one; loading a compiled library does not."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None


@torch.no_grad()
def compiled(
    module: nn.Module,
    example: tuple[Tensor, ...],
    sides: Sequence[Sequence[int]],
    checks: Sequence[tuple[Tensor, ...]],
    what: str,
) -> Compiled:
    """Return a function that computes what a module in evaluation mode computes. Only the first call for a module compiles it.

    Args:
        module: its weights become part of the library.
        example: inputs. Later inputs need the same types and the same order in memory.
        sides: for each input, the dimensions whose length may change.
        checks: inputs of other lengths, on which a new library is compared with the module: a compiler may take a length for a
            constant without saying so.
        what: the name of the module in messages.

    Raises:
        CannotCompile: torch cannot compile the module for all sizes, the library computes something else, the disk is full, or
            there is neither a library nor a compiler.
    """
    from torch._inductor.exc import InvalidCxxCompiler

    folder = libraries_folder()
    try:
        path = folder / f"{_key(module, example)}.pt2"
        if path.exists() and _is_whole(path):
            with suppress(OSError):  # the folder may be another user's, or read-only
                os.utime(path)
            return _load(path)
        refused = path.with_suffix(".refused")
        if refused.exists():
            raise CannotCompile(
                f"{refused.read_text(encoding='utf-8')}; so an earlier start found, remove {refused} to try again"
            )
        if not has_compiler():
            raise CannotCompile(
                f"torch finds no C++ compiler on this machine (g++, or the one that CXX names), and {folder} has no library of "
                f"{what} for this CPU and {torch.get_num_threads()} threads"
            )
        _make_room(make_cache_folder(folder))
        with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp") as temporary:
            _log.info("compiling %s for this CPU; the next start loads it from %s", what, folder)
            try:
                library = _compile(module, example, sides, Path(temporary))
            except Exception as error:
                passing = (OSError, MemoryError, InvalidCxxCompiler)  # another start may succeed
                if not any(isinstance(cause, passing) for cause in causes(error)):
                    refused.write_text(_reason(error), encoding="utf-8")
                raise
            with atomic(path) as whole:
                whole.write_bytes(library)
        loaded = _load(path)
        try:
            _check(loaded, module, [example, *checks])
        except CannotCompile as error:
            path.rename(refused)
            refused.write_text(str(error), encoding="utf-8")
            raise
        return loaded
    except CannotCompile:
        raise
    # Exporters and compilers raise errors of many kinds, for example AssertionError for an operator that they do not know.
    except Exception as error:
        raise CannotCompile(_reason(error)) from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shorten(lines[0])


def _compile(module: nn.Module, example: tuple[Tensor, ...], sides: Sequence[Sequence[int]], folder: Path) -> bytes:
    """Return a library's content. The compiler's own files go to `folder`."""
    from torch._inductor.utils import fresh_cache

    names = inspect.signature(module.forward).parameters
    dynamic = {name: dict.fromkeys(dims, torch.export.Dim.DYNAMIC) for name, dims in zip(names, sides, strict=True)}
    content = io.BytesIO()  # torch's writer ends the process if it cannot write to a file
    with warnings.catch_warnings(), _quiet("torch._inductor.utils"), fresh_cache(dir=str(folder)):
        warnings.simplefilter("ignore")  # the exporter and the compiler warn about their own code
        exported = torch.export.export(module, example, dynamic_shapes=dynamic)
        torch._inductor.aoti_compile_and_package(exported, package_path=content, inductor_configs={"freezing": True})
    return content.getvalue()


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Show only errors of a logger: torch names its temporary folder after a failure, but this folder is removed."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _is_whole(library: Path) -> bool:
    """Return whether a library is undamaged; a damaged one is removed."""
    try:
        with zipfile.ZipFile(library) as file:
            damaged = file.testzip()
    except zipfile.BadZipFile as error:
        damaged = str(error)
    if damaged is None:
        return True
    _log.warning("%s: is damaged (%s), so it is removed", library, damaged)
    library.unlink(missing_ok=True)
    return False


def _load(library: Path) -> Compiled:
    # `torch._inductor.aoti_load_package` first asks the C++ compiler for the CPU's instructions, which takes up to 20 s and fails
    # without a compiler. The key of a library covers the instructions.
    from torch._inductor.package import AOTICompiledModel  # type: ignore[attr-defined]

    loaded: Compiled = AOTICompiledModel(torch._C._aoti.AOTIModelPackageLoader(str(library), "model", False, 1, -1))
    return loaded


def _make_room(folder: Path) -> None:
    """Remove what killed processes left a day ago, and the libraries that are too many."""
    for left in folder.glob(".*.tmp"):
        if time.time() - left.stat().st_mtime > 24 * 3600:
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    room = _MOST_BYTES
    for library in sorted(folder.glob("*.pt2"), key=lambda path: path.stat().st_mtime, reverse=True):
        room -= library.stat().st_size
        if room < 0:
            library.unlink(missing_ok=True)


def _check(library: Compiled, module: nn.Module, inputs: Sequence[tuple[Tensor, ...]]) -> None:
    """Raise `CannotCompile` if a library's outputs differ by more from those in float32 than the module's own outputs do."""
    exact_module = copy.deepcopy(module).float()
    for values in inputs:
        outputs = zip(
            _tensors(library(*values)),
            _tensors(module(*values)),
            _tensors(exact_module(*(value.float() for value in values))),
            strict=True,
        )
        for ours, theirs, exact in outputs:
            if ours.shape != theirs.shape:
                raise CannotCompile(f"its output has the shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}")
            error, allowed = (ours.float() - exact).norm(), 2 * (theirs.float() - exact).norm() + 1e-3 * exact.norm()
            if not error <= allowed:
                raise CannotCompile(f"its outputs for inputs of shape {tuple(values[0].shape)} differ from the module's")


def _tensors(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _key(module: nn.Module, example: tuple[Tensor, ...]) -> str:
    """Return a name for everything that the library depends on: weights, structure and code of the module, machine and torch."""
    return content_hash(
        {
            "version": _VERSION,
            "weights": tensors_digest(_state(module)),
            "structure": {name: _describe(part) for name, part in module.named_modules()},
            "code": _code(module),
            "inputs": [[str(tensor.dtype), list(tensor.stride())] for tensor in example],
            "packages": {name: version(name) for name in ("torch", "torchvision", "timm")},
            "threads": torch.get_num_threads(),
            "settings": [
                torch.backends.mkldnn.enabled,
                torch.get_float32_matmul_precision(),
                torch.are_deterministic_algorithms_enabled(),
            ],
            "machine": [platform.machine(), torch.backends.cpu.get_cpu_capability(), _instructions()],
        }
    )


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Return all tensors of a module, also those that are not saved with it."""
    return {name: tensor.detach() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def _describe(module: nn.Module) -> list[Any]:
    """Return what a module computes with besides its tensors and modules: its class and its attributes.

    Raises:
        CannotCompile: a hook or a replaced method changes what the module computes; no name can stand for these.
    """
    own = vars(module)
    if "forward" in own or module._forward_hooks or module._forward_pre_hooks:
        raise CannotCompile(f"{type(module).__qualname__} has hooks or a method of its own")
    # The representation of a function holds its address, which is another one in each process.
    attributes = {name: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for name, value in own.items() if name not in _EVERY_MODULE}
    return [type(module).__module__, type(module).__qualname__, attributes]


_EVERY_MODULE = {*vars(nn.Module())}
"""The attributes that every module has; they hold its tensors, modules and hooks."""


def _code(module: nn.Module) -> dict[str, str]:
    """Return the digests of the files that define what a module computes: of its parts' classes, and of this package."""
    classes = {type(part).__module__: inspect.getfile(type(part)) for part in module.modules()}
    own = {str(path.relative_to(_PACKAGE)): str(path) for pattern in _SOURCES for path in _PACKAGE.glob(pattern)}
    return {name: file_digest(Path(file)) for name, file in {**classes, **own}.items()}


@cache
def _instructions() -> str:
    """Return a digest of the CPU's instructions: the compiler uses all of them, and the folder may belong to several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:16]
