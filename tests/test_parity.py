"""Compare with golden values of the reference implementation, in the folder SPARSEINST_PARITY (by default ../shared/parity).

The tests read every size from the files, so that another folder of the same form works, too.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from sparseinst.config import DecoderConfig, EncoderConfig, InferenceConfig, LossConfig, MatcherConfig, TrainConfig
from sparseinst.criterion import Criterion, count, prepare_targets
from sparseinst.data.transforms import short_side_size
from sparseinst.integrations.released import rename_encoder_decoder
from sparseinst.matcher import match
from sparseinst.models.decoder import Decoder
from sparseinst.models.encoder import Encoder
from sparseinst.models.network import Predictions
from sparseinst.postprocess import ImageSize, postprocess
from sparseinst.training.schedule import learning_rate_factor

FOLDER = Path(os.environ.get("SPARSEINST_PARITY", Path(__file__).parents[2] / "shared" / "parity"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no golden values in {FOLDER} (set SPARSEINST_PARITY)")
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
CASES = ["two_images", "one_empty", "crowded", "overfull"]


def read_json(name: str) -> Any:
    return json.loads((FOLDER / name).read_text())


def raw_predictions(tensors: dict[str, Tensor], prefix: str) -> Predictions:
    masks = tensors[f"{prefix}pred_masks"]
    return Predictions(tensors[f"{prefix}pred_logits"], tensors[f"{prefix}pred_scores"].squeeze(-1), masks, masks.new_zeros(0))


@pytest.mark.parametrize("kind", ["base", "group", "softmax_group"])
def test_parity_forward(kind: str) -> None:
    sizes, tensors = read_json("config.json"), load_file(FOLDER / f"encoder_decoder_{kind}.safetensors")
    features = [tensors[f"input.res{level}"] for level in (3, 4, 5)]
    iam = {
        "num_maps": sizes["num_masks"],
        "groups": sizes["groups"] if "group" in kind else 1,
        "activation": "softmax" if "softmax" in kind else "sigmoid",
    }
    config = DecoderConfig(depth=sizes["depth"], width=sizes["width"], kernel_dim=sizes["kernel_dim"], iam=iam)
    channels = sizes["encoder_channels"]
    encoder = Encoder(EncoderConfig(channels=channels), [f.shape[1] for f in features])
    decoder = Decoder(config, channels, sizes["num_classes"])
    state = rename_encoder_decoder({k: v for k, v in tensors.items() if k.split(".")[0] in ("encoder", "decoder")})
    for module, name in ((encoder, "encoder."), (decoder, "decoder.")):
        module.load_state_dict({k.removeprefix(name): v for k, v in state.items() if k.startswith(name)})
    logits: list[Tensor] = []
    decoder.instance_branch.iam.conv.register_forward_hook(lambda *call: logits.append(call[-1]))

    with torch.no_grad():
        encoded = encoder(features)
        output = decoder(encoded)

    torch.testing.assert_close(encoded, tensors["output.encoder"], **TOLERANCE)
    torch.testing.assert_close(output.class_logits, tensors["output.pred_logits"], **TOLERANCE)
    torch.testing.assert_close(output.objectness_logits[..., None], tensors["output.pred_scores"], **TOLERANCE)
    # The tolerance is for tensors of order 1; mask logits reach 150, where another order of summation makes a larger difference.
    masks = tensors["output.pred_masks"]
    torch.testing.assert_close(output.mask_logits, masks, rtol=1e-4, atol=1e-4 * max(1.0, float(masks.abs().mean())))
    maps = F.interpolate(logits[0], scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(maps, tensors["output.pred_iam"], **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_parity_matching_and_loss(case: str) -> None:
    facts, tensors = read_json("criterion.json")[case], load_file(FOLDER / f"criterion_{case}.safetensors")
    leaves = [tensors[f"pred.pred_{name}"].requires_grad_() for name in ("logits", "scores", "masks")]
    predictions = Predictions(leaves[0], leaves[1].squeeze(-1), leaves[2], leaves[2].new_zeros(0))
    images = range(len(leaves[0]))
    targets = prepare_targets(
        [tensors[f"target{i}.labels"] for i in images],
        [tensors[f"target{i}.masks"] for i in images],
        tuple(facts["input_shape"]),
        tuple(leaves[2].shape[-2:]),
    )
    matches = match(predictions, targets, MatcherConfig())
    for i, found in enumerate(matches):
        assert found.predictions.tolist() == tensors[f"match{i}.pred"].tolist()
        assert found.instances.tolist() == tensors[f"match{i}.target"].tolist()

    weights = facts["weights"]
    config = LossConfig(
        class_weight=weights["loss_ce"],
        dice_weight=weights["loss_dice"],
        pixel_weight=weights["loss_mask"],
        objectness_weight=weights["loss_objectness"],
        overfull="reference",
    )
    criterion = Criterion(config, MatcherConfig())
    losses = criterion(predictions, targets)
    names = {"class": "loss_ce", "dice": "loss_dice", "pixel": "loss_mask", "objectness": "loss_objectness"}
    assert losses.keys() == names.keys()
    for ours, theirs in names.items():
        torch.testing.assert_close(losses[ours], tensors[f"loss.{theirs}"], **TOLERANCE)
    sum(losses.values()).backward()
    for leaf, name in zip(leaves, ("logits", "scores", "masks"), strict=True):
        expected = tensors[f"grad.pred_{name}"]
        # Gradients are far smaller than 1, so compare them at their own scale.
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    pairs = sum(min(len(t.labels), leaves[0].shape[1]) for t in targets)
    assert count(targets, leaves[0].shape[1]).pairs == pairs


@pytest.mark.parametrize("index", range(3))
def test_parity_postprocess(index: int) -> None:
    facts, tensors = read_json("postprocess.json")[index], load_file(FOLDER / "postprocess.safetensors")
    config = InferenceConfig(score_threshold=facts["score_threshold"], mask_threshold=facts["mask_threshold"])
    size = ImageSize(tuple(facts["image"]), tuple(facts["original"]))
    predictions = raw_predictions(tensors, f"{index}.")
    [found] = postprocess(predictions, tuple(facts["padded"]), [size], config)
    torch.testing.assert_close(found.scores, tensors[f"{index}.scores"], **TOLERANCE)
    assert found.labels.tolist() == tensors[f"{index}.labels"].tolist()
    differing = (found.masks != tensors[f"{index}.masks"].bool()).sum()
    assert differing == 0


def test_parity_learning_rate() -> None:
    facts = read_json("schedule_and_resize.json")
    last = max(map(int, facts["lr_at"])) + 1
    config = TrainConfig(
        iterations=last,
        learning_rate=facts["base_lr"],
        milestones=tuple(m / last for m in facts["milestones"]),
        warmup_iterations=facts["warmup_iters"],
        warmup_factor=facts["warmup_factor"],
    )
    for iteration, expected in facts["lr_at"].items():
        rate = config.learning_rate * learning_rate_factor(config, int(iteration))
        assert rate == pytest.approx(expected, rel=1e-9), iteration
    assert TrainConfig().iterations == last
    assert learning_rate_factor(TrainConfig(), facts["milestones"][0] - 1) == 1.0


def test_parity_sizes() -> None:
    for case in read_json("schedule_and_resize.json")["resize"]:
        assert short_side_size(*case["in"], case["short"], case["max"]) == tuple(case["out"]), case
