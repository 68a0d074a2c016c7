"""Cluster profiles, what is sent where, and the two executors that need no cluster."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparseinst.ablation import arrange, launch
from sparseinst.ablation.cluster import Cluster, list_clusters, read_cluster
from sparseinst.ablation.plan import Plan, make_plan
from sparseinst.ablation.status import Status, plan_status
from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.study import read_profile, read_tables
from sparseinst.ablation.submission import Submission, read_submission, write_submission
from sparseinst.ablation.work import run_folder
from sparseinst.attempts import Attempt, Job
from sparseinst.cli import run_cli
from sparseinst.errors import UserError
from sparseinst.paths import RunPaths

ROOT = Path(__file__).parents[1]
EXPERIMENTS, CLUSTERS = ROOT / "experiments", ROOT / "slurm"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "experiments").symlink_to(EXPERIMENTS)
    (tmp_path / "slurm").symlink_to(CLUSTERS)
    monkeypatch.chdir(tmp_path)
    yield
    os.chdir(ROOT)


def planned(*tables: str, profile: str = "smoke", row: str | None = None) -> Plan:
    return make_plan(read_tables(tables, EXPERIMENTS), read_profile(profile, EXPERIMENTS), Store(), row=row, device="cpu")


def test_every_profile_of_the_project_is_valid() -> None:
    assert {"one-node-8-gpus", "two-nodes-4-gpus", "single-gpu", "local", "debug", "local-cluster"} == set(
        list_clusters(CLUSTERS)
    )
    layouts = {}
    for name in list_clusters(CLUSTERS):
        cluster = read_cluster(name, CLUSTERS)
        layouts[name] = cluster.train.processes * (cluster.accumulate or 1)
    assert [layouts[name] for name in ("one-node-8-gpus", "two-nodes-4-gpus", "single-gpu")] == [8, 8, 8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "partitoin"),
        ("partitoin: gpu", "(valid: kind, partition, account"),
        ("train: {gpus: 8}", "(valid: nodes, tasks_per_node, gpus_per_node"),
        ("train: {time: 1 day}", "train.time"),
        ("train: {gpus_per_node: 8}\nlatency: {gpus_per_node: 1}", "device: name the GPU as nvidia-smi"),
        ("train: {gpus_per_node: 8}\ndevice: A card", "need GPUs all of them, or none"),
        ("kind: local\nsetup: [module load cuda]", "kind local knows no setup"),
        ("latency: {tasks_per_node: 2}", "a timing takes one process"),
        ("signal_delay: 90\ntrain: {time: 2}", "told to end at its birth"),
        ("signal_delay: [", "expected the node content"),
    ],
)
def test_a_mistake_in_a_profile_is_one_line(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert run_cli(["launch", "table5", "--cluster", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert str(path) in error
    assert "\n" not in error


def test_the_nearest_cluster_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["launch", "table5", "--cluster", "locl"]) == 2
    assert "did you mean 'local'" in capsys.readouterr().err


def test_dry_run_shows_the_batch_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    """Without SLURM on this machine."""
    assert run_cli(["launch", "table2", "--cluster", "two-nodes-4-gpus", "--dry-run"]) == 0
    told = capsys.readouterr()
    for line in (
        "#SBATCH --array=0-3%4", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --gpus-per-node=4",
        "#SBATCH --time=1440", "#SBATCH --partition=gpu", "#SBATCH --signal=USR2@120", "#SBATCH --requeue",
        "#SBATCH --dependency='aftercorr:<the trainings>'", "#SBATCH --kill-on-invalid-dep=yes", "#SBATCH --mem=128GB",
        "export OMP_NUM_THREADS=8", "srun --unbuffered", "--kill-on-bad-exit=1",
    ):  # fmt: skip
        assert line in told.out, line
    assert told.out.count("#!/bin/bash") == 3
    assert "would send 12:\n  train: 4 jobs, 4 at once, each of 2 x 4 processes with 8 GPUs" in told.out
    assert told.err == "", "the paper's 8 processes of 8 images: nothing to warn of"
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("lines", "warning"),
    [
        ("train: {gpus_per_node: 4, tasks_per_node: 4}", "4 parts of 16 images, the paper has 8 of 8"),
        ("train: {gpus_per_node: 4, tasks_per_node: 4}\naccumulate: 2", ""),
    ],
)
def test_another_layout_than_the_papers_is_told(
    lines: str, warning: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(f"device: A card\nlatency: {{gpus_per_node: 1}}\n{lines}\n")
    assert run_cli(["launch", "table5", "--cluster", "mine.yaml", "--dry-run"]) == 0
    error = capsys.readouterr().err
    assert (warning in error) if warning else error == ""


def test_a_layout_that_does_not_divide_the_batch_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("train: {tasks_per_node: 7}")
    assert run_cli(["launch", "table5", "--cluster", "mine.yaml", "--dry-run"]) == 2
    assert "train.batch_size=64 cannot be shared by 7 processes" in capsys.readouterr().err


def test_arrays_are_split_and_evaluations_follow_their_trainings() -> None:
    plan = planned("table2", "table3", "table4", "table5", "table6", "table7")
    arrays = arrange.arrange(plan.to_do(), Cluster(), 8)
    sizes = [(array.stage, len(array.elements)) for array in arrays]
    assert sizes == [
        *[("train", 8), ("evaluate", 8)] * 2,
        *[("train", 4), ("evaluate", 4)],
        *[("latency", 8), ("latency", 7)],
    ]
    stages = [run.key for array in arrays for element in array.elements for run in element.runs]
    assert sorted(stages) == sorted(plan.runs), "each stage once: 20 trainings, 21 evaluations, 15 timings"
    sent = {run.key: f"{100 + n}_{i}" for n in (0, 2, 4) for i, e in enumerate(arrays[n].elements) for run in e.runs}
    for number in (1, 3, 5):
        assert [element.after for element in arrays[number].elements] == [e.runs[0].key for e in arrays[number - 1].elements]
        assert launch._by_dependency(arrays[number], sent) == [(arrays[number].elements, f"aftercorr:{99 + number}")]


def test_an_evaluation_waits_for_a_training_that_was_sent_before() -> None:
    plan = planned("table5", row="dice alone")
    train, evaluation = plan.runs.values()
    write_submission(run_folder(train.key), Submission("c", "slurm", "77_3", "jobs", time.time()))
    selection = arrange.select(plan_status(plan), retry=False)
    assert (selection.runs, selection.held) == ([evaluation], 1)
    [array] = arrange.arrange(selection.runs, Cluster(), 100)
    assert launch._by_dependency(array, {}) == [(array.elements, "afterok:77_3")]


def test_what_is_sent_and_what_retry_sends() -> None:
    plan = planned("table5", row="dice alone")
    train, evaluation = plan.runs.values()

    def states(one: str, other: str) -> list[Status]:
        return [Status(train, one, 0.0), Status(evaluation, other, 0.0)]  # type: ignore[arg-type]

    assert arrange.select(states("pending", "pending"), retry=False).runs == [train, evaluation]
    assert arrange.select(states("running", "queued"), retry=False) == arrange.Selection([], 2, 0)
    assert arrange.select(states("failed", "pending"), retry=False) == arrange.Selection([], 0, 2)
    assert arrange.select(states("failed", "pending"), retry=True).runs == [train, evaluation]
    assert arrange.select(states("running", "pending"), retry=False) == arrange.Selection([], 2, 0), "`run` is at it"
    assert arrange.select(states("done", "lost"), retry=True).runs == [evaluation]
    assert arrange.select(states("running", "queued"), retry=True) == arrange.Selection([], 2, 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit's debugger leaves its logs open
def test_debug_and_local_share_the_path_and_end_with_the_records_of_run(capsys: pytest.CaptureFixture[str]) -> None:
    """`run`, the debugger, and a process of its own: the same figures, from the code as it was when it was sent."""
    rows = ["--profile", "smoke", "--row", "dice alone"]
    assert run_cli(["run", "table5", *rows, "--device", "cpu", "--results", "by-run"]) == 0
    Path("runs").rename("runs-of-run")
    assert run_cli(["launch", "table5", *rows, "--cluster", "debug", "--results", "by-debug"]) == 0
    Path("runs").rename("runs-of-debug")
    assert run_cli(["launch", "table5", *rows, "--cluster", "local", "--results", "by-local"]) == 0
    plan = planned("table5", row="dice alone")
    local = Store(Path("by-local"))
    until = time.monotonic() + 120
    while not all(local.has(key) for key in plan.runs) and time.monotonic() < until:
        time.sleep(0.5)
    for key, run in plan.runs.items():
        records = [Store(Path(name)).load(key) for name in ("by-run", "by-debug", "by-local")]
        assert all(record is not None for record in records)
        what = "losses" if run.stage == "train" else "figures"
        results = [record.result[what] for record in records if record is not None]
        assert results[0] == results[1] == results[2]
    [snapshot] = (path for path in Path("runs/snapshots").iterdir() if path.is_dir())
    assert (snapshot / "sparseinst" / "config.py").read_bytes() == (ROOT / "sparseinst" / "config.py").read_bytes()
    by_local = local.load(next(iter(plan.runs)))
    assert by_local is not None
    assert by_local.provenance["commit"] == json.loads((snapshot / "snapshot.json").read_text())["commit"]
    capsys.readouterr()
    assert run_cli(["launch", "table5", *rows, "--cluster", "local", "--results", "by-local"]) == 0
    assert "2 of 2 runs are done; sent 0" in capsys.readouterr().out


def test_cancelled_failed_and_lost_are_told_apart_without_a_scheduler(tmp_path: Path) -> None:
    """From the files that jobs leave; there is no SLURM here."""
    plan = planned("table5", row="dice")
    runs = [run for run in plan.runs.values() if run.stage == "train"][:3]
    jobs = tmp_path / "jobs"
    jobs.mkdir()

    def look(number: int) -> tuple[str, str | None, int]:
        status = next(status for status in plan_status(plan) if status.run.key == runs[number].key)
        return status.state, status.reason, status.attempts

    for number, run in enumerate(runs):
        write_submission(run_folder(run.key), Submission("c", "slurm", f"5_{number}", str(jobs), time.time()))
    assert look(0) == ("queued", None, 0)

    paths = run_folder(runs[0].key)
    with Attempt.begin(paths, job=Job("5_0"), world_size=2):
        assert look(0) == ("running", None, 1)
        (jobs / "5_0_0_log.err").write_text(
            "srun: error: old: task 0: Terminated\nsparseinst: the job starts, restarts: 0\nsrun: error: node2: task 1: Killed\n"
            "srun: error: node1: task 0: Terminated\n"
        )
        (jobs / "5_0_1_log.err").write_text("INFO: step 41\nsome last words\n")
        (jobs / "5_0.0.exit").write_text(f"137 0 {time.time()}\n")
        assert look(0) == ("failed", "rank 1 on node2: Killed; it last said: some last words", 1)

    paths = run_folder(runs[1].key)
    attempt = Attempt.begin(paths, job=Job("5_1"))
    about = json.loads(paths.attempt(1).read_text())
    paths.attempt(1).write_text(json.dumps({**about, "machine": "elsewhere", "began": time.time() - 3600}))
    state, reason, _ = look(1)
    assert (state, "silent for" in str(reason)) == ("lost", True)
    (jobs / "5_1_0_log.err").write_text(
        "slurmstepd-n: error: *** JOB 5 ON n CANCELLED AT 2026 DUE TO JOB REQUEUE ***\nsrun: error: n: task 0: Killed\n"
    )
    assert look(1)[:2] == ("queued", "stopped by the scheduler, to be started again")
    with Attempt.begin(paths, job=Job("5_1", restarts=1)):
        assert look(1) == ("running", None, 2)
    assert attempt.number == 1

    paths = run_folder(runs[2].key)
    submission = read_submission(paths)
    assert submission is not None
    with pytest.raises(RuntimeError), Attempt.begin(paths, job=Job("5_2")):
        raise RuntimeError("the card fell out")
    assert look(2)[:2] == ("failed", "RuntimeError: the card fell out")
    write_submission(paths, Submission("c", "slurm", "6", str(jobs), time.time()))
    assert look(2) == ("queued", None, 1)
    write_submission(paths, Submission("c", "slurm", "6", str(jobs), time.time(), cancelled=True))
    assert look(2)[0] == "cancelled"


def test_cancel_of_what_is_on_no_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["cancel", "dice alone", "--profile", "smoke"]) == 2
    assert "none of these runs is on a cluster" in capsys.readouterr().err
    assert run_cli(["cancel", "no such row", "--profile", "smoke"]) == 2


def test_without_slurm_a_launch_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert run_cli(["launch", "table5", "--profile", "smoke", "--cluster", "local-cluster"]) == 1
    assert "squeue does not answer" in capsys.readouterr().err
    assert not list(Path().glob("runs/*/submitted.json"))


def test_a_record_that_came_meanwhile_is_not_made_again() -> None:
    plan = planned("table5", row="dice alone")
    train = next(iter(plan.runs.values()))
    Store().write(Record("train", train.key, {"steps": 2}))
    assert [status.state for status in plan_status(planned("table5", row="dice alone"))] == ["done", "pending"]
    with pytest.raises(UserError, match="none of these runs"):
        launch.cancel([train], plan)
    assert not RunPaths(run_folder(train.key).root).attempts.exists()
