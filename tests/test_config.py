"""Check the settings: layers, mistakes, round trips and content hashes."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from sparseinst.config import MODELS, PRESETS, Config
from sparseinst.errors import UserError
from sparseinst.nested import flatten, leaf_paths
from sparseinst.overrides import load_config, parse_override
from sparseinst.section import Neutral, Section, content_hash


def test_defaults_are_those_of_the_paper() -> None:
    config = Config()
    assert load_config() == load_config(preset="paper") == config
    assert (config.train.batch_size, config.train.iterations, config.model.decoder.iam.num_maps) == (64, 270_000, 100)
    assert (config.loss.class_weight, config.loss.dice_weight, config.loss.pixel_weight, config.loss.objectness_weight) == (
        2,
        2,
        2,
        1,
    )


def test_release_preset() -> None:
    release = load_config(preset="release")
    assert (release.train.weight_decay, release.loss.pixel_weight) == (0.05, 5.0)
    assert release.replace({"train.weight_decay": 1e-4, "loss.pixel_weight": 2}) == Config()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_model_and_preset_validates(model: str, preset: str) -> None:
    assert load_config(model=model, preset=preset).model.num_classes == 80


def test_later_layers_override_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("preset: release\nmodel: {decoder: {depth: 2, width: 64}}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nmodel: {decoder: {width: 128}}\ntrain: {learning_rate: 1e-4}\n")
    config = load_config(tmp_path / "child.yaml", model="r50-giam", overrides=["model.decoder.depth=6"])
    assert config.train.weight_decay == 0.05
    assert (config.model.decoder.depth, config.model.decoder.width, config.model.decoder.iam.groups) == (6, 128, 4)
    assert config.train.learning_rate == 1e-4


def test_yaml_and_json_round_trips(tmp_path: Path) -> None:
    config = load_config(model="r50-dcn-giam", overrides={"train.clip_norm": 1.0, "data.short_sides": [64]})
    for name, text in (("a.yaml", config.to_yaml()), ("a.json", config.to_json())):
        (tmp_path / name).write_text(text)
        assert load_config(tmp_path / name) == config
        assert load_config(tmp_path / name).evaluate_key() == config.evaluate_key()


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().train.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.decoder.dept=2", "did you mean 'model.decoder.depth'"),
        ("depth=2", "did you mean 'model.decoder.depth'"),
        ("model.decoder.iam.kernel_sise=1", "did you mean 'model.decoder.iam.kernel_size'"),
        ("loss.pixel=bse", "loss.pixel: input should be 'bce', 'focal' or 'none', got 'bse'"),
        ("model.decoder.depth=four", "model.decoder.depth: input should be a valid integer, got 'four'"),
        ("model.decoder.depth=0", "model.decoder.depth: input should be greater than or equal to 1, got 0"),
        ("model.decoder.depth=2.5", "model.decoder.depth"),
        ("data.root=2.5", 'data.root: input should be a valid string, got 2.5: write "2.5" in quotes'),
        ("data.root=true", 'data.root: input should be a valid string, got True: write "true" in quotes'),
        ("train.learning_rate=.nan", "not plain data|finite|nan"),
        ("model.encoder.ppm=1", "model.encoder.ppm: input should be a valid boolean, got 1"),
        ("model.decoder.iam.groups=3", "groups=3 does not divide width=256"),
        ("loss.objectness=none", "set inference.rescore=false"),
        ("train.accumulate=3", "accumulate=3 does not divide batch_size=64"),
        ("train.iterations=10", "warmup_iterations=1000 must be below iterations=10"),
        ("train.iterations", "not of the form path=value"),
        ("data.short_sides=[", "override 'data.short_sides=\\['"),
        ("model=5", "'model' is a group of settings: name one of them, such as model.num_classes=VALUE"),
        ("train=3", "'train' is a group of settings: name one of them, such as train.iterations=VALUE"),
    ],
)
def test_mistakes_give_one_line_errors(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(overrides=[override])
    assert "\n" not in str(caught.value)


def test_a_config_without_a_mask_loss_is_refused() -> None:
    with pytest.raises(UserError, match="without a mask loss"):
        load_config(overrides={"loss.dice": False, "loss.pixel": "none"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {decodr: {depth: 2}}", "unknown setting 'model.decodr'"),
        ("model: [1, 2]", "model: a group of settings was expected"),
        ("train: {seed: 1\nloss: ", "line 2"),
        ("- a\n- b", "settings were expected at the top level"),
        ("train: {seed: 1, seed: 2}", "duplicate key"),
        ("preset: papre", "did you mean 'paper'"),
        ("extends: nowhere.yaml", "no such file"),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    if "preset" not in text:
        assert str(tmp_path) in str(caught.value)


def test_a_file_that_extends_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: a.yaml")
    with pytest.raises(UserError, match="extends itself"):
        load_config(tmp_path / "a.yaml")


def test_override_values_are_yaml_1_2() -> None:
    assert parse_override("a=1e-4") == ("a", 1e-4)
    assert parse_override("a=no") == ("a", "no")
    assert parse_override("a=[4, 5]") == ("a", [4, 5])
    assert parse_override("a=b=c") == ("a", "b=c")


OPERATIONAL = {
    "data.workers",
    *(f"{stage}.{name}" for stage in ("pretrain", "train") for name in ("log_every", "checkpoint_every", "keep_checkpoints")),
    *(f"train.{name}" for name in ("checkpoint_activations", "evaluate_every", "evaluate_images", "loggers", "log_project")),
}
"""The settings that cannot change a result."""
COMPANIONS: dict[str, dict[str, Any]] = {
    "train.patience": {"train.evaluate_every": 1000},
    "model.backbone.deformable_version": {"model.backbone.deformable_stages": [5]},
    "model.backbone.weights": {"model.backbone.pretrained": False},
    "model.decoder.deformable_version": {"model.decoder.deformable": True},
    "model.decoder.iam.kind": {"model.decoder.iam.groups": 1},
    "data.crop_limit": {"data.crop": 0.5},
    "data.scale_jitter_max": {"data.scale_jitter_min": 0.1},
    "inference.max_drop": {"inference.engine": "openvino", "inference.precision": "int8"},
    "inference.calibration_images": {"inference.engine": "openvino", "inference.precision": "int8"},
    "loss.dice": {"loss.pixel": "bce"},
    "loss.objectness": {"inference.rescore": False},
    "inference.tile_overlap": {"inference.tile": 64},
}
"""For some settings, other settings that they need to be valid and to have an effect."""


def another(value: Any, annotation: Any) -> Any:
    """Return another valid value of a setting. It depends on the type only, so that a new setting needs no line here."""
    if isinstance(value, bool):
        return not value
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    if choices:
        return next(choice for choice in choices if choice != value)
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value / 2 + 0.01
    if isinstance(value, list):
        item = next(iter(get_args(annotation)), None)
        if get_origin(item) is Literal:
            return value[:-1] or [get_args(item)[-1]]
        return [*value[:-1], another(value[-1], None)] if value and isinstance(value[-1], int) else value[:-1] or [5]
    if isinstance(value, str):
        return f"{value}x"
    inner = next(part for part in get_args(annotation) if part is not type(None))
    kind = get_args(inner)[0] if get_origin(inner) is Annotated else inner
    return {int: 70, float: 0.5, str: "x"}[kind]


@pytest.mark.parametrize("path", sorted(leaf_paths(Config)))
def test_keys_depend_on_all_settings_except_operational_ones(path: str) -> None:
    source = "shapes" if path.startswith("data.shapes.") else "coco"
    companions = {"pretrain.enabled": path != "pretrain.enabled", "data.source": source, **COMPANIONS.get(path, {})}
    base = Config().replace({name: value for name, value in companions.items() if name != path})
    section: Any = Config
    *parents, leaf = path.split(".")
    for name in parents:
        section = section.model_fields[name].annotation
    value = flatten(base.model_dump(mode="json"))[path]
    changed = base.replace({path: another(value, section.model_fields[leaf].annotation)})
    assert changed != base

    def keys(config: Config) -> tuple[str, ...]:
        return config.pretrain_key(), config.train_key(), config.evaluate_key(), config.latency_prefix()

    assert (keys(changed) == keys(base)) == (path in OPERATIONAL)


def test_an_integer_and_the_equal_float_have_the_same_key() -> None:
    one, same = (Config().replace({"train.learning_rate": rate}) for rate in (1, 1.0))
    assert one.evaluate_key() == same.evaluate_key()


def test_neutral_values_do_not_change_the_hash() -> None:
    class Before(Section):
        depth: int = 4

    class After(Section):
        depth: int = 4
        extra: Annotated[bool, Neutral(False)] = False

    assert content_hash(After().content()) == content_hash(Before().content())
    assert content_hash(After(extra=True).content()) != content_hash(Before().content())


def test_batch_advice() -> None:
    def advice(**settings: Any) -> str | None:
        return Config().replace({f"train.{k}": v for k, v in settings.items()}).train.batch_advice()

    assert advice() is None
    assert advice(batch_size=64, accumulate=8) is None
    assert advice(batch_size=16, learning_rate=1.25e-5) is None
    assert "train.learning_rate=1.25e-05" in str(advice(batch_size=16))
