"""Check that rows are timed by turns, and that results can be set aside and measured again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparseinst.ablation import provenance
from sparseinst.ablation.plan import Plan, by_other_code, make_plan, unused_records
from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.study import read_profile, read_tables
from sparseinst.attempts import Attempt, Superseded
from sparseinst.cli import run_cli
from sparseinst.launch import status, timing
from sparseinst.paths import RETIRED, run_folder
from tests.launch.conftest import EXPERIMENTS
from tests.records import write_records

pytestmark = pytest.mark.usefixtures("own_folder")


def smoke(*tables: str) -> Plan:
    return make_plan(read_tables(tables, EXPERIMENTS), read_profile("smoke", EXPERIMENTS), Store(), device="cpu")


def record_of(key: str) -> Record:
    record = Store().load(key)
    assert record is not None
    return record


@pytest.mark.slow
def test_rows_are_timed_by_turns(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that were timed together share a session; a table whose rows were not says so and how to mend it."""
    command = ["run", "table8", "--profile", "smoke", "--device", "cpu"]
    assert run_cli(command) == 0
    printed = capsys.readouterr().out
    assert "[1/2] latency of 2 rows, by turns" in printed
    assert printed.count(" ms\n") == 2
    keys = [run.key for run in smoke("table8").runs.values()]
    assert len({record_of(key).provenance["session"] for key in keys}) == 1
    report = ["report", "table8", "--profile", "smoke"]
    assert run_cli(report) == 0
    table = Path("results/tables/table8-smoke.md")
    assert "sessions" not in table.read_text()

    Store().path(keys[0]).unlink()
    assert run_cli(command) == 0
    assert run_cli(report) == 0
    assert "were measured in 2 sessions" in table.read_text()

    capsys.readouterr()
    assert run_cli(["retire", "table8", "--stage", "latency", "--profile", "smoke", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("2 runs set aside")
    assert run_cli(command) == 0
    assert run_cli(report) == 0
    assert "sessions" not in table.read_text()


@pytest.mark.slow
def test_a_row_that_cannot_be_built_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparseinst.bench import benchmark

    build = benchmark.network_workload

    def failing(config: Any, **rest: Any) -> Any:
        if config.inference.sides()[0] == min(run.config.inference.sides()[0] for run in smoke("table8").runs.values()):
            raise RuntimeError("no memory is left")
        return build(config, **rest)

    monkeypatch.setattr(benchmark, "network_workload", failing)
    assert run_cli(["run", "table8", "--profile", "smoke", "--device", "cpu"]) == 1
    assert "no memory is left" in capsys.readouterr().err
    states = json.loads(_status(capsys))["runs"]
    assert sorted(run["state"] for run in states) == ["done", "failed"]


@pytest.mark.slow
def test_one_process_times_at_a_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that two processes time at the same moment would slow each other down, and share no session."""
    command = [sys.executable, "-m", "sparseinst", "run", "table8", "--profile", "smoke", "--device", "cpu"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum(out.count("by turns") for out, _ in outputs) == 1, "the other process waits and says nothing"
    assert len({record_of(run.key).provenance["session"] for run in smoke("table8").runs.values()}) == 1


@pytest.mark.slow
def test_a_row_that_another_process_takes_over_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = smoke("table8").runs
    write, taken = timing.write_record, []

    def writing(run: Any, *rest: Any, **more: Any) -> None:
        if run.key == second and not taken:
            taken.append(run.key)
            raise Superseded("a newer attempt has taken over")
        write(run, *rest, **more)

    monkeypatch.setattr(timing, "write_record", writing)
    assert run_cli(["run", "table8", "--profile", "smoke", "--device", "cpu"]) == 0
    assert capsys.readouterr().err == ""
    assert taken
    assert Store().has(first)
    assert Store().has(second), "the row is timed again, since nobody else did it"


@pytest.mark.slow
def test_an_error_of_one_row_does_not_fail_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparseinst.bench import benchmark

    first, second = smoke("table8").runs
    turn, begun = benchmark._Timed.take_turn, []

    def failing(self: Any, number: int) -> None:
        begun.append(number)
        if len(begun) == 6:  # a turn of the second row
            raise RuntimeError("out of memory")
        turn(self, number)

    monkeypatch.setattr(benchmark._Timed, "take_turn", failing)
    assert run_cli(["run", "table8", "--profile", "smoke", "--device", "cpu"]) == 1
    assert "out of memory" in capsys.readouterr().err
    assert Store().has(first)
    assert not Store().has(second)


def _status(capsys: pytest.CaptureFixture[str]) -> str:
    assert run_cli(["status", "table8", "--profile", "smoke", "--device", "cpu", "--json"]) == 0
    return capsys.readouterr().out


def test_nothing_is_lost_when_runs_are_set_aside(capsys: pytest.CaptureFixture[str]) -> None:
    store = write_records(Path("results"), "smoke")
    [row] = [planned for planned in smoke("table5").rows if planned.row.name == "dice alone"]
    training, evaluation = row.keys["train"], row.keys["evaluate"]
    run_folder(training).root.mkdir(parents=True)
    (run_folder(training).root / "log.txt").write_text("the first run")
    command = ["retire", "table5", "--profile", "smoke", "--row", "dice alone"]
    assert run_cli(command) == 0
    assert "2 runs set aside" in capsys.readouterr().out
    assert not store.has(training)
    assert not store.has(evaluation)
    assert not run_folder(training).root.exists()
    assert (RETIRED / training / "log.txt").read_text() == "the first run"
    first = (store.folder / f"{training}.retired").read_text()
    assert {run.key for run in smoke("table5").to_do() if run.stage != "pretrain"} == {training, evaluation}

    write_records(Path("results"), "smoke")  # the row is measured again, and set aside again
    run_folder(training).root.mkdir(parents=True)
    assert run_cli(command) == 0
    assert (store.folder / f"{training}.retired").read_text() == first
    assert (store.folder / f"{training}-2.retired").exists()
    assert (RETIRED / f"{training}-2").is_dir()


def test_records_of_a_spec_elsewhere_are_kept_if_it_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A study of one's own may be a file anywhere; its records must not look unused once it is named."""
    spec = (EXPERIMENTS / "table5.yaml").read_text().replace("loss.pixel: focal", "loss.pixel: focal, loss.dice_weight: 3")
    Path("mine.yaml").write_text(spec)
    plan = make_plan(read_tables(["mine.yaml"]), read_profile("smoke", EXPERIMENTS), Store(), device="cpu")
    store = write_records(Path("results"), "smoke")
    [key] = [run.key for run in plan.runs.values() if run.stage == "train" and not store.has(run.key)]
    left = record_of(next(run.key for run in smoke("table5").runs.values() if run.stage == "train"))
    store.write(Record("train", key, left.result, left.config, left.provenance))
    assert run_cli(["plan", "mine.yaml", "--profile", "smoke"]) == 0
    assert "no row needs" not in capsys.readouterr().out
    assert run_cli(["retire", "mine.yaml", "--unused", "--profile", "smoke"]) == 0
    assert "no row needs 0 records" in capsys.readouterr().out
    assert run_cli(["retire", "--unused", "--profile", "smoke"]) == 0
    assert f"train {key}" in capsys.readouterr().out


def test_a_draft_of_another_table_does_not_stop_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    write_records(Path("results"), "smoke")
    specs = Path("own")
    specs.mkdir()
    for file in [*EXPERIMENTS.glob("*.yaml"), EXPERIMENTS / "profiles"]:
        (specs / file.name).symlink_to(file)
    Path("experiments").unlink()
    specs.rename("experiments")
    Path("experiments/draft.yaml").write_text("title: not finished\n")
    assert run_cli(["plan", "table8", "--profile", "smoke"]) == 0
    assert "records that no row needs cannot be listed" in capsys.readouterr().out


def test_a_training_takes_evaluations_of_other_tables_with_it() -> None:
    """Table 6 evaluates the default's weights in another way. After another training, this would mix old and new weights."""
    store = write_records(Path("results"), "smoke")
    rows = {(row.table.name, row.row.name): row.keys for row in smoke("table5", "table6").rows}
    default, other = rows["table5", "dice + BCE"], rows["table6", "CE without rescoring"]
    assert default["train"] == other["train"]
    record = record_of(other["evaluate"])
    store.write(
        Record("evaluate", record.key, record.result, record.config, record.provenance | {"training": other["train"]}), again=True
    )
    assert run_cli(["retire", "table5", "--profile", "smoke", "--row", "dice + BCE"]) == 0
    assert not store.has(default["evaluate"])
    assert not store.has(other["evaluate"])


@pytest.mark.parametrize(("state", "refused"), [("queued", True), ("cancelled", False)])
def test_a_run_that_a_cluster_will_do_is_not_set_aside(
    state: str, refused: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_records(Path("results"), "smoke")
    plan = smoke("table5")
    key = next(run.key for run in plan.runs.values() if run.stage == "train")
    monkeypatch.setattr(status, "plan_status", lambda _: [status.Status(plan.runs[key], state, 0.0)])  # type: ignore[arg-type]
    assert run_cli(["retire", "table5", "--profile", "smoke"]) == (2 if refused else 0)
    assert ("this run is sent or running" in capsys.readouterr().err) == refused
    assert store.has(key) == refused


def test_a_training_takes_its_evaluations_with_it() -> None:
    store = write_records(Path("results"), "smoke")
    [row] = [planned for planned in smoke("table5").rows if planned.row.name == "dice alone"]
    assert run_cli(["retire", "table5", "--profile", "smoke", "--row", "dice alone", "--stage", "train"]) == 0
    assert not store.has(row.keys["evaluate"])


def test_a_run_at_work_is_not_set_aside(capsys: pytest.CaptureFixture[str]) -> None:
    store = write_records(Path("results"), "smoke")
    key = next(run.key for run in smoke("table5").runs.values() if run.stage == "train")
    with Attempt.begin(run_folder(key)):
        assert run_cli(["retire", "table5", "--profile", "smoke"]) == 2
    assert "this run is sent or running" in capsys.readouterr().err
    assert store.has(key)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the tables, or give --unused"),
        (["table5"], "no such run has a record or a folder"),
        (["--unused", "--row", "x"], "allows no other choice"),
        (["table5", "--stage", "pretrain"], "choose train, evaluate or latency"),
    ],
)
def test_mistakes_give_one_line_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["retire", "--profile", "smoke", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_results_of_other_uncommitted_code_are_named_and_set_aside(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_records(Path("results"), "smoke")
    now: dict[str, str | None] = {"commit": "c0ffee", "changes": None}
    monkeypatch.setattr(provenance, "code_version", lambda: now)
    monkeypatch.setattr(provenance, "code_digest", lambda: "d1")
    plan = smoke("table5")
    assert not by_other_code(plan, store), "records of another commit are not named"
    key = next(run.key for run in plan.runs.values() if run.stage == "evaluate")
    record = record_of(key)
    record.provenance["changes"] = "d0"
    store.write(record, again=True)
    assert [run.key for run in by_other_code(plan, store)] == [key]
    now["changes"] = "d1"  # the code is edited: the other records come from other code, too
    assert len(by_other_code(plan, store)) == len(plan.done - {run.key for run in plan.runs.values() if run.stage == "pretrain"})
    record.provenance["changes"] = "d1"
    store.write(record, again=True)
    assert key not in {run.key for run in by_other_code(plan, store)}
    assert run_cli(["plan", "table5", "--profile", "smoke"]) == 0
    assert "results come from code that differs from the present code" in " ".join(capsys.readouterr().out.split())
    others = {run.key for run in by_other_code(plan, store)}
    assert run_cli(["retire", "table5", "--profile", "smoke", "--other-code"]) == 0
    assert not any(map(store.has, others))
    assert not store.has(key), "its training was other code's"


def test_records_that_no_row_needs_are_named_and_set_aside(capsys: pytest.CaptureFixture[str]) -> None:
    store = write_records(Path("results"), "smoke")
    profile, tables = read_profile("smoke", EXPERIMENTS), read_tables(["all"], EXPERIMENTS)
    assert unused_records(tables, profile, store) == []
    key = next(run.key for run in smoke("table5").runs.values() if run.stage == "train")
    left = record_of(key)
    for name, about in (("0123456789abcdef", {}), ("fedcba9876543210", {"profile": "another"})):
        store.write(Record("train", name, left.result, left.config, {**left.provenance, **about}))
    assert [record.key for record in unused_records(tables, profile, store)] == ["0123456789abcdef"]
    assert run_cli(["plan", "table5", "--profile", "smoke"]) == 0
    assert "no row needs 1 record of profile smoke" in " ".join(capsys.readouterr().out.split())
    assert run_cli(["retire", "--unused", "--profile", "smoke"]) == 0
    assert "train 0123456789abcdef" in capsys.readouterr().out
    assert store.has("0123456789abcdef"), "without --yes, they are listed"
    assert run_cli(["retire", "--unused", "--profile", "smoke", "--yes"]) == 0
    assert not store.has("0123456789abcdef")
    assert store.has("fedcba9876543210")
    assert store.has(key)
