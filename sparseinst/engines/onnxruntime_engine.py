"""Run a network with ONNX Runtime on the CPU. Its artifact is an ONNX file with dynamic image sizes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseinst.config import NetworkPrecision
from sparseinst.engines.artifact_files import artifact_identity, read_onnx
from sparseinst.engines.base import INPUT, EngineFacts, check_precision, missing_package, used_precision
from sparseinst.errors import UserError
from sparseinst.models.network import Predictions
from sparseinst.words import shorten

_PRECISIONS = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}
_LAYERS = ("Conv", "ConvTranspose", "DeformConv", "Gemm", "MatMul")


class OnnxRuntimeEngine:
    """An ONNX Runtime session. One session serves images of all sizes."""

    def __init__(self, session: Any, facts: EngineFacts) -> None:
        self.facts = facts
        self._session = session

    def outputs(self, images: Tensor) -> list[Tensor]:
        arrays = self._session.run(None, {INPUT: images.float().contiguous().numpy()})
        return [torch.from_numpy(array) for array in arrays]

    def run(self, images: Tensor) -> Predictions:
        return Predictions(*self.outputs(images))


def load(artifact: Path, precision: NetworkPrecision, threads: int | None = None) -> OnnxRuntimeEngine:
    """Load an ONNX file.

    Args:
        threads: the number of threads; None takes torch's.

    Raises:
        UserError: ONNX Runtime is not installed, the file cannot be loaded, or it holds another precision.
    """
    try:
        import onnxruntime as package
    except ImportError as error:
        raise missing_package("onnxruntime", error) from None
    onnxruntime: Any = package  # its annotations leave its public names out
    digest, size = artifact_identity(artifact)
    threads = threads or torch.get_num_threads()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only: it warns about shapes that the exporter leaves open
    # By default its threads spin for some 30 ms after each image, which slows down whatever runs next on the same cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(artifact, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 (its errors have no common class but RuntimeError and Exception)
        why = shorten(str(error).splitlines()[0])
        raise UserError(
            f"{artifact}: ONNX Runtime cannot load it ({why}); if it is incomplete, copy or export it again"
        ) from None
    layers = _count_layers(artifact)
    used = used_precision(layers)
    check_precision("onnxruntime", precision, used, layers)
    facts = EngineFacts("onnxruntime", onnxruntime.__version__, precision, digest, size, threads, dict(layers))
    return OnnxRuntimeEngine(session, facts)


def _count_layers(artifact: Path) -> Counter[str]:
    """Count the layers with weights in each precision. The CPU provider computes in the types of the file."""
    import onnx

    graph = read_onnx(artifact).graph
    types = {
        tensor.name: onnx.helper.tensor_dtype_to_string(tensor.data_type).removeprefix("TensorProto.")
        for tensor in graph.initializer
    }
    weights = [name for node in graph.node if node.op_type in _LAYERS for name in node.input[1:2] if name in types]
    return Counter(_PRECISIONS.get(types[name], types[name].lower()) for name in weights)
