"""Name the engines. Imports no torch."""

from __future__ import annotations

from typing import get_args

from sparseinst.config import EngineName
from sparseinst.errors import UserError
from sparseinst.nested import nearest

ENGINES: tuple[EngineName, ...] = get_args(EngineName)


def check_engine(name: str) -> EngineName:
    """Return the name of an engine. Raises `UserError` if there is no such engine."""
    for known in ENGINES:
        if name == known:
            return known
    if name == "tensorrt":
        raise UserError("engine tensorrt is not supported yet; use torch with --optimize on a GPU, or openvino on a CPU")
    raise UserError(f"engine {name!r} is unknown{nearest(name, ENGINES)}")
