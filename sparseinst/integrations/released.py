"""State-dict names of the reference implementation's checkpoints, in ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_RENAMES = (
    (r"^encoder\.fpn_laterals\.", "encoder.laterals."),
    (r"^encoder\.fpn_outputs\.", "encoder.outputs."),
    (r"^decoder\.inst_branch\.inst_convs\.", "decoder.instance_branch.convs."),
    (r"^decoder\.inst_branch\.iam_conv\.", "decoder.instance_branch.iam.conv."),
    (r"^decoder\.inst_branch\.fc\.", "decoder.instance_branch.iam.mix."),
    (r"^decoder\.inst_branch\.cls_score\.", "decoder.instance_branch.classes."),
    (r"^decoder\.inst_branch\.mask_kernel\.", "decoder.instance_branch.kernels."),
    (r"^decoder\.inst_branch\.objectness\.", "decoder.instance_branch.objectness."),
    (r"^decoder\.mask_branch\.mask_convs\.", "decoder.mask_branch."),
    (r"^decoder\.mask_branch\.projection\.", "decoder.projection."),
)
_WITHOUT_EFFECT = re.compile(r"^decoder\.inst_branch\.softmax_bias$")
"""A scalar added before a softmax over positions changes nothing."""


def rename_encoder_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's and decoder's tensors under our names; other keys are left as they are."""
    renamed = {}
    for key, tensor in state.items():
        if _WITHOUT_EFFECT.match(key):
            continue
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed
