"""A reproducible research and ablation workbench for SparseInst (CVPR 2022).

Everything public is here; torch is imported when something that needs it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseinst.config import Config
    from sparseinst.criterion import Criterion
    from sparseinst.errors import DataError, RunFailed, UserError
    from sparseinst.inference.predict import load_model
    from sparseinst.models.sparseinst import build_model
    from sparseinst.overrides import load_config
    from sparseinst.postprocess import postprocess
    from sparseinst.report.evaluations import results

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Criterion",
    "DataError",
    "RunFailed",
    "UserError",
    "build_model",
    "load_config",
    "load_model",
    "postprocess",
    "results",
]

_HOME = {
    "Config": "config",
    "load_config": "overrides",
    "Criterion": "criterion",
    "build_model": "models.sparseinst",
    "load_model": "inference.predict",
    "postprocess": "postprocess",
    "results": "report.evaluations",
    "DataError": "errors",
    "RunFailed": "errors",
    "UserError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
