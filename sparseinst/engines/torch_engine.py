"""Run a network with PyTorch: as it is, or as the fast copy that `inference.optimize` makes. Its artifact is the weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from sparseinst.config import NetworkPrecision
from sparseinst.device import autocast
from sparseinst.engines.base import EngineFacts, check_precision, used_precision
from sparseinst.models.norms import probe_image

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def facts(network: nn.Module, precision: NetworkPrecision, digest: str, size: int, device: torch.device) -> EngineFacts:
    """Return the facts about a network of torch modules in evaluation mode on the device.

    Args:
        digest, size: the identity of the weights, and their bytes.

    Raises:
        UserError: the network computes in another precision.
    """
    layers = _count_layers(network, precision, device)
    used = used_precision(layers)
    check_precision("torch", "fp32" if precision == "tf32" else precision, used, layers)  # tf32 rounds float32 factors
    return EngineFacts("torch", torch.__version__, precision, digest, size, torch.get_num_threads(), dict(layers))


@torch.no_grad()
def _count_layers(network: nn.Module, precision: NetworkPrecision, device: torch.device) -> Counter[str]:
    """Count the convolutions in each precision, by the types of their outputs for a small image.

    The modules of a compiled network run uncompiled here; their weights have the type that is compiled.
    """
    layers: Counter[str] = Counter()

    def count(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        layers[_PRECISIONS.get(output.dtype, str(output.dtype))] += 1

    hooks = [module.register_forward_hook(count) for module in network.modules() if isinstance(module, nn.Conv2d)]
    try:
        image = probe_image().to(device, getattr(network, "dtype", torch.float32))
        with autocast(device, precision):
            network.get_submodule("backbone")(image)
    finally:
        for hook in hooks:
            hook.remove()
    return layers
