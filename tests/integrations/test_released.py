"""Check the import of released checkpoints. The tests write out their names, and give each tensor a value of its own."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparseinst import load_model
from sparseinst.cli import run_cli
from sparseinst.config import PRESETS, RELEASED_MODELS, Config
from sparseinst.data.coco import category_names
from sparseinst.errors import UserError
from sparseinst.integrations.released import import_backbone, import_released, to_our_names, to_reference_names
from sparseinst.models.sparseinst import build_model

RELEASED = sorted(RELEASED_MODELS)
NORM = ("weight", "bias", "running_mean", "running_var")


def resnet_names(blocks: tuple[int, ...], deformable: tuple[int, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yield detectron2's and timm's names of a ResNet's tensors."""

    def conv(theirs: str, ours: str, norm: str) -> Iterator[tuple[str, str]]:
        yield f"{theirs}.weight", f"{ours}.weight"
        for name in NORM:
            yield f"{theirs}.norm.{name}", f"{norm}.{name}"

    yield from conv("stem.conv1", "conv1", "bn1")
    for stage, count in enumerate(blocks, 2):
        for block in range(count):
            theirs, ours = f"res{stage}.{block}", f"layer{stage - 1}.{block}"
            if block == 0:
                yield from conv(f"{theirs}.shortcut", f"{ours}.downsample.0", f"{ours}.downsample.1")
            for number in (1, 2, 3):
                yield from conv(f"{theirs}.conv{number}", f"{ours}.conv{number}", f"{ours}.bn{number}")
            if stage in deformable:
                for name in ("weight", "bias"):
                    yield f"{theirs}.conv2_offset.{name}", f"{ours}.conv2.offset.{name}"


def resnet_d_names(ours: list[str]) -> Iterator[tuple[str, str]]:
    for name in ours:
        yield name.replace("conv2.offset", "conv2_offset"), name


def darknet_names(ours: list[str]) -> Iterator[tuple[str, str]]:
    """Yield timm's names of 2021 and its names today, where feature models join the names of the levels by an underscore."""
    for name in ours:
        yield name.replace("stem_conv1", "stem.conv1").replace("stages_", "stages."), name


def pvt_names(ours: list[str]) -> Iterator[tuple[str, str]]:
    for name in ours:
        parts = name.split(".")
        if parts[0] == "patch_embed":
            yield ".".join(["patch_embed1", *parts[1:]]), name
            continue
        stage = int(parts[0].removeprefix("stages_"))
        if parts[1] == "downsample":
            yield ".".join([f"patch_embed{stage + 1}", *parts[2:]]), name
        elif parts[1] == "norm":
            yield ".".join([f"norm{stage + 1}", *parts[2:]]), name
        else:
            inner = ".".join(parts[2:]).replace(".mlp.dwconv.", ".mlp.dwconv.dwconv.")
            yield f"block{stage + 1}.{inner}", name


def head_name(ours: str) -> str:
    for mine, theirs in (
        ("encoder.laterals.", "encoder.fpn_laterals."), ("encoder.outputs.", "encoder.fpn_outputs."),
        ("decoder.instance_branch.convs.", "decoder.inst_branch.inst_convs."),
        ("decoder.instance_branch.iam.conv.", "decoder.inst_branch.iam_conv."),
        ("decoder.instance_branch.iam.mix.", "decoder.inst_branch.fc."),
        ("decoder.instance_branch.classes.", "decoder.inst_branch.cls_score."),
        ("decoder.instance_branch.kernels.", "decoder.inst_branch.mask_kernel."),
        ("decoder.instance_branch.objectness.", "decoder.inst_branch.objectness."),
        ("decoder.mask_branch.", "decoder.mask_branch.mask_convs."), ("decoder.projection.", "decoder.mask_branch.projection."),
    ):  # fmt: skip
        ours = ours.replace(mine, theirs)
    return ours


def model_config(name: str) -> Config:
    return Config().replace({**PRESETS["release"], **RELEASED_MODELS[name], "model.backbone.pretrained": False})


def checkpoint(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a made-up checkpoint of a released model with the reference's names, and the expected tensors with ours."""
    config = model_config(name)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in build_model(config.model, load_pretrained=False).state_dict().items()}
    body = [key.removeprefix("backbone.body.") for key in shapes if key.startswith("backbone.")]
    if name.startswith(("r50-", "r101-")):
        stages = config.model.backbone.deformable_stages
        pairs = list(resnet_names((3, 4, 6 if name.startswith("r50") else 23, 3), stages))
    else:
        rename = resnet_d_names if name.startswith("r50d") else pvt_names if name.startswith("pvt") else darknet_names
        pairs = list(rename(body))
    names = {f"backbone.body.{ours}": f"backbone.{theirs}" for theirs, ours in pairs}
    names |= {key: head_name(key) for key in shapes if not key.startswith("backbone.")}
    assert names.keys() == shapes.keys()
    expected = {key: torch.full(shape, float(number)) for number, (key, shape) in enumerate(shapes.items())}
    theirs = {names[key]: tensor for key, tensor in expected.items()}
    if "softmax" in name:
        theirs["decoder.inst_branch.softmax_bias"] = torch.ones(1)
    return theirs, expected


def write_checkpoint(tmp_path: Path, theirs: dict[str, Tensor]) -> Path:
    path = tmp_path / "released.pth"
    torch.save({"model": theirs, "iteration": 270_000}, path)
    return path


@pytest.mark.parametrize("name", RELEASED)
def test_every_tensor_of_every_released_model_is_imported(name: str, tmp_path: Path) -> None:
    theirs, expected = checkpoint(name)
    found = import_released(write_checkpoint(tmp_path, theirs))
    assert found.name == name
    assert found.config.model == model_config(name).model
    assert found.config.loss.pixel_weight == 5.0
    assert found.state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.state.items())
    assert (len(found.categories), found.categories[0].id, found.categories[79].name) == (80, 1, "toothbrush")


@pytest.mark.slow
def test_the_written_file_can_be_used_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It gives the outputs of a model with the same tensors."""
    config = model_config("r50-giam")
    torch.manual_seed(0)
    model = build_model(config.model, load_pretrained=False).eval()
    state = model.state_dict()
    names = {f"backbone.body.{ours}": f"backbone.{theirs}" for theirs, ours in resnet_names((3, 4, 6, 3))}
    theirs = {names.get(key, head_name(key)): tensor for key, tensor in state.items()}
    theirs |= {
        "pixel_mean": torch.tensor([123.675, 116.28, 103.53])[:, None, None],
        "pixel_std": torch.tensor([58.395, 57.12, 57.375]),
    }
    output = tmp_path / "ours.safetensors"
    assert run_cli(["import-weights", str(write_checkpoint(tmp_path, theirs)), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "backbone: 265 tensors" in printed
    assert "left out, because they have no effect: pixel_mean, pixel_std" in printed
    assert "r50-giam, 80 classes" in printed
    loaded = load_model(output, "cpu")
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(image), model(image), rtol=1e-4, atol=1e-4)
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    assert loaded.predict(picture).masks.shape[1:] == (40, 60)
    assert category_names(loaded.categories)[0] == "person"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.fusion.weight": None}, "encoder"),
        ({"backbone.res4.5.conv3.weight": None}, "1 missing: backbone.body.layer3.5.conv3.weight"),
        ({"backbone.res6.0.conv1.weight": torch.zeros(1)}, "1 left over: backbone.res6.0.conv1.weight"),
        ({"encoder.ppm.bottleneck.weight": torch.zeros(3, 4)}, r"1 of another shape: encoder.ppm.bottleneck.weight \[3, 4\] for"),
        ({"pixel_mean": torch.tensor([103.53, 116.28, 123.675])}, "trained on other pixels"),
        ({"decoder.inst_branch.iam_conv.weight": None}, "settings cannot be inferred"),
    ],
)
def test_a_partial_fit_is_refused_with_the_tensors_names(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    theirs, _ = checkpoint("r50-giam")
    for key, tensor in change.items():
        if tensor is None:
            del theirs[key]
        else:
            theirs[key] = tensor
    with pytest.raises(UserError, match=message):
        import_released(write_checkpoint(tmp_path, theirs))


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no SparseInst checkpoint"):
        import_released(tmp_path / "other.pth")
    with pytest.raises(UserError, match="no such file"):
        import_released(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="no readable weights"):
        import_released(tmp_path / "text.pth")


def test_detectron2s_backbone_can_be_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = model_config("r50-iam").replace({"model.backbone.frozen_norm": False})
    state = build_model(config.model, load_pretrained=False).state_dict()
    shapes = {key.removeprefix("backbone.body."): tensor.shape for key, tensor in state.items() if key.startswith("backbone.")}
    arrays = {t: np.full(tuple(shapes[o]), n, dtype=np.float32) for n, (t, o) in enumerate(resnet_names((3, 4, 6, 3)))}
    content = {"model": {**arrays, "fc.weight": np.zeros((1000, 2048), np.float32)}, "__author__": "torchvision"}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content))
    output = tmp_path / "r50.safetensors"
    assert run_cli(["import-weights", str(tmp_path / "R-50.pkl"), "--backbone", "--output", str(output)]) == 0
    assert "265 tensors of a backbone; left out: fc.weight" in capsys.readouterr().out
    loaded = build_model(config.replace({"model.backbone.weights": str(output)}).model).state_dict()
    for number, (_, ours) in enumerate(resnet_names((3, 4, 6, 3))):
        assert loaded[f"backbone.body.{ours}"].flatten()[0] == number


def test_nothing_in_a_pickle_is_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("executed",))

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"model": {"stem.conv1.weight": Evil()}}))
    with pytest.raises(UserError, match="which is no array"):
        import_backbone(tmp_path / "evil.pkl")


@pytest.mark.parametrize("name", RELEASED)
def test_names_are_converted_in_both_directions(name: str) -> None:
    theirs, expected = checkpoint(name)
    ours = to_our_names(theirs)
    assert set(ours.values()) == set(expected)
    assert to_reference_names(expected) == {mine: key for key, mine in ours.items()}
