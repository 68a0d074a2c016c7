"""Compile a module ahead of time for this CPU, and keep the compiled library on the disk for the next start.

torch.compile traces a module anew in every process, which takes longer than everything else before the first image. Here, a
process only loads the library (torch's AOTInductor). One library serves all sizes of the inputs.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import platform
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseinst.files import atomic, file_digest, make_folder
from sparseinst.inference.artifacts import artifacts_folder
from sparseinst.inference.weights import tensors_digest
from sparseinst.section import content_hash
from sparseinst.words import shorten

_log = logging.getLogger(__name__)
_log.setLevel(logging.INFO)  # compiling can take minutes

_VERSION = 1
"""Goes up when the same module gives another library, so that older ones are made again."""
_PACKAGE = Path(__file__).parents[1]

Compiled = Callable[..., Any]


class CannotCompile(Exception):
    """A module cannot be compiled ahead of time. The message says why."""


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
        example: contiguous inputs. Later inputs need the same types and the same order in memory.
        sides: for each input, the dimensions whose length may change.
        checks: inputs of other lengths, on which a new library is compared with the module: a compiler may take a length for a
            constant without saying so.
        what: the name of the module in messages.

    Raises:
        CannotCompile: torch cannot compile the module for all sizes, the library computes something else, or the disk is full.
    """
    folder = artifacts_folder() / "torch"
    path = folder / f"{_key(module, example)}.pt2"
    try:
        if path.exists():
            try:
                return _load(path)
            except RuntimeError as error:
                _log.warning("%s: is damaged and is made again (%s)", path, _reason(error))
                path.unlink()
        _log.info("compiling %s for this CPU; the next start loads it from %s", what, folder)
        with tempfile.TemporaryDirectory(dir=make_folder(folder), prefix=".", suffix=".tmp") as temporary:
            library = Path(temporary) / "network.pt2"
            _write(module, example, sides, library)
            _check(_load(library), module, [example, *checks])
            with atomic(path) as whole:
                shutil.move(library, whole)
        return _load(path)
    # Exporters and compilers raise errors of many kinds, for example AssertionError for an operator that they do not know.
    except Exception as error:
        raise CannotCompile(_reason(error)) from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shorten(lines[0])


def _write(module: nn.Module, example: tuple[Tensor, ...], sides: Sequence[Sequence[int]], library: Path) -> None:
    from torch._inductor.utils import fresh_cache

    dynamic = tuple(dict.fromkeys(dims, torch.export.Dim.DYNAMIC) for dims in sides)
    named = dict(zip(inspect.signature(module.forward).parameters, dynamic, strict=True))
    with warnings.catch_warnings(), fresh_cache(dir=str(library.parent)):
        warnings.simplefilter("ignore")  # the exporter and the compiler warn about their own code
        exported = torch.export.export(module, example, dynamic_shapes=named)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(library), inductor_configs={"freezing": True})


def _load(library: Path) -> Compiled:
    loaded: Compiled = torch._inductor.aoti_load_package(str(library))
    return loaded


def _check(library: Compiled, module: nn.Module, inputs: Sequence[tuple[Tensor, ...]]) -> None:
    """Raise `CannotCompile` if a library's outputs differ from a module's by more than rounding."""
    for values in inputs:
        for ours, theirs in zip(_tensors(library(*values)), _tensors(module(*values)), strict=True):
            if ours.shape != theirs.shape:
                raise CannotCompile(f"its output has the shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}")
            error, size = (ours.float() - theirs.float()).norm(), theirs.float().norm()
            if not error <= (1e-3 if values[0].dtype == torch.float32 else 0.2) * size:
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
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": [platform.machine(), _instructions()],
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
    hidden = {name for name in own if name.startswith("_")} | {"training"}
    # The representation of a function holds its address, which is another one in each process.
    attributes = {name: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for name, value in own.items() if name not in hidden}
    return [type(module).__qualname__, attributes]


def _code(module: nn.Module) -> dict[str, str]:
    """Return the digests of the files that define what a module computes: of its parts' classes, and of this package's models."""
    files = {inspect.getsourcefile(type(part)) for part in module.modules()} - {None}
    files |= {str(path) for folder in ("models", "inference") for path in (_PACKAGE / folder).glob("*.py")}
    return {Path(file).name: file_digest(Path(file)) for file in sorted(file for file in files if file is not None)}


def _instructions() -> str:
    """Return a digest of the CPU's instructions: the compiler uses all of them, and the folder may belong to several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:16]
