"""Check cluster profiles, the jobs that are sent, and the two executors that need no cluster."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sparseinst.ablation.store import Store
from sparseinst.attempts import Attempt, Job
from sparseinst.cli import run_cli
from sparseinst.config import Config
from sparseinst.errors import UserError
from sparseinst.files import private_files
from sparseinst.launch import arrange
from sparseinst.launch import submit as launch
from sparseinst.launch.cluster import Cluster, list_clusters, read_cluster
from sparseinst.launch.status import Status, plan_status
from sparseinst.launch.submission import Submission, write_submission
from sparseinst.machine import machine_name, process_name
from sparseinst.paths import run_folder
from tests.launch.conftest import CLUSTERS, ROOT, planned

pytestmark = pytest.mark.usefixtures("own_folder")


def test_every_profile_of_the_project_is_valid() -> None:
    assert {"one-node-8-gpus", "two-nodes-4-gpus", "single-gpu", "local", "debug", "local-cluster"} == set(
        list_clusters(CLUSTERS)
    )
    layouts = {}
    for name in list_clusters(CLUSTERS):
        cluster = read_cluster(name, CLUSTERS)
        layouts[name] = cluster.parts or cluster.train.processes
    assert [layouts[name] for name in ("one-node-8-gpus", "two-nodes-4-gpus", "single-gpu")] == [8, 8, 8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "partitoin"),
        ("partitoin: gpu", "(valid: kind, partition, account"),
        ("train: {gpus: 8}", "(valid: nodes, tasks_per_node, gpus_per_node"),
        ("train: {time: 1 day}", "train.time"),
        ("train: {gpus_per_node: 8}\nlatency: {gpus_per_node: 1}", "device: give the GPU's name as nvidia-smi"),
        ("train: {gpus_per_node: 8}\ndevice: A card", "either all of train, evaluate and latency use GPUs"),
        ("kind: local\nsetup: [module load cuda]", "kind local does not support setup"),
        ("latency: {tasks_per_node: 2}", "a timing takes one process"),
        ("signal_delay: 90\ntrain: {time: 2}", "signalled as soon as it starts"),
        ("signal_delay: [", "expected the node content"),
    ],
)
def test_a_mistake_in_a_profile_gives_a_one_line_error(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    """This needs no SLURM on this machine."""
    assert run_cli(["launch", "table2", "--cluster", "two-nodes-4-gpus", "--dry-run"]) == 0
    output = capsys.readouterr()
    for line in (
        "#SBATCH --array=0-3%4", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --gpus-per-node=4",
        "#SBATCH --time=1440", "#SBATCH --partition=gpu", "#SBATCH --signal=USR2@120", "#SBATCH --requeue",
        "#SBATCH --dependency='aftercorr:<the trainings>'", "#SBATCH --kill-on-invalid-dep=yes", "#SBATCH --mem=128GB",
        "export OMP_NUM_THREADS=8", "srun --unbuffered", "--kill-on-bad-exit=1",
    ):  # fmt: skip
        assert line in output.out, line
    assert output.out.count("#!/bin/bash") == 3
    assert "would send 12:\n  train: 4 jobs, 4 at once, each of 2 x 4 processes with 8 GPUs" in output.out
    assert output.err == "", "8 processes of 8 images, as in the paper, need no warning"
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("lines", "warning"),
    [
        ("train: {gpus_per_node: 4, tasks_per_node: 4}", "4 parts of 16 images; the paper uses 8 parts of 8"),
        ("train: {gpus_per_node: 4, tasks_per_node: 4}\nparts: 8", ""),
    ],
)
def test_a_layout_that_differs_from_the_papers_gets_a_warning(
    lines: str, warning: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(f"device: A card\nlatency: {{gpus_per_node: 1}}\n{lines}\n")
    assert run_cli(["launch", "table5", "--cluster", "mine.yaml", "--dry-run"]) == 0
    error = capsys.readouterr().err
    assert (warning in error) if warning else error == ""


def test_one_device_is_told_that_the_papers_batch_has_eight_parts() -> None:
    assert "1 part of 64 images; the paper uses 8 parts of 8" in str(Config().layout_advice(1))
    assert Config().layout_advice(8) is None
    assert Config().replace({"loss.reduction": "global"}).layout_advice(1) is None


def test_a_layout_that_does_not_divide_the_batch_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("train: {tasks_per_node: 7}")
    assert run_cli(["launch", "table5", "--cluster", "mine.yaml", "--dry-run"]) == 2
    assert "train.batch_size=64 cannot be divided into 7 equal parts" in capsys.readouterr().err


def test_arrays_are_split_and_evaluations_follow_their_trainings() -> None:
    plan = planned("table2", "table3", "table4", "table5", "table6", "table7")
    start, *arrays = arrange.arrange(plan.to_do(), Cluster(), 8)
    [first] = start.elements
    assert [(run.stage, run.key) for run in first.runs] == [("pretrain", next(iter(plan.runs)))]
    trainings = [element for array in arrays if array.stage == "train" for element in array.elements]
    assert {element.after for element in trainings} == {first.runs[0].key}
    assert launch._by_dependency(arrays[0], {first.runs[0].key: "99"}) == [(arrays[0].elements, "afterok:99")]
    sizes = [(array.stage, len(array.elements)) for array in arrays]
    assert sizes == [
        *[("train", 8), ("evaluate", 8)] * 2,
        *[("train", 4), ("evaluate", 4)],
        *[("latency", 8), ("latency", 7)],
    ]
    stages = [run.key for array in (start, *arrays) for element in array.elements for run in element.runs]
    assert sorted(stages) == sorted(plan.runs), "each stage is sent once: a pretraining, 20 trainings, 21 evaluations, 15 timings"
    sent = {run.key: f"{100 + n}_{i}" for n in (0, 2, 4) for i, e in enumerate(arrays[n].elements) for run in e.runs}
    for number in (1, 3, 5):
        assert [element.after for element in arrays[number].elements] == [e.runs[0].key for e in arrays[number - 1].elements]
        assert launch._by_dependency(arrays[number], sent) == [(arrays[number].elements, f"aftercorr:{99 + number}")]


def test_trainings_with_different_pretrainings_are_separate_arrays(tmp_path: Path) -> None:
    """If one of two pretrainings comes with the package, its trainings do not wait."""
    plan = planned("table1", "table4")
    arrays = [array for array in arrange.arrange(plan.to_do(), Cluster(), 100) if array.stage == "train"]
    starts = [{element.after for element in array.elements} for array in arrays]
    assert len(starts) == 2
    assert all(len(start) == 1 for start in starts)
    ready, waits = [start.copy().pop() for start in starts]
    assert launch._by_dependency(arrays[0], {str(waits): "9"}, {str(ready)}) == [(arrays[0].elements, None)]
    assert launch._by_dependency(arrays[1], {str(waits): "9"}, {str(ready)}) == [(arrays[1].elements, "afterok:9")]


def test_an_evaluation_waits_for_a_training_that_was_sent_before() -> None:
    plan = planned("table5", row="dice alone")
    start, train, evaluation = plan.runs.values()
    for run, job in ((start, "76"), (train, "77_3")):
        write_submission(run_folder(run.key), Submission("c", "slurm", job, "jobs", time.time()))
    selection = arrange.select(plan_status(plan), retry=False)
    assert (selection.runs, selection.active) == ([evaluation], 2)
    [array] = arrange.arrange(selection.runs, Cluster(), 100)
    assert launch._by_dependency(array, {}) == [(array.elements, "afterok:77_3")]


def test_which_runs_launch_sends_and_which_retry_sends() -> None:
    plan = planned("table5", row="dice alone")
    start, train, evaluation = plan.runs.values()

    def states(one: str, other: str, first: str = "done") -> list[Status]:
        pairs = zip((start, train, evaluation), (first, one, other), strict=True)
        return [Status(run, state, 0.0) for run, state in pairs]  # type: ignore[arg-type]

    assert arrange.select(states("pending", "pending"), retry=False).runs == [train, evaluation]
    assert arrange.select(states("running", "queued"), retry=False) == arrange.Selection([], 2, 0)
    assert arrange.select(states("failed", "pending"), retry=False) == arrange.Selection([], 0, 2)
    assert arrange.select(states("failed", "pending"), retry=True).runs == [train, evaluation]
    assert arrange.select(states("running", "pending"), retry=False) == arrange.Selection([], 2, 0), "`run` is doing the training"
    assert arrange.select(states("done", "lost"), retry=True).runs == [evaluation]
    assert arrange.select(states("interrupted", "pending"), retry=True).runs == [train, evaluation]
    assert arrange.select(states("running", "queued"), retry=True) == arrange.Selection([], 2, 0)
    assert arrange.select(states("pending", "pending", "failed"), retry=False) == arrange.Selection([], 0, 3)
    assert arrange.select(states("pending", "pending", "failed"), retry=True).runs == [start, train, evaluation]


def test_jobs_on_one_machine_share_a_pretraining() -> None:
    """Every job contains the pretraining; the first job that reaches it does it, and the others wait."""
    plan = planned("table5")
    start = next(iter(plan.runs))
    [array] = arrange.arrange(plan.to_do(), Cluster(kind="local", parallelism=3), 100)
    assert len(array.elements) == 3
    for element in array.elements:
        assert [run.key for run in element.runs].count(start) == 1
        assert element.runs[0].key == start
    [array] = arrange.arrange([plan.runs[start]], Cluster(kind="local", parallelism=3), 100)
    assert [[run.key for run in element.runs] for element in array.elements] == [[start]]


def test_a_pretraining_that_no_sent_stage_needs_is_sent_alone() -> None:
    """Its training can be running already, or be done."""
    runs = list(planned("table5", "table8").runs.values())
    pretraining = next(run for run in runs if run.stage == "pretrain")
    timing = next(run for run in runs if run.stage == "latency")
    local = read_cluster("local", CLUSTERS)
    [array] = arrange.arrange([pretraining, timing], local, 10)
    sent = [run for element in array.elements for run in element.runs]
    assert {run.key for run in sent} == {pretraining.key, timing.key}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit's debugger leaves its logs open
def test_debug_and_local_give_the_same_results_as_run(capsys: pytest.CaptureFixture[str]) -> None:
    """`run`, the debugger and a local process give the same metrics, from the code as it was when it was sent."""
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
        field = "figures" if run.stage == "evaluate" else "losses"
        results = [record.result[field] for record in records if record is not None]
        assert results[0] == results[1] == results[2]
    [snapshot] = (path for path in Path("runs/snapshots").iterdir() if path.is_dir())
    [copied, original] = (root / "sparseinst" / "config" / "model.py" for root in (snapshot, ROOT))
    assert copied.read_bytes() == original.read_bytes()
    by_local = local.load(next(iter(plan.runs)))
    assert by_local is not None
    assert by_local.provenance["commit"] == json.loads((snapshot / "snapshot.json").read_text())["commit"]
    capsys.readouterr()
    assert run_cli(["launch", "table5", *rows, "--cluster", "local", "--results", "by-local"]) == 0
    assert "3 of 3 runs are done; sent 0" in capsys.readouterr().out


def test_cancelling_runs_that_are_on_no_cluster_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["cancel", "dice alone", "--profile", "smoke"]) == 2
    assert "none of these runs is on a cluster" in capsys.readouterr().err
    assert run_cli(["cancel", "no such row", "--profile", "smoke"]) == 2


def test_a_launch_without_slurm_is_a_clear_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert run_cli(["launch", "table5", "--profile", "smoke", "--cluster", "local-cluster"]) == 1
    assert "squeue does not answer" in capsys.readouterr().err
    assert not list(Path().glob("runs/*/submitted.json"))


def test_cancel_signals_only_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids of other machines, and ids that belong to another process by now, are left alone."""
    signalled: list[int] = []
    monkeypatch.setattr("os.kill", lambda pid, number: signalled.append(pid))
    plan = planned("table5", row="dice alone")
    run = next(iter(plan.runs.values()))
    ours, here = process_name(os.getpid()), machine_name()
    paths = run_folder(run.key)
    submission = Submission("local", "local", "77", "jobs", time.time(), "me", ours, here)
    with Attempt.begin(paths, job=Job("77")) as attempt:
        for machine, process, reached in [(here, ours, True), ("elsewhere", ours, False), (here, f"{os.getpid()} 1", False)]:
            beat = {"phase": "data", "since": time.time(), "pid": os.getpid(), "process": process, "machine": machine}
            paths.beat(attempt.number, 0).write_text(json.dumps(beat))
            write_submission(paths, replace(submission, process=f"{os.getpid()} 1"))
            signalled.clear()
            launch.cancel([run], plan)
            assert (signalled == [os.getpid()]) == reached
        write_submission(paths, replace(submission, machine="elsewhere 1 2"))
        signalled.clear()
        with pytest.raises(UserError, match="job 77 was started on elsewhere"):
            launch.cancel([run], plan)
        assert not signalled


def test_the_pickles_of_jobs_are_private(tmp_path: Path) -> None:
    with private_files() as mask:
        (tmp_path / "job.pkl").write_text("")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "job.pkl").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o666 & ~mask


def test_the_pickle_of_a_requeued_job_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit writes it anew when the job reaches its time limit, in a process that has the user's own file mode mask."""
    from submitit.core.job_environment import _checkpoint
    from submitit.helpers import DelayedSubmission

    monkeypatch.setattr("signal.pthread_sigmask", lambda *_: None)
    plan = planned("table5", row="dice alone")
    element = arrange.Element(tuple(plan.runs.values())[:1], None)
    job = launch._stage_job(element, plan, Store(), read_cluster("debug", CLUSTERS), False)
    mask = os.umask(0o002)
    try:
        delayed = DelayedSubmission(job)
        delayed.set_timeout(60, 5)
        assert not _checkpoint(delayed, tmp_path / "job.pkl", 4)
        (tmp_path / "other").write_text("")
    finally:
        os.umask(mask)
    assert (tmp_path / "job.pkl").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o664, "the attempt's end must stay readable for the group"
    requeued = DelayedSubmission.load(tmp_path / "job.pkl")
    assert requeued.function == job
    assert (requeued._timeout_min, requeued._timeout_countdown) == (60, 4)
