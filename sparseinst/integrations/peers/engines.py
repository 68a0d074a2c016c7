"""Run a peer's network in another engine than torch."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sparseinst.config import EngineName, NetworkPrecision
from sparseinst.engines.artifact_files import OPSET
from sparseinst.engines.base import INPUT, Engine, EngineFacts
from sparseinst.errors import UserError
from sparseinst.files import atomic
from sparseinst.inference.artifacts import artifacts_folder, compiled_folder, save_openvino
from sparseinst.inference.export import check_onnx_packages
from sparseinst.inference.kept import kept
from sparseinst.inference.onnx_operators import translations
from sparseinst.inference.quantization import noise_images, quantisation_packages, quantise_on
from sparseinst.integrations.peers.peer import Exportable, Peer, PeerInput
from sparseinst.models.tensors import tensors_digest
from sparseinst.section import content_hash

_TRACED_OPSET = 18
"""The newest operator set of the exporter that traces."""


@dataclass(frozen=True)
class PreparedPeer:
    """A peer that is ready to run, and the facts about what runs it."""

    peer: Peer
    facts: EngineFacts


def prepare_peer(peer: Peer, example: PeerInput, engine: EngineName, precision: NetworkPrecision) -> PreparedPeer:
    """Return a peer whose network runs in this engine. The rest of its work stays the same.

    Args:
        example: an input of the size to export for, if the network has one size only.

    Raises:
        UserError: the engine's extra is missing, it compiled another precision, or it cannot run this peer.
        RunFailed: the network in int8 cannot be written.
    """
    if engine == "torch":
        return PreparedPeer(peer, _torch_facts(peer))
    if peer.exportable is None:
        raise UserError(f"{peer.name} runs in torch only, because its network cannot be exported")
    if example.images.device.type != "cpu":
        raise UserError(f"engine {engine} runs on the CPU only, not on {example.images.device}: use --device cpu")
    artifact = _artifact(peer, peer.exportable, example)
    if precision == "int8":
        artifact = _int8(peer, peer.exportable, artifact)
    loaded: Engine
    if engine == "onnxruntime":
        from sparseinst.engines import onnxruntime_engine

        loaded = onnxruntime_engine.load(artifact, precision)
    else:
        from sparseinst.engines import openvino_engine

        loaded = openvino_engine.load(artifact, precision, cache=compiled_folder())
    return PreparedPeer(replace(peer, run=lambda inputs: loaded.outputs(inputs.images)), loaded.facts)


def _torch_facts(peer: Peer) -> EngineFacts:
    state = dict(peer.exportable.network.state_dict()) if peer.exportable is not None else {}
    tensors = {name: tensor.detach().cpu() for name, tensor in state.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return EngineFacts("torch", torch.__version__, "fp32", tensors_digest(tensors)[:16], size, torch.get_num_threads(), {})


def _artifact(peer: Peer, exportable: Exportable, example: PeerInput) -> Path:
    """Return the network as ONNX, which is made unless an earlier call has made it."""
    state = {name: tensor.detach().cpu() for name, tensor in exportable.network.state_dict().items()}
    content = {
        "peer": peer.name,
        "weights": tensors_digest(state),
        "size": None if exportable.any_size else list(example.images.shape[2:]),
        "outputs": [*exportable.outputs, exportable.traced],
        "package": version(peer.package),
        "exporter": [torch.__version__, _TRACED_OPSET if exportable.traced else OPSET],
    }
    path = artifacts_folder() / "peers" / content_hash(content) / "network.onnx"

    def export() -> None:
        check_onnx_packages()
        with atomic(path) as temporary, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters warn about their own code
            _export(exportable, example.images, temporary)

    return kept(path, export)


def _int8(peer: Peer, exportable: Exportable, source: Path) -> Path:
    """Return the network in int8 for OpenVINO, with ranges from noise, which suffices for timing. It is made once."""
    nncf, openvino = quantisation_packages()
    path = source.with_name(f"int8-{nncf.__version__}-{openvino.__version__.split('-')[0]}.xml")

    def make() -> None:
        def read(photo: Image.Image) -> NDArray[np.float32]:
            images: torch.Tensor = peer.prepare(np.array(photo)).images
            return images.numpy()

        model = openvino.Core().read_model(source)
        save_openvino(quantise_on(nncf, model, noise_images(), read, transformer=exportable.transformer), path)

    return kept(path, make)


def _export(exportable: Exportable, images: torch.Tensor, output: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": list(exportable.outputs)}
    if exportable.traced:
        axes = {INPUT: {2: "height", 3: "width"}} if exportable.any_size else None
        torch.onnx.export(
            exportable.network, (images,), output, dynamo=False, opset_version=_TRACED_OPSET, dynamic_axes=axes, **names
        )
        return
    anything = torch.export.Dim.DYNAMIC
    program: Any = torch.onnx.export(
        exportable.network,
        (images,),
        dynamo=True,
        opset_version=OPSET,
        custom_translation_table=translations(OPSET),
        dynamic_shapes=({2: anything, 3: anything},) if exportable.any_size else None,
        verbose=False,
        **names,
    )
    program.save(output)
