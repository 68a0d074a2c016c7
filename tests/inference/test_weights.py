"""Check that damaged weights are refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from sparseinst.config import Config
from sparseinst.data.coco import Category
from sparseinst.errors import UserError
from sparseinst.inference.start import Start, start_from
from sparseinst.inference.weights import file_tensors_digest, halved, load_weights, save_weights
from sparseinst.models.sparseinst import build_model
from sparseinst.models.tensors import tensors_digest
from tests.attacks import wrong
from tests.conftest import assert_flips_are_refused


@pytest.fixture
def saved(tiny: Config, tmp_path: Path) -> Path:
    categories = tuple(Category(number + 1, f"thing {number}") for number in range(tiny.model.num_classes))
    save_weights(tmp_path / "model.safetensors", build_model(tiny.model, load_pretrained=False).state_dict(), tiny, categories)
    return tmp_path / "model.safetensors"


def test_a_flipped_bit_anywhere_is_refused(saved: Path) -> None:
    """100 seeded flips: each gives a one-line error, wherever it is."""
    content = saved.read_bytes()
    load_weights(saved)
    random = np.random.default_rng(0)
    header = int.from_bytes(content[:8], "little") + 8
    places = [*random.integers(0, header, 50), *random.integers(header, len(content), 50)]
    assert_flips_are_refused(saved, places, random, lambda: load_weights(saved))


def test_the_digest_depends_on_every_bit_and_on_nothing_else(saved: Path, tmp_path: Path) -> None:
    state = {"b": torch.zeros(3), "a": torch.ones((), dtype=torch.int64), "c": torch.zeros(2, dtype=torch.bfloat16)}
    assert tensors_digest(state) == tensors_digest(dict(reversed(state.items())))
    assert tensors_digest(state) != tensors_digest({**state, "b": torch.zeros(3, 1)})
    assert tensors_digest(state) != tensors_digest({**state, "b": torch.tensor([0.0, -0.0, 0.0])})
    save_file(state, tmp_path / "one.safetensors", {"x": "1", "y": "2"})
    save_file(state, tmp_path / "other.safetensors", {"y": "3"})
    assert file_tensors_digest(tmp_path / "one.safetensors") == file_tensors_digest(tmp_path / "other.safetensors")


def test_files_without_a_checksum_are_read(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        metadata = {name: text for name, text in file.metadata().items() if name != "checksum"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    save_file(tensors, saved, metadata)
    load_weights(saved)
    save_file(tensors, saved, {**metadata, "categories": "[3]"})
    with pytest.raises(UserError, match=re.escape("its metadata cannot be read")):
        load_weights(saved)


@pytest.mark.parametrize("frozen_first", [False, True])
def test_a_model_with_frozen_norms_starts_from_one_with_trained_norms(tiny: Config, frozen_first: bool, tmp_path: Path) -> None:
    """Only trained norms have a counter of batches, which has no effect."""
    first, second = (tiny.replace({"model.backbone.frozen_norm": frozen}) for frozen in (frozen_first, not frozen_first))
    state = build_model(first.model, load_pretrained=False).state_dict()
    categories = tuple(Category(number + 1, f"thing {number}") for number in range(tiny.model.num_classes))
    save_weights(tmp_path / "first.safetensors", state, first, categories)
    model = build_model(second.model, load_pretrained=False)
    kept = start_from(model, tmp_path / "first.safetensors", categories)
    assert kept == Start([], [category.name for category in categories], tiny.model.decoder.iam.num_maps)
    started = model.state_dict()
    assert started.keys() != state.keys()
    assert all(torch.equal(started[name], state[name]) for name in started.keys() & state.keys())


def test_another_f_iam_starts_from_random_weights(tiny: Config, tmp_path: Path) -> None:
    """The rest of the model keeps its weights, so that kinds of F_iam can start from one trained model."""
    state = build_model(tiny.model, load_pretrained=False).state_dict()
    categories = tuple(Category(number + 1, f"thing {number}") for number in range(tiny.model.num_classes))
    save_weights(tmp_path / "first.safetensors", state, tiny, categories)
    model = build_model(tiny.replace({"model.decoder.iam.kind": "cross_attention"}).model, load_pretrained=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = start_from(model, tmp_path / "first.safetensors", categories)
    iam = "decoder.instance_branch.iam."
    assert kept.fresh == sorted(name for name in before if name.startswith(iam))
    assert kept.maps == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith(iam) else state[name]), name


def test_other_classes_and_maps_keep_what_can_be_kept(tiny: Config, tmp_path: Path) -> None:
    """Classes are kept by name; of Group-IAM, the first maps of each group are kept."""
    first = tiny.replace({"model.decoder.iam.groups": 2, "model.decoder.iam.num_maps": 6})
    old = build_model(first.model, load_pretrained=False).state_dict()
    names = ("Cat", "dog", "cow", "hen", "pig", "ant")
    save_weights(tmp_path / "w.safetensors", old, first, tuple(Category(n, name) for n, name in enumerate(names, start=1)))
    branch = "decoder.instance_branch."
    for maps in (4, 9):
        config = first.replace({"model.num_classes": 3, "model.decoder.iam.num_maps": maps})
        model = build_model(config.model, load_pretrained=False)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        kept = start_from(model, tmp_path / "w.safetensors", [Category(5, "hen"), Category(7, "owl"), Category(9, "cat")])
        assert kept == Start([], ["hen", "cat"], min(maps, 6))
        new = model.state_dict()
        for name in (f"{branch}classes.weight", f"{branch}classes.bias"):
            assert torch.equal(new[name][[0, 2]], old[name][[3, 0]])
            assert torch.equal(new[name][1], before[name][1])
        for name in (f"{branch}iam.conv.weight", f"{branch}iam.conv.bias"):
            ours, theirs = new[name].unflatten(0, (2, -1)), old[name].unflatten(0, (2, -1))
            assert torch.equal(ours[:, : kept.maps], theirs[:, : kept.maps])
            assert torch.equal(ours[:, kept.maps :], before[name].unflatten(0, (2, -1))[:, kept.maps :])
        assert torch.equal(new["encoder.fusion.weight"], old["encoder.fusion.weight"])
    assert "4 maps" in Start(["a"], [], 4).describe()


def rewritten(saved: Path, tmp_path: Path, **changes: Any) -> Path:
    """Write a weights file as earlier versions did, without a checksum, with other metadata or tensors."""
    with safe_open(saved, "pt") as file:
        metadata = {name: text for name, text in file.metadata().items() if name != "checksum"}
    tensors = changes.pop("tensors", load_file(saved))
    path = tmp_path / "changed.safetensors"
    path.write_bytes(save(tensors, {**metadata, **changes}))
    return path


def test_wrong_metadata_are_refused_in_one_line(saved: Path, tmp_path: Path) -> None:
    for name, texts in {"config": wrong.NO_METADATA, "categories": wrong.NO_CATEGORIES}.items():
        for text in texts:
            with pytest.raises(UserError) as caught:
                load_weights(rewritten(saved, tmp_path, **{name: text}))
            assert len(str(caught.value).splitlines()) == 1
            assert str(caught.value).startswith(str(tmp_path)), text


def test_a_config_or_tensors_of_another_model_are_refused_before_it_is_built(saved: Path, tmp_path: Path) -> None:
    _, config, _ = load_weights(rewritten(saved, tmp_path))
    huge = config.replace({"model.decoder.width": 16_384, "model.decoder.depth": 100})
    with pytest.raises(UserError, match="do not fit the file's own config"):
        load_weights(rewritten(saved, tmp_path, config=huge.to_json()))
    fewer = config.replace({"model.num_classes": config.model.num_classes - 1})
    with pytest.raises(UserError, match="categories, but its config says"):
        load_weights(rewritten(saved, tmp_path, config=fewer.to_json()))
    tensors = load_file(saved)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 4)
    for changed, message in (
        ({**tensors, name: tensors[name].int()}, "is of type torch.int32"),
        ({**tensors, name: tensors[name][:1].clone()}, "has shape"),
        ({**tensors, "more": tensors[name].clone()}, "more is not part of the model"),
    ):
        with pytest.raises(UserError, match=message):
            load_weights(rewritten(saved, tmp_path, tensors=changed))
    assert load_weights(rewritten(saved, tmp_path, tensors=halved(tensors)))[1] == config
    for path in (Path("/dev/zero"), tmp_path / "none"):
        with pytest.raises(UserError):
            load_weights(path)
