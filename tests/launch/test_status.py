"""Check the states of stages, which `status` finds from records and from the files of attempts and jobs."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from sparseinst.ablation.store import Record, Store
from sparseinst.attempts import Attempt, Job
from sparseinst.errors import UserError
from sparseinst.launch import arrange
from sparseinst.launch import submit as launch
from sparseinst.launch.status import Status, plan_status, show, watch
from sparseinst.launch.status import as_json as states_as_json
from sparseinst.launch.submission import Queue, Submission, read_submission, write_submission
from sparseinst.paths import RunPaths, run_folder
from tests.launch.conftest import planned

pytestmark = pytest.mark.usefixtures("own_folder")


def test_cancelled_failed_and_lost_are_distinguished_without_a_scheduler(tmp_path: Path) -> None:
    """The states come from the files that jobs write; there is no SLURM here."""
    plan = planned("table5", row="dice")
    runs = [run for run in plan.runs.values() if run.stage == "train"][:3]
    jobs = tmp_path / "jobs"
    jobs.mkdir()

    def state_of(number: int) -> tuple[str, str | None, int]:
        status = next(status for status in plan_status(plan) if status.run.key == runs[number].key)
        return status.state, status.reason, status.attempts

    for number, run in enumerate(runs):
        write_submission(run_folder(run.key), Submission("c", "slurm", f"5_{number}", str(jobs), time.time()))
    assert state_of(0) == ("queued", None, 0)

    paths = run_folder(runs[0].key)
    with Attempt.begin(paths, job=Job("5_0"), world_size=2):
        assert state_of(0) == ("running", None, 1)
        (jobs / "5_0_0_log.err").write_text(
            "srun: error: old: task 0: Terminated\nsparseinst: the job starts, restarts: 0\nsrun: error: node2: task 1: Killed\n"
            "srun: error: node1: task 0: Terminated\n"
        )
        (jobs / "5_0_1_log.err").write_text("INFO: step 41\nsome last words\n")
        (jobs / "5_0.0.exit").write_text(f"137 0 {time.time()}\n")
        assert state_of(0) == ("failed", "rank 1 on node2: Killed; its last output: some last words", 1)

    paths = run_folder(runs[1].key)
    attempt = Attempt.begin(paths, job=Job("5_1"))
    about = json.loads(paths.attempt(1).read_text())
    paths.attempt(1).write_text(json.dumps({**about, "machine": "elsewhere", "began": time.time() - 3600}))
    state, reason, _ = state_of(1)
    assert (state, "no heartbeat for" in str(reason)) == ("lost", True)
    (jobs / "5_1.0.exit").write_text(f"0 1 {time.time()}\n")  # stopped by SLURM, whose message is missing
    state, reason, _ = state_of(1)
    assert (state, "--scheduler` asks SLURM" in str(reason)) == ("queued", True)
    asked = plan_status(plan, Queue(frozenset({"5_1"}), time.time() + 1, "me"))
    assert next(status.state for status in asked if status.run.key == runs[1].key) == "queued"
    (jobs / "5_1_0_log.err").write_text(
        "slurmstepd-n: error: *** JOB 5 ON n CANCELLED AT 2026 DUE TO JOB REQUEUE ***\nsrun: error: n: task 0: Killed\n"
    )
    assert state_of(1)[:2] == ("queued", "the scheduler stopped the job and will start it again")
    with Attempt.begin(paths, job=Job("5_1", restarts=1)):
        assert state_of(1) == ("running", None, 2)
    assert attempt.number == 1

    paths = run_folder(runs[2].key)
    submission = read_submission(paths)
    assert submission is not None
    with pytest.raises(RuntimeError), Attempt.begin(paths, job=Job("5_2")):
        raise RuntimeError("the card fell out")
    assert state_of(2)[:2] == ("failed", "RuntimeError: the card fell out")
    write_submission(paths, Submission("c", "slurm", "6", str(jobs), time.time()))
    assert state_of(2) == ("queued", None, 1)
    write_submission(paths, Submission("c", "slurm", "6", str(jobs), time.time(), cancelled=True))
    assert state_of(2)[0] == "cancelled"


def test_a_failure_travels_down_the_whole_chain(tmp_path: Path) -> None:
    """SLURM silently removes the jobs that wait for a failed one."""
    plan = planned("table5", row="dice alone")
    pretraining, training, evaluation = plan.runs.values()
    for number, run in enumerate((pretraining, training, evaluation)):
        write_submission(run_folder(run.key), Submission("c", "slurm", f"5_{number}", str(tmp_path), time.time()))
    with pytest.raises(RuntimeError), Attempt.begin(run_folder(pretraining.key), job=Job("5_0")):
        raise RuntimeError("the card fell out")
    assert [status.state for status in plan_status(plan)] == ["failed", "pending", "pending"]


def test_a_run_that_took_over_from_a_job_is_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its evaluation must wait for it, not for the dead job, and `cancel` must not say that it was cancelled."""
    plan = planned("table5", row="dice alone")
    training, evaluation = (run for run in plan.runs.values() if run.stage in ("train", "evaluate"))
    write_submission(run_folder(training.key), Submission("c", "slurm", "5_0", str(tmp_path), time.time() - 60))
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("scancel was called"))
    with Attempt.begin(run_folder(training.key)):
        states = plan_status(plan)
        [status] = [status for status in states if status.run.key == training.key]
        assert (status.state, status.job) == ("running", None)
        assert evaluation not in arrange.select(states, retry=False).runs
        with pytest.raises(UserError, match="none of these runs is on a cluster"):
            launch.cancel([training], plan)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "[" * 100_000, b"\xff", {"at": "x"}, {"job": 5}, {"job": "/a"}, {"process": ""}, {"folder": "a\0"}],
)
def test_a_damaged_submission_counts_as_missing(content: str | bytes | dict[str, Any], tmp_path: Path) -> None:
    plan = planned("table5", row="dice")
    run = next(iter(plan.runs.values()))
    paths = run_folder(run.key)
    write_submission(paths, Submission("c", "slurm", "5_0", str(tmp_path), time.time()))
    if isinstance(content, dict):
        content = json.dumps({**json.loads(paths.submitted.read_text()), **content})
    paths.submitted.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_submission(paths) is None
    assert {status.state for status in plan_status(plan)} == {"pending"}


@pytest.mark.parametrize("line", ["[" * 4000, '{"iteration": 1, "seconds": NaN}', '{"iteration": "x", "seconds": 1}', "5"])
def test_damaged_metrics_show_no_progress(line: str) -> None:
    plan = planned("table5", row="dice")
    run = next(run for run in plan.runs.values() if run.stage == "train")
    paths = run_folder(run.key)
    with Attempt.begin(paths):
        paths.metrics.write_text('{"iteration": 1, "seconds": 0.5, "loss": NaN}\n')
        assert next(status for status in plan_status(plan) if status.run.key == run.key).eta_seconds == 0.5
        paths.metrics.write_text(f"{line}\n")
        status = next(status for status in plan_status(plan) if status.run.key == run.key)
    assert (status.state, status.progress, status.eta_seconds) == ("running", 0.0, None)
    states_as_json([status])


def test_a_stage_that_must_be_done_again_is_sent_again(tmp_path: Path) -> None:
    """Its training ended on the cluster long ago; its weights were deleted, and an evaluation needs them."""
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    plan = planned("table5", row="dice alone")
    start, train, evaluation = plan.runs.values()
    for number, run in enumerate((start, train)):
        paths = run_folder(run.key)
        write_submission(paths, Submission("c", "slurm", f"7{number}", str(jobs), time.time(), "me"))
        with Attempt.begin(paths, job=Job(f"7{number}")):
            Store().write(Record(run.stage, run.key, {"steps": 2, "seconds": 1.0, "losses": {"loss": 1.0}}))
        paths.weights.touch()
    again = planned("table5", row="dice alone")
    assert [run.stage for run in again.to_do()] == ["evaluate"]
    run_folder(train.key).weights.unlink()
    again = planned("table5", row="dice alone")
    assert [(run.key, run.remake) for run in again.to_do()] == [(train.key, True), (evaluation.key, False)]
    for queue in (None, Queue(frozenset(), time.time() + 1, "me")):
        states = {status.run.key: (status.state, status.progress) for status in plan_status(again, queue)}
        assert states == {start.key: ("done", 1.0), train.key: ("pending", 0.0), evaluation.key: ("pending", 0.0)}
        assert [run.key for run in arrange.select(plan_status(again, queue), retry=False).runs] == [train.key, evaluation.key]
    Store().path(train.key).write_text("{")
    assert [run.remake for run in planned("table5", row="dice alone").to_do()] == [False, False], "a damaged record is made again"


def test_an_existing_record_is_not_made_again() -> None:
    plan = planned("table5", row="dice alone")
    train = next(iter(plan.runs.values()))
    Store().write(Record("train", train.key, {"steps": 2}))
    run_folder(train.key).root.mkdir(parents=True)
    run_folder(train.key).weights.touch()
    states = [status.state for status in plan_status(planned("table5", row="dice alone"))]
    assert states == ["done", "pending", "pending"]
    with pytest.raises(UserError, match="none of these runs"):
        launch.cancel([train], plan)
    assert not RunPaths(run_folder(train.key).root).attempts.exists()


def test_the_time_of_all_trainings_that_are_left(capsys: pytest.CaptureFixture[str]) -> None:
    """Two run and take 100 s each, half of which is over; two more wait. So each of the two processes needs 150 s more."""
    runs = [run for run in planned("table5").runs.values() if run.stage == "train"]
    running = [Status(run, "running", 0.5, 50.0) for run in runs[:2]]
    waiting = [Status(run, "pending", 0.0) for run in runs[2:4]]
    show([*running, *waiting])
    assert "the trainings need about 0:03:00 more" in capsys.readouterr().out
    show([Status(runs[0], "running", 0.0), *waiting])
    assert "need about" not in capsys.readouterr().out, "before the first step, nobody knows"


def test_without_a_terminal_each_change_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = [run for run in planned("table5").runs.values() if run.stage == "train"][:2]
    looks = iter(
        [
            [Status(first, "pending", 0.0), Status(second, "pending", 0.0)],
            [Status(first, "running", 0.1), Status(second, "pending", 0.0)],
            [Status(first, "done", 1.0), Status(second, "failed", 0.2, reason="out of memory")],
        ]
    )
    last: list[list[Status]] = []

    def look() -> list[Status]:
        last.append(next(looks, last[-1] if last else []))
        return last[-1]

    watch(look, lambda: len(last) < 4, every=0.0)
    lines = [line.split("  ", 1)[-1] for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [
        f"train {first.label}: running",
        f"train {first.label}: done",
        f"train {second.label}: failed (out of memory)",
    ]
    assert lines[-1] == "1 done, 1 failed"
