"""Check how a plan runs: once, in several processes, with failures and damaged records. Check its status and its report."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from sparseinst.ablation import provenance
from sparseinst.ablation.plan import Plan, make_plan
from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.study import read_profile, read_tables
from sparseinst.attempts import Attempt, Superseded
from sparseinst.cli import run_cli
from sparseinst.errors import RunFailed
from sparseinst.inference.weights import load_weights, save_weights
from sparseinst.launch import work
from sparseinst.launch.run import _outcome, run_plan
from sparseinst.launch.status import plan_status
from sparseinst.launch.work import StageContext, do_stage
from sparseinst.paths import RunPaths, run_folder
from sparseinst.report.collect import read_results

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder that links to the project's specs."""
    (tmp_path / "experiments").symlink_to(EXPERIMENTS)
    monkeypatch.chdir(tmp_path)


def smoke(store: Store, *tables: str, row: str | None = None) -> Plan:
    return make_plan(read_tables(tables, EXPERIMENTS), read_profile("smoke", EXPERIMENTS), store, row=row, device="cpu")


@pytest.mark.slow
def test_every_row_of_every_table_builds_trains_and_is_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    """The test runs the whole study at smoke scale. A second call does nothing, and the report has a value in every cell."""
    assert run_cli(["run", "all", "--profile", "smoke", "--device", "cpu"]) == 0
    plan = smoke(Store(), "all")
    capsys.readouterr()
    assert run_cli(["run", "all", "--profile", "smoke", "--device", "cpu"]) == 0
    assert f"{len(plan.runs)} runs done, {len(plan.runs)} of them before this command" in capsys.readouterr().out
    assert not plan.to_do()
    records = [Store().load(key) for key in plan.runs]
    for record in records:
        assert record is not None
        assert record.config["train"]["iterations"] == 2
        about = record.provenance
        assert {"commit", "versions", "device", "seed", "seconds", "profile", "data", "processor", "command"} <= set(about)
        assert about["arithmetic"]["threads"] >= 1
        if record.kind == "evaluate":
            assert about["training"] in plan.runs
            assert len(about["images"]) == 16
            assert len(record.result["resampled"]["AP"]) == 400

    assert run_cli(["report", "--profile", "smoke"]) == 0
    for table in Path("results/tables").glob("*.md"):
        assert "pending" not in table.read_text()
    files = {path: path.read_bytes() for path in Path("results").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run_cli(["report", "--profile", "smoke"]) == 0
    assert "no file changed" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in Path("results").rglob("*") if path.is_file()} == files
    for name in ("table8-smoke-modules", "figure1-smoke-speed-accuracy", "table5-smoke-differences"):
        assert (Path("results/figures") / f"{name}.png").stat().st_size > 5000
    assert run_cli(["status", "--profile", "smoke"]) == 0
    assert f"all {len(plan.runs)} runs are done: " in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_share_the_work() -> None:
    """Both processes succeed, and each stage is begun once."""
    command = [sys.executable, "-m", "sparseinst", "run", "table5", "--profile", "smoke", "--device", "cpu"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    begun = [line.split(": ")[-1] for out, _ in outputs for line in out.splitlines() if line.startswith("[")]
    assert sorted(begun) == sorted(smoke(Store(), "table5").runs)


@pytest.mark.slow
def test_jobs_run_in_separate_processes(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "table5", "--profile", "smoke", "--row", "dice", "--jobs", "2", "--device", "cpu"]
    assert run_cli(command) == 0
    assert "all 7 runs are done: 1 pretrain, 3 train, 3 evaluate\n" in capsys.readouterr().out
    output = "".join(path.read_text() for path in Path("runs").glob("process-*.txt"))
    assert output.count("done in") == 7


@pytest.mark.slow
def test_a_failure_is_reported_and_does_not_stop_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    train = work._DO["train"]

    def failing(run: object, *rest: object) -> object:
        if "focal" in run.label:  # type: ignore[attr-defined]
            raise RuntimeError("the card fell out\nof its slot")
        return train(run, *rest)  # type: ignore[arg-type]

    monkeypatch.setitem(work._DO, "train", failing)
    plan = smoke(Store(), "table5")
    failed = run_plan(plan, Store(), device="cpu", progress=False)
    reasons = ["RuntimeError: the card fell out", f"it needs the weights of {next(iter(failed))}, which failed"]
    assert sorted(failed.values()) == sorted(reasons)
    states = {status.run.key: status for status in plan_status(smoke(Store(), "table5"))}
    assert sum(status.state == "done" for status in states.values()) == 7
    assert [s.reason for s in states.values() if s.state == "failed"] == ["RuntimeError: the card fell out"]
    assert run_cli(["report", "table5", "--profile", "smoke"]) == 0
    assert "failed" in Path("results/tables/table5-smoke.md").read_text()

    monkeypatch.setitem(work._DO, "train", train)
    capsys.readouterr()
    assert run_cli(["run", "table5", "--profile", "smoke", "--device", "cpu"]) == 0
    assert "7 of them before" in capsys.readouterr().out


def test_exit_code_of_a_failed_run(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/data/shapes-smoke").mkdir(parents=True)
    Path("runs/data/shapes-smoke/mine.txt").write_text("not a data set")
    assert run_cli(["run", "table5", "--profile", "smoke", "--row", "dice alone", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "something other than a shapes set" in error
    assert "3 of 3 runs failed" in error
    assert Path("runs/data/shapes-smoke/mine.txt").exists()


def test_a_damaged_record_is_reported_renamed_and_done_again(caplog: pytest.LogCaptureFixture) -> None:
    store = Store()
    plan = smoke(store, "table5", row="dice alone")
    run_plan(plan, store, device="cpu", progress=False)
    key = next(run.key for run in plan.runs.values() if run.stage == "evaluate")
    whole = store.path(key).read_text()
    store.path(key).write_text(whole[:100])
    assert run_cli(["report", "table5", "--profile", "smoke"]) == 0
    assert f"{key}.json is damaged" in caplog.text
    assert store.path(key).with_suffix(".damaged").read_text() == whole[:100]
    run_plan(smoke(store, "table5", row="dice alone"), store, device="cpu", progress=False)
    again = store.load(key)
    assert again is not None
    assert again.result == json.loads(whole)["result"]


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"kind": "evaluate", "key": "k", "result": {}}',
        '{"kind": "x", "key": "k", "result": {}}',
        "\xff",
        '{"kind": "evaluate", "key": "k", "result": {"figures": {"AP": "high"}}}',
        '{"kind": "evaluate", "key": "another", "result": {"figures": {"AP": 1.0}}}',
    ],
)
def test_a_file_that_is_no_record_is_renamed(content: str, caplog: pytest.LogCaptureFixture) -> None:
    store = Store()
    store.folder.mkdir(parents=True)
    store.path("k").write_bytes(content.encode("latin-1"))
    assert store.load("k") is None
    assert "k.json is damaged" in caplog.text
    assert store.path("k").with_suffix(".damaged").read_bytes() == content.encode("latin-1")


def test_missing_weights_are_trained_again(caplog: pytest.LogCaptureFixture) -> None:
    store = Store()
    plan = smoke(store, "table5", row="dice alone")
    run_plan(plan, store, device="cpu", progress=False)
    start, train, evaluation = plan.runs.values()
    evaluated, recorded = store.load(evaluation.key), store.path(train.key).read_bytes()
    store.path(evaluation.key).unlink()
    for run in (start, train):
        (Path("runs") / run.key / "model.safetensors").unlink()
        for checkpoint in (Path("runs") / run.key / "checkpoints").iterdir():
            checkpoint.unlink()
    run_plan(smoke(store, "table5", row="dice alone"), store, device="cpu", progress=False)
    assert f"the weights of train {train.key} are gone" in caplog.text
    assert f"the weights of pretrain {start.key} are gone" in caplog.text
    assert store.path(train.key).read_bytes() == recorded, "the record does not change"
    store.path(train.key).unlink()
    run_plan(smoke(store, "table5", row="dice alone"), store, device="cpu", progress=False)
    record = store.load(train.key)
    assert record is not None
    assert record.provenance["seconds"] == record.result["seconds"] > 0.01, "the time of the training, not of the second call"
    again = store.load(evaluation.key)
    assert again is not None
    assert evaluated is not None
    assert again.result == evaluated.result


def test_concurrent_writers_leave_complete_records() -> None:
    store = Store()
    record = Record("train", "0" * 16, {"steps": 1, "values": list(range(1000))})
    threads = [threading.Thread(target=store.write, args=(record,)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.load(record.key) == record
    assert [path.name for path in store.folder.iterdir()] == [f"{record.key}.json"]
    store.write(Record("train", "0" * 16, {"steps": 1, "values": []}))
    assert store.load(record.key) == record, "an existing record is never changed"


def test_a_plan_over_the_budget_is_refused_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["run", "all", "--profile", "coco", "--budget", "100", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "over the budget of 100: nothing was started" in error
    assert re.search(r"costs about \d,\d{3}\.\d GPU-hours", error), "a large number has separators of thousands"
    assert not Path("runs").exists()


def test_status_and_logs_of_an_interrupted_training(capsys: pytest.CaptureFixture[str]) -> None:
    store = Store()
    key = next(run.key for run in smoke(store, "table5", row="dice alone").runs.values() if run.stage == "train")
    folder = Path("runs") / key
    folder.mkdir(parents=True)
    attempt = Attempt.begin(RunPaths(folder))
    about = json.loads(attempt.paths.attempt(1).read_text())
    attempt.paths.attempt(1).write_text(json.dumps({**about, "process": "a process that is gone"}))
    (folder / "metrics.jsonl").write_text('{"iteration": 1, "loss": 3.0, "seconds": 60.0}\n{"iterat')
    (folder / "log.txt").write_text("step 1/2\n")
    assert run_cli(["status", "table5", "--profile", "smoke", "--json", "--device", "cpu"]) == 0
    runs = {run["key"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert (runs[key]["state"], runs[key]["progress"]) == ("interrupted", 0.5)
    assert sorted(run["state"] for run in runs.values()) == ["interrupted"] + ["pending"] * 8
    assert run_cli(["logs", key[:6], "--profile", "smoke"]) == 0
    assert capsys.readouterr().out == "step 1/2\n"
    assert run_cli(["logs", "no such", "--profile", "smoke"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "tabel5"], "did you mean 'table5'"),
        (["run", "table5", "--profile", "mimi"], "did you mean 'mini'"),
        (["run", "table5", "--row", "no such"], "no row is called 'no such' (rows: BCE alone"),
        (["plan", "nowhere/x.yaml"], "no such table"),
        (["plan", "--device", "cuda:x"], "device 'cuda:x': cpu, cuda or cuda:1 was expected"),
        (["run", "table5", "--results", "experiments/table5.yaml"], "is not a folder; choose another one"),
        (["plan", "--profile", "nowhere/p.yaml"], "no such profile"),
    ],
)
def test_mistakes_give_one_line_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error


def test_a_record_names_the_code_that_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not name the code that finds the training done, for example for another results folder after a commit."""
    commit = {"commit": "a" * 40, "changes": None}
    monkeypatch.setattr(provenance, "code_version", lambda: commit)
    store = Store(Path("first"))
    run_plan(smoke(store, "table5", row="dice alone"), store, device="cpu", progress=False)
    commit = {"commit": "b" * 40, "changes": None}
    other = Store(Path("second"))
    run_plan(smoke(other, "table5", row="dice alone"), other, device="cpu", progress=False)
    commits = {}
    for key in sorted(other.keys()):
        record = other.load(key)
        assert record is not None
        commits[record.kind] = record.provenance["commit"][0]
        if record.kind == "evaluate":
            assert record.provenance["trained"]["commit"][0] == "a"
    assert commits == {"pretrain": "a", "train": "a", "evaluate": "b"}
    [table] = read_results(["table5"], "smoke", Path("second"), {})
    assert any("aaaaaaaaaa, bbbbbbbbbb" in fact for fact in table.provenance)
    # A training that was stopped and continued with other code names both.
    [train] = [run.key for run in smoke(other, "table5", row="dice alone").runs.values() if run.stage == "train"]
    paths = run_folder(train)
    provenance.note_code(paths)
    assert provenance.trained_by(paths)["commit"][0] == "b"
    assert [code["commit"][0] for code in provenance.trained_by(paths)["earlier"]] == ["a"]
    with paths.code.open("a") as file:
        file.write('{"commit": "c')  # killed while it wrote
    assert provenance.trained_by(paths)["commit"] is None
    provenance.note_code(paths)
    assert provenance.trained_by(paths)["commit"][0] == "b"
    paths.code.unlink()
    assert provenance.trained_by(paths)["commit"] is None, "unknown for a run without code.jsonl"


def test_a_stage_on_another_device_than_its_key_names_is_refused() -> None:
    """The driver also sees GPUs that are hidden from torch; a time of the CPU must not become that of a card."""
    [run] = [run for run in smoke(Store(), "table8", row="512").runs.values() if run.stage == "latency"]
    with pytest.raises(RunFailed, match="torch uses .*, but the driver names NVIDIA H100 80GB HBM3: give --device cpu"):
        do_stage(run, Store(), StageContext("smoke", "cpu", "NVIDIA H100 80GB HBM3"))
    assert not Store().has(run.key)


def test_code_inside_another_projects_repository_is_not_that_projects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment often lies inside the user's repository, which ignores it."""
    package = tmp_path / ".venv" / "sparseinst"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / ".gitignore").write_text(".venv\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", ".gitignore"], [*who, "commit", "-qm", "mine"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "PACKAGE", package)
    found = provenance.code_version.__wrapped__()
    assert (found["commit"], found["changes"]) == (None, provenance.code_digest())
    (tmp_path / ".gitignore").unlink()
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    subprocess.run(["git", *who, "commit", "-qm", "tracked"], cwd=tmp_path, check=True)
    found = provenance.code_version.__wrapped__()
    assert len(str(found["commit"])) == 40
    assert found["changes"] is None


@pytest.mark.parametrize("line", [b"5", b'"x"', b"[]", b"\xff", b"[" * 100_000, b'{"commit": 5}', b'{"versions": null}'])
def test_a_damaged_line_of_the_code_counts_as_unknown(line: bytes, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    known = {"commit": "a" * 40, "changes": None, "versions": {"torch": "9"}}
    unknown = {"commit": None, "changes": None, "versions": {}}
    paths.code.write_bytes(line + b"\n" + json.dumps(known).encode() + b"\n")
    assert provenance.trained_by(paths) == {**known, "earlier": [unknown]}
    paths.code.write_bytes(line)
    assert provenance.trained_by(paths) == unknown


def test_an_evaluation_without_objects_has_no_ap(capsys: pytest.CaptureFixture[str]) -> None:
    store = Store()
    plan = smoke(store, "table5", row="dice alone")
    [evaluation] = [run for run in plan.runs.values() if run.stage == "evaluate"]
    store.write(Record("evaluate", evaluation.key, {"figures": {"AP": None}, "images": 1}))
    assert "no AP" in _outcome(evaluation, store)


def test_weights_that_are_not_those_of_the_record_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    store = Store()
    plan = smoke(store, "table5", row="dice alone")
    run_plan(plan, store, device="cpu", progress=False)
    _, train, evaluation = plan.runs.values()
    model, config, categories = load_weights(run_folder(train.key).root)
    state = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
    save_weights(run_folder(train.key).weights, state, config, categories)
    store.path(evaluation.key).unlink()
    assert run_cli(["run", "table5", "--profile", "smoke", "--row", "dice alone", "--device", "cpu"]) == 1
    assert f"these are not the weights of the record {train.key}" in capsys.readouterr().err
    assert not store.has(evaluation.key)
    assert run_cli(["evaluate", "--weights", str(run_folder(train.key).root), "--device", "cpu"]) == 2
    assert "these are not the weights of the record" in capsys.readouterr().err
    run_folder(train.key).weights.unlink()
    assert run_cli(["run", "table5", "--profile", "smoke", "--row", "dice alone", "--device", "cpu"]) == 0


def test_a_run_that_another_process_took_over_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    plan = smoke(store, "table5", row="dice alone")
    do, fenced = work._DO["train"], []

    def once(*arguments: Any) -> Any:
        if not fenced:
            fenced.append(True)
            raise Superseded("a newer attempt has taken over")
        return do(*arguments)

    monkeypatch.setitem(work._DO, "train", once)
    assert run_plan(plan, store, device="cpu", progress=False) == {}
    assert fenced
    assert all(store.has(key) for key in plan.runs)


def test_run_does_a_stage_again_whose_record_is_damaged() -> None:
    store = Store()
    plan = smoke(store, "table5", row="dice alone")
    run_plan(plan, store, device="cpu", progress=False)
    results = {key: json.loads(store.path(key).read_text())["result"] for key in plan.runs if store.path(key).exists()}
    [key] = [run.key for run in plan.runs.values() if run.stage == "evaluate"]
    store.path(key).write_text(store.path(key).read_text()[:200])
    assert run_cli(["run", "table5", "--profile", "smoke", "--row", "dice alone", "--device", "cpu"]) == 0
    assert {key: json.loads(store.path(key).read_text())["result"] for key in results} == results


def test_records_that_cannot_be_written_are_refused_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    Path("results").mkdir()
    Path("results/records").write_text("a file instead of a folder")
    assert run_cli(["run", "table5", "--profile", "smoke", "--device", "cpu"]) == 2
    assert "results/records" in capsys.readouterr().err
    assert not Path("runs").exists()
