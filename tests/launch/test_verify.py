"""Check that a record's work can be done again."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats

from sparseinst.ablation.plan import make_plan
from sparseinst.ablation.statistics import SeedNoise
from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.study import read_profile, read_tables
from sparseinst.cli import run_cli
from sparseinst.config import Config
from sparseinst.evaluation.predictions import read_predictions
from sparseinst.launch.verify import _noise, _seeds_of, _within_noise
from sparseinst.paths import run_folder

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project in which one row is trained and evaluated at smoke scale."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(EXPERIMENTS, folder / "experiments")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_cli(["run", "table5", "--row", "BCE alone", "--profile", "smoke", "--device", "cpu"]) == 0
    return folder


def keys(folder: Path) -> dict[str, str]:
    plan = make_plan(
        read_tables(["table5"], folder / "experiments"),
        read_profile("smoke", folder / "experiments"),
        Store(folder / "results"),
        row="BCE alone",
        device="cpu",
    )
    return {run.stage: run.key for run in plan.runs.values()}


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_the_same_code_gives_the_same_bits(
    stage: str, done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(done)
    key = keys(done)[stage]
    assert run_cli(["verify", key[:8], "--device", "cpu", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["key"], printed["outcome"]) == (key, "same bits")
    assert any(line.startswith("weights: ") for line in printed["compared"])
    assert not list((done / "runs/verify").iterdir()), "the next verification does the work again"


def test_each_verification_trains_anew(done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(done)
    from sparseinst.training import train

    threads = []
    original = train.train

    def counted(*arguments: object, **settings: object) -> object:
        threads.append(torch.get_num_threads())
        return original(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "train", counted)
    before = torch.get_num_threads()
    try:
        for number in ("1", "2"):
            run_cli(["verify", keys(done)["train"], "--device", "cpu", "--threads", number])
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 2]


def test_another_result_is_reported(done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(done)
    shutil.copytree(done / "results", done / "changed", dirs_exist_ok=True)
    file = done / "changed/records" / f"{keys(done)['evaluate']}.json"
    record = json.loads(file.read_text())
    record["result"]["figures"]["AP"] = 50.0
    record["provenance"]["weights"] = "0" * 16
    del record["checksum"]  # as in a record of an earlier version
    file.write_text(json.dumps(record))
    assert run_cli(["verify", record["key"], "--results", "changed", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "undecided"
    assert "50.0000 in the record" in printed
    assert "the noise of this row is unknown" in printed
    assert "the bits may differ" not in printed


def test_another_processor_is_named(done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(done)
    key = keys(done)["train"]
    found = Store(Path("results")).load(key)
    assert found is not None
    arithmetic = {**found.provenance["arithmetic"], "instructions": "SSE9"}
    Store(Path("elsewhere")).write(replace(found, provenance={**found.provenance, "arithmetic": arithmetic, "weights": "0" * 16}))
    assert run_cli(["verify", key, "--results", "elsewhere", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"the CPU's instructions: \w+ here, SSE9 in the record, so the bits may differ", printed[1])
    assert printed[-1] == "undecided"


def test_metrics_and_resamplings_are_computed_again_from_predictions(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(done)
    key = keys(done)["evaluate"]
    kept = run_folder(key).predictions
    assert run_cli(["verify", key, "--predictions", str(kept), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "same bits"
    found = Store(Path("results")).load(key)
    assert found is not None
    better = {**found.result["figures"], "AP50": 99.0}
    Store(Path("better")).write(replace(found, result={**found.result, "figures": better}))
    assert run_cli(["verify", key, "--results", "better", "--predictions", str(kept)]) == 1
    assert re.search(r"AP50: \S+ here, 99\.0000 in the record", capsys.readouterr().out)
    Store(Path("skipped")).write(replace(found, result={**found.result, "skipped": 1}))
    assert run_cli(["verify", key, "--results", "skipped", "--predictions", str(kept)]) == 2
    assert "the evaluation left out 1 image" in capsys.readouterr().err
    lucky = {name: [100.0] * len(values) for name, values in found.result["resampled"].items()}
    Store(Path("lucky")).write(replace(found, result={**found.result, "resampled": lucky}))
    assert run_cli(["verify", key, "--results", "lucky", "--predictions", str(kept)]) == 1
    assert "resamplings of the images, AP, AP50, AP75, APl, APm, APs differ" in capsys.readouterr().out
    assert run_cli(["verify", keys(done)["train"], "--predictions", str(kept)]) == 2
    assert "only an evaluation" in capsys.readouterr().err
    one = read_predictions(kept)[0]
    changes = ({"image_id": "x"}, {"score": "a"}, {"score": None}, {"category_id": 1.5}, {"segmentation": 3}, {"image_id": 10**9})
    masks = ({"size": [64, 64], "counts": "?" * 9}, {"size": [1, 1], "counts": "abc"}, {"size": [64], "counts": ""})
    wrong = [{**one, **change} for change in (*changes, *({"segmentation": mask} for mask in masks))]
    for content in ("[{}]", "{", "", "[" * 100_000, *(json.dumps([entry]) for entry in wrong)):
        Path("damaged.json").write_text(content)
        assert run_cli(["verify", key, "--predictions", "damaged.json"]) == 2, content
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert run_cli(["verify", key, "--predictions", "nowhere.json"]) == 2
    assert capsys.readouterr().err == "error: nowhere.json: no such file\n"
    assert run_cli(["verify", key, "--predictions", str(kept), "--threads", "2"]) == 2
    Path("damaged.json.gz").write_bytes(kept.read_bytes()[:-20])
    assert run_cli(["verify", key, "--predictions", "damaged.json.gz"]) == 2
    capsys.readouterr()
    Store(Path("elsewhere")).write(replace(found, provenance={**found.provenance, "data": "0" * 16}))
    assert run_cli(["verify", key, "--results", "elsewhere", "--predictions", str(kept)]) == 2
    assert "these are not the annotations of the record" in capsys.readouterr().err


def test_evaluations_without_an_ap_say_nothing_about_the_noise(tmp_path: Path) -> None:
    store, config = Store(tmp_path), Config().model_dump(mode="json")
    records = [Record("evaluate", str(number), {"figures": {"AP": ap}}, config) for number, ap in enumerate((None, 30.0, 31.0))]
    other = Config().replace({"model.decoder.depth": 2}).model_dump(mode="json")
    for record in (*records, Record("evaluate", "9", {"figures": {"AP": 50.0}}, other)):
        store.write(record)
    assert _seeds_of(records[1], store) == (30.0, 31.0)
    noise = _noise(records[1], store)
    assert noise is not None
    assert noise.variance == 0.5
    same = Store(tmp_path / "same")
    for record in (records[1], replace(records[2], result={"figures": {"AP": 30.0}})):
        same.write(record)
    assert _noise(records[1], same) is None, "two seeds with the same AP show no noise, and not that there is none"


def test_noise_is_that_of_two_seeds() -> None:
    lines: list[str] = []
    noise = SeedNoise(1.0, 8.0, 3)
    limit = float(stats.t.ppf(0.975, 8)) * math.sqrt(2)  # 3.26
    assert _within_noise(30.0, 30.0 + limit - 0.01, noise, lines) == "same within noise"
    assert _within_noise(30.0, 30.0 + limit + 0.01, noise, lines) == "different"
    assert _within_noise(30.0, 30.1, None, lines) == "undecided"
    assert "unknown" in lines[-1]


def test_what_cannot_be_verified_is_refused(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(done)
    Store(Path("results")).write(Record("peer", "peer-x", {"peer": "x", "short_side": 1}))
    Store(Path("results")).write(Record("evaluate", "evaluate-x", {"figures": {"AP": 1.0}}))
    assert run_cli(["verify", "evaluate-x"]) == 2
    assert "its record holds no config" in capsys.readouterr().err
    assert run_cli(["verify", "nothing"]) == 2
    assert "there is no such record in results/records" in capsys.readouterr().err
    assert run_cli(["verify", "peer-x"]) == 2
    assert "cannot be verified" in capsys.readouterr().err
    Store(Path("results")).write(Record("evaluate", "evaluate-y", {"figures": {"AP": 1.0}}))
    assert run_cli(["verify", "evaluate-"]) == 2
    assert "records have keys with this beginning" in capsys.readouterr().err
