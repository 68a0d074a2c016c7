"""Run a network with OpenVINO on the CPU. Its artifact is `NAME.xml` with the weights in `NAME.bin`."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseinst.config import NetworkPrecision
from sparseinst.engines.artifact_files import artifact_identity
from sparseinst.engines.base import EngineFacts, check_precision, missing_package, used_precision
from sparseinst.errors import RunFailed, UserError
from sparseinst.files import check_writable
from sparseinst.machine import multiplies_bfloat16
from sparseinst.models.network import Predictions
from sparseinst.words import shorten

_log = logging.getLogger(__name__)

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "u8": "int8", "i8": "int8"}
_CONVOLUTIONS = ("Convolution", "GroupConvolution", "DeformableConvolution", "Deconvolution")
_PRODUCTS = ("MatMul", "FullyConnected")


class OpenVinoEngine:
    """A compiled OpenVINO model. One compiled model serves images of all sizes."""

    def __init__(self, request: Any, facts: EngineFacts) -> None:
        self.facts = facts
        self._request = request

    def outputs(self, images: Tensor) -> list[Tensor]:
        # The outputs are copies, because the next image reuses the request's memory.
        results = self._request.infer([images.float().contiguous().numpy()], share_inputs=True, share_outputs=False)
        return [torch.from_numpy(results[index]) for index in range(len(results))]

    def run(self, images: Tensor) -> Predictions:
        return Predictions(*self.outputs(images))


def load(artifact: Path, precision: NetworkPrecision, threads: int | None = None, cache: Path | None = None) -> OpenVinoEngine:
    """Compile a model for the CPU.

    In int8, the layers that stay in float run in bf16 if the CPU has bf16 instructions and OpenVINO offers it, otherwise in fp32.

    Args:
        threads: the number of threads; None takes torch's.
        cache: a folder in which OpenVINO keeps compiled models; None keeps none. If nothing can be written there, a warning says
            so, and none is kept.

    Raises:
        UserError: OpenVINO is not installed, the file cannot be loaded, or another precision was compiled.
    """
    try:
        import openvino
    except ImportError as error:
        raise missing_package("openvino", error) from None
    digest, size = artifact_identity(artifact)
    threads = threads or torch.get_num_threads()
    settings: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        **(_cache_settings(cache / digest) if cache is not None else {}),
    }
    # On CPUs with AMX, OpenVINO 2026.4 has no implementation of some int8 networks with other layers in bf16.
    hints = [_HINTS[precision]] if precision in _HINTS else [*(["bf16"] if multiplies_bfloat16() else []), "f32"]
    for hint in hints:
        try:
            compiled = openvino.Core().compile_model(artifact, "CPU", {"INFERENCE_PRECISION_HINT": hint, **settings})
            break
        except RuntimeError as error:
            if hint == hints[-1]:
                why = shorten(str(error).strip().splitlines()[-1])
                raise UserError(
                    f"{artifact}: OpenVINO cannot load it ({why}); if it is incomplete, copy or export it again"
                ) from None
            _log.info("OpenVINO cannot run the layers that stay in float in %s, so they run in %s", hint, hints[-1])
    convolutions, layers = _count_layers(compiled)
    check_precision("openvino", precision, used_precision(convolutions), convolutions)
    facts = EngineFacts("openvino", openvino.__version__, precision, digest, size, threads, dict(layers))
    return OpenVinoEngine(compiled.create_infer_request(), facts)


def _cache_settings(folder: Path) -> dict[str, str]:
    """Return the setting that keeps the compiled model of one artifact in this folder.

    Each artifact needs a folder of its own. OpenVINO recognises a compiled model by the path, the time and the size of its `.xml`
    file, and would still use it after the `.bin` file got other weights.
    """
    try:
        check_writable(folder / "compiled")
    except (UserError, RunFailed) as error:
        _log.warning(
            "the compiled network is not kept, so that each start compiles it again (%s); SPARSEINST_CACHE names another folder",
            str(error).partition("; ")[0],
        )
        return {}
    return {"CACHE_DIR": str(folder)}


def _count_layers(compiled: Any) -> tuple[Counter[str], Counter[str]]:
    """Count the convolutions in each precision, and the convolutions and matrix products together."""
    convolutions: Counter[str] = Counter()
    products: Counter[str] = Counter()
    for operator in compiled.get_runtime_model().get_ops():
        about = operator.get_rt_info()
        kind, precision = (about[name].astype(str) for name in ("layerType", "runtimePrecision"))
        if kind in _CONVOLUTIONS:
            convolutions[_PRECISIONS.get(precision, precision)] += 1
        elif kind in _PRODUCTS:
            products[_PRECISIONS.get(precision, precision)] += 1
    return convolutions, convolutions + products
