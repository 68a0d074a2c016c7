"""Check specs and profiles: the paper's counts, golden keys, mistakes, and a new table without code."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparseinst.ablation.plan import StageRun, as_json, costs, make_plan, needed_key, show
from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.study import Profile, list_tables, overruled, read_profile, read_spec, read_tables, row_config
from sparseinst.cli import run_cli
from sparseinst.config import Config
from sparseinst.errors import UserError
from sparseinst.evaluation.coco_metrics import FIGURES
from sparseinst.launch.status import plan_status
from sparseinst.overrides import load_config
from sparseinst.paths import run_folder
from sparseinst.report.collect import collect, typical_noises

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
ABLATIONS = [f"table{number}" for number in range(2, 8)]
PROFILES = ("coco", "mini", "smoke")


@pytest.mark.parametrize("profile", PROFILES)
def test_the_number_of_trainings_and_evaluations(profile: str, tmp_path: Path) -> None:
    """28 rows share 20 trainings and 21 evaluations: six tables contain the default, and Table 7 repeats rows of Table 4."""
    plan = make_plan(read_tables(ABLATIONS, EXPERIMENTS), read_profile(profile, EXPERIMENTS), Store(tmp_path), device="cpu")
    count = {stage: sum(run.stage == stage for run in plan.runs.values()) for stage in ("train", "evaluate")}
    assert (len(plan.rows), count) == (28, {"train": 20, "evaluate": 21})


def test_each_seed_is_trained_but_latency_is_measured_once(tmp_path: Path) -> None:
    tables = read_tables(["table4"], EXPERIMENTS)
    plan = make_plan(tables, read_profile("mini", EXPERIMENTS), Store(tmp_path), seeds=range(3), device="cpu")
    stages = [run.stage for run in plan.runs.values()]
    assert (stages.count("train"), stages.count("evaluate"), stages.count("latency")) == (18, 18, 6)


def test_golden_keys() -> None:
    """If a key changes, no existing record is found. Give a new field a `Neutral` value, and avoid changing a default."""
    config = Config()
    assert (config.train_key(), config.evaluate_key()) == ("f6658b6ecf78c55f", "9f1c454959378ab9")
    assert config.latency_key("NVIDIA GeForce RTX 2080 Ti") == "3484bf5f2d9914a1-e4881650"
    spec = read_spec("table4", EXPERIMENTS)
    mini = row_config(spec, spec.rows[5], read_profile("mini", EXPERIMENTS))
    assert (mini.train_key(), mini.evaluate_key()) == ("1b44c2bc421a7e8e", "cd7aa0a671ab21d9")
    small = row_config(spec, spec.rows[5], read_profile("small", EXPERIMENTS))
    keys = (small.pretrain_key(), small.train_key(), small.evaluate_key())
    assert keys == ("0fdb07248472ec72", "73ac9a30b3a05251", "d9cc08d18b55140d")


def test_the_key_of_a_stage_depends_only_on_settings_that_can_change_it() -> None:
    config = Config()

    def keys(**settings: object) -> tuple[bool, bool, bool]:
        other = config.replace({name.replace("__", "."): value for name, value in settings.items()})
        return (
            other.train_key() != config.train_key(),
            other.evaluate_key() != config.evaluate_key(),
            other.latency_key("x") != config.latency_key("x"),
        )

    assert keys(inference__rescore=False) == (False, True, True)
    assert keys(data__val_limit=5) == (False, True, False)
    assert keys(data__flip=0.0) == (True, True, False)
    assert keys(train__seed=1) == (True, True, False)
    assert keys(model__decoder__depth=2) == (True, True, True)
    assert keys(model__backbone__pretrained=False) == (True, True, False)
    assert keys(data__workers=7) == (False, False, False)
    assert config.latency_key("a").split("-")[0] == config.latency_key("b").split("-")[0] == config.latency_prefix()


def test_with_patience_everything_that_changes_an_evaluation_changes_the_training() -> None:
    """The evaluations decide when it ends."""
    patient = Config().replace({"train.patience": 2, "train.evaluate_every": 100})
    for changes in ({"inference.short_side": 512}, {"data.val_limit": 50}):
        assert patient.replace(changes).train_key() != patient.train_key()
        assert Config().replace(changes).train_key() == Config().train_key()


def test_a_training_that_starts_from_weights_needs_no_pretraining() -> None:
    config = Config().replace({"pretrain.enabled": True, "train.start": "mine.safetensors"})
    assert needed_key(config, "train") is None
    assert config.replace({"pretrain.iterations": 7000}).train_key() == config.train_key()
    assert needed_key(config.replace({"train.start": None}), "train") is not None


def test_keys_depend_on_the_scaled_channels_and_sides() -> None:
    half = Config().replace({"model.width_factor": 0.5, "inference.size_factor": 0.5})
    spelled = {"encoder.channels": 128, "decoder.width": 128, "decoder.kernel_dim": 64}
    plain = Config().replace({f"model.{name}": value for name, value in spelled.items()})
    plain = plain.replace({"inference.short_side": 320, "inference.long_side": 426})
    assert (half.train_key(), half.evaluate_key()) == (plain.train_key(), plain.evaluate_key())


@pytest.mark.parametrize("table", list_tables(EXPERIMENTS))
def test_every_row_fits_every_profile(table: str) -> None:
    spec = read_spec(table, EXPERIMENTS)
    profiles = [file.stem for file in (EXPERIMENTS / "profiles").glob("*.yaml")]
    assert {*PROFILES, "small", "nuclei"} <= set(profiles)
    for profile in profiles:
        for row in spec.rows:
            config = row_config(spec, row, read_profile(profile, EXPERIMENTS))
            assert Config.model_validate_json(config.to_json()) == config


@pytest.mark.parametrize("number", range(1, 9))
def test_every_row_of_the_papers_tables_has_the_papers_values(number: int) -> None:
    assert all(row.paper for row in read_spec(f"table{number}", EXPERIMENTS).rows)


SPEC = """\
title: My ablation
columns: [heads]
figures: [AP]
reference: four
rows:
  - name: four
    labels: {heads: 4}
    set: {model.decoder.iam.kind: cross_attention}
  - name: eight
    labels: {heads: 8}
    set: {model.decoder.iam.kind: cross_attention, model.decoder.iam.heads: 8}
"""


def test_a_new_table_needs_only_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(SPEC)
    plan = make_plan(read_tables([str(tmp_path / "mine.yaml")]), Profile(name="p"), Store(tmp_path), device="cpu")
    assert [run.stage for run in plan.runs.values()] == ["train", "train", "evaluate", "evaluate"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("reference: four", "reference: four\nmeasures: [evaluate]", "measures: evaluate needs the weights of train"),
        ("iam.heads: 8", "iam.head: 8", r"mine.yaml: row 'eight': unknown setting 'model.decoder.iam.head' \(did you mean"),
        ("iam.heads: 8", "iam.heads: eight", r"mine.yaml: row 'eight': model.decoder.iam.heads: input should be .*'eight'"),
        ("iam.heads: 8", "iam.heads: 7", r"mine.yaml: row 'eight': .*heads=7 does not divide"),
        ("labels: {heads: 8}", "label: {heads: 8}", r"mine.yaml: row 'eight': label: unknown setting \(did you mean 'labels'"),
        ("labels: {heads: 8}", "labels: {head: 8}", r"row 'eight': no column is called 'head' \(did you mean 'heads'"),
        ("reference: four", "reference: 128", r'reference: input should be a valid string, got 128: write "128" in quotes'),
        ("reference: four", "reference: for", r"no row is called 'for' \(did you mean 'four'"),
        ("figures: [AP]", "figures: [mAP]", "figures.0"),
        ("name: eight", "name: four", "two rows are called 'four'"),
        ("title: My ablation", "title: [", "line"),
    ],
)
def test_a_mistake_in_a_spec_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SPEC.replace(old, new))
    with pytest.raises(UserError, match=message) as caught:
        read_spec(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("profile", ["coco", "small", "mini"])
def test_the_example_in_the_docs_can_be_planned(tmp_path: Path, profile: str) -> None:
    """Its three rows differ under every profile."""
    page = (EXPERIMENTS.parent / "docs/tables.md").read_text(encoding="utf-8")
    (tmp_path / "kernels.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    plan = make_plan(read_tables(["kernels"], tmp_path), read_profile(profile, EXPERIMENTS), Store(tmp_path), device="cpu")
    channels = [run.config.model.scaled().decoder.kernel_dim for run in plan.runs.values() if run.stage == "train"]
    assert channels == [round(run * (1 if profile == "coco" else 0.25)) for run in (64, 128, 256)]


def test_an_unknown_name_is_answered_with_the_nearest_valid_name() -> None:
    with pytest.raises(UserError, match="did you mean 'table5'"):
        read_spec("tabel5", EXPERIMENTS)
    with pytest.raises(UserError, match="did you mean 'mini'"):
        read_profile("mimi", EXPERIMENTS)


def test_a_mistake_in_a_profile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("train: {iteration: 5}\n")
    with pytest.raises(UserError, match=r"p.yaml: unknown setting 'train.iteration' \(did you mean 'train.iterations'"):
        read_profile(str(path))
    path.write_text("cost: {unit: GPU-hours, train: -1, evaluate: 0, latency: 0, source: x}\n")
    with pytest.raises(UserError, match="cost.train"):
        read_profile(str(path))


def test_costs_come_from_records_of_the_same_profile_and_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path)
    profile = read_profile("coco", EXPERIMENTS)

    def plan_again() -> object:
        return make_plan(read_tables(["table5"], EXPERIMENTS), profile, store, device="cpu")

    plan = make_plan(read_tables(["table5"], EXPERIMENTS), profile, store, device="cpu")
    assert costs(plan, store).of(plan.to_do()) == pytest.approx(4 * 368 + 4 * 0.2)
    done, elsewhere = plan.to_do()[:2]
    about = {"profile": "coco", "device": plan.device, "seconds": 3600.0, "world_size": 8}
    store.write(Record("train", done.key, {"steps": 1}, provenance=about))
    store.write(Record("train", elsewhere.key, {"steps": 1}, provenance={**about, "device": "another", "seconds": 1.0}))
    for key in (done.key, elsewhere.key):
        run_folder(key).root.mkdir(parents=True)
        run_folder(key).weights.touch()
    plan = make_plan(read_tables(["table5"], EXPERIMENTS), profile, store, device="cpu")
    cost = costs(plan, store)
    assert (cost.hours["train"], cost.measured["train"]) == (8.0, 1)
    data = json.loads(json.dumps(as_json(plan, cost)))
    assert data["total"] == {"to_do": 6, "cost_hours": pytest.approx(16.8), "unit": "GPU-hours"}
    assert {stage["done"] for stage in data["stages"]} == {True, False}
    run_folder(done.key).weights.unlink()
    again = make_plan(read_tables(["table5"], EXPERIMENTS), profile, store, device="cpu")
    assert [run.key for run in again.runs.values() if run.remake] == [done.key], "an evaluation needs the deleted weights"
    assert (len(again.to_do()), costs(again, store).hours["train"]) == (7, 8.0)
    run_folder(done.key).weights.touch()
    assert plan_again() == plan


def test_a_plan_of_many_rows_is_shown_by_table_and_in_linear_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    store, profile = Store(tmp_path), read_profile("coco", EXPERIMENTS)
    tables = read_tables(["table5", "table6"], EXPERIMENTS)
    few = make_plan(tables, profile, store, seeds=range(2), device="cpu")
    cost = costs(few, store)
    show(few, cost)
    assert "dice + BCE" in capsys.readouterr().out
    # Each stage of the plan is looked up by its key, and never compared with the others.
    monkeypatch.setattr(StageRun, "__eq__", lambda *_: pytest.fail("stages are compared"))
    many = make_plan(tables, profile, store, seeds=range(60), device="cpu")
    show(replace(many, done={key for key, run in many.runs.items() if run.config.train.seed < 2}), cost)
    printed = capsys.readouterr().out
    assert "dice + BCE" not in printed
    assert re.search(r"table5 +│ 4 +│ 60 +│ 8 of 240 done", printed)
    assert "rows are too many to show; --json lists them all" in printed


RESULTS: dict[str, dict[str, Any]] = {
    "train": {"steps": 1, "seconds": 1.0, "losses": {"loss": 1.0}},
    "evaluate": {"figures": dict.fromkeys(FIGURES, 10.0), "images": 4, "skipped": 0},
    "latency": {"whole_ms": dict.fromkeys(("median", "mean", "p5", "p95"), 20.0)},
}


@pytest.mark.slow
def test_fast_with_many_records(tmp_path: Path) -> None:
    """With 10,000 records, ten seeds of every row among them, planning, status and collecting take less than 2 s each.

    The test measures CPU time, so that a busy machine does not matter.
    """
    store = Store(tmp_path)
    store.folder.mkdir(parents=True)
    tables, profile = read_tables(["all"], EXPERIMENTS), read_profile("coco", EXPERIMENTS)
    config = Config().model_dump(mode="json")
    for run in make_plan(tables, profile, store, seeds=range(10), device="cpu").runs.values():
        store.write(Record(run.stage, run.key, RESULTS[run.stage], config))
    whole = json.dumps({"kind": "train", "key": "", "result": RESULTS["train"], "config": config})
    for number in range(10_000 - len(store.keys())):
        (store.folder / f"{number:016x}.json").write_text(whole)
    began = time.process_time()
    plan = make_plan(tables, profile, store, device="cpu")
    planned = time.process_time()
    states = plan_status(plan)
    checked = time.process_time()
    keys = store.keys()
    typical = typical_noises(tables, profile, store, keys)
    results = [collect(table, profile, store, {}, typical, keys) for table in tables]
    collected = time.process_time()
    assert {status.state for status in states} == {"done"}
    values = [cell.measured.values for result in results for row in result.rows for cell in row.cells.values() if cell.measured]
    assert sum(len(each) == 10 for each in values) > 100, "the records of all seeds are loaded"
    assert max(planned - began, checked - planned, collected - checked) < 2


def test_seeds_change_nothing_else_in_a_rows_config() -> None:
    """Configs are built once for all seeds, and a changed spec or profile is another row."""
    spec, profile = read_spec("table5"), read_profile("mini")
    config = row_config(spec, spec.rows[0], profile)
    for seed in (0, 3):
        expected = config.model_dump(mode="json")
        expected["train"]["seed"] = seed
        found = row_config(spec, spec.rows[0], profile, seed)
        assert found == Config.model_validate_json(json.dumps(expected))
        assert found.evaluate_key(found.train_key()) == found.evaluate_key()
        assert config.keys_of_seeds([7, seed])[seed] == (found.train_key(), found.evaluate_key())
    settings = {**profile.settings, "loss": {"pixel_weight": 7.0}}
    other = Profile(name=profile.name, settings=settings, backbones=profile.backbones)
    assert row_config(spec, spec.rows[0], other).loss.pixel_weight == 7.0


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {seed: 1}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\n")
    assert load_config(tmp_path / "child.yaml").train.seed == 1
    (tmp_path / "base.yaml").write_text("train: {seed: 23}\n")
    assert load_config(tmp_path / "child.yaml").train.seed == 23


def test_tables_and_profiles_with_the_same_name_are_refused(tmp_path: Path) -> None:
    """Their results would be written to the same file."""
    for folder in ("own", "other"):
        (tmp_path / folder / "profiles").mkdir(parents=True)
    shipped = EXPERIMENTS / "table5.yaml"
    same = tmp_path / "own/table5.yaml"
    same.write_text(shipped.read_text())
    with pytest.raises(UserError, match="is called 'table5' too"):
        read_tables([str(same)])
    profile = tmp_path / "own/mini.yaml"
    profile.write_text("train: {iterations: 3}\n")
    with pytest.raises(UserError, match="is called 'mini' too"):
        read_profile(str(profile))
    first, second = tmp_path / "own/mine.yaml", tmp_path / "other/mine.yaml"
    first.write_text(shipped.read_text())
    second.write_text(shipped.read_text().replace("hybrid", "other"))
    with pytest.raises(UserError, match="another of these tables is called 'mine' too"):
        read_tables([str(first), str(second)])
    assert [table.name for table in read_tables([str(first), str(shipped), "table5"])] == ["mine", "table5"]


def test_settings_that_a_profile_overrules_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "rates.yaml"
    spec.write_text(
        "title: rates\ncolumns: [rate]\nfigures: [AP]\nrows:\n"
        "- {name: low, labels: {rate: 1.0e-5}, set: {train.learning_rate: 1.0e-5}}\n"
        "- {name: deep, labels: {rate: 5.0e-5}, set: {model.decoder.depth: 2}}\n"
    )
    [table] = read_tables([str(spec)])
    assert overruled(table.spec, read_profile("mini")) == {"train.learning_rate": ["low"]}
    assert overruled(table.spec, read_profile("coco")) == {}
    assert run_cli(["plan", str(spec), "--profile", "mini", "--results", str(tmp_path)]) == 0
    assert "profile mini sets train.learning_rate, so the values in these rows have no effect" in capsys.readouterr().err
    spec.write_text(spec.read_text().replace("train.learning_rate: 1.0e-5", "train.seed: 3"))
    with pytest.raises(UserError, match="row 'low': train.seed: seeds are not a row's"):
        read_tables([str(spec)])
