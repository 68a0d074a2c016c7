"""Check launching, failing and resuming on a real SLURM cluster, whose two nodes are simulated on this machine.

`make test-slurm` runs these tests. They need the Debian packages slurm-wlm and munge.
The cluster has no accounting, so `status` uses files only.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparseinst.ablation.store import Record, Store
from sparseinst.attempt_files import latest_attempt
from sparseinst.cli import run_cli
from sparseinst.inference.weights import load_weights
from sparseinst.launch.status import plan_status
from sparseinst.paths import run_folder

from .lab import (
    StartUndisturbed,
    address_of,
    assert_close,
    assert_same_bits,
    cluster_profile,
    done,
    job_of,
    job_output,
    launch,
    plan_of,
    process_of,
    slow_profile,
    slow_scontrol,
    slowness,
    slurm,
    state_of,
    steps_done,
    training,
    wait_for,
    wait_for_state,
)

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(shutil.which("slurmctld", path="/usr/sbin:/sbin:" + os.environ["PATH"]) is None, reason="no SLURM here"),
]


def test_two_nodes_write_the_same_results_as_run(project: Path) -> None:
    """The test compares jobs of 2 x 2 processes with `run` in one process. It uses loss.reduction=global."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "sparseinst",
        "run",
        "table5",
        "--profile",
        "smoke",
        "--results",
        "by-run",
        "--device",
        "cpu",
    ]
    subprocess.run(command, check=True, timeout=300 * slowness(), capture_output=True, env=environment)
    Path("runs").rename("runs-of-run")

    launch("table5", "smoke", "local-cluster")
    plan = plan_of("table5")
    assert {status.state for status in plan_status(plan)} <= {"queued", "running"}
    wait_for(lambda: done(plan), 480, "records")
    assert {status.state for status in plan_status(plan_of("table5"))} == {"done"}
    trainings = [run for run in plan.runs.values() if run.stage == "train"]
    assert {job_of(run).partition("_")[0] for run in trainings} == {job_of(trainings[0]).partition("_")[0]}, (
        "all trainings are in one array"
    )
    for run in plan.runs.values():
        ours, theirs = Store().load(run.key), Store(Path("by-run")).load(run.key)
        assert ours is not None
        assert theirs is not None
        assert ours.provenance["world_size"] == 4
        assert ours.provenance["commit"] == theirs.provenance["commit"]
        assert ours.config == theirs.config
        field = "figures" if run.stage == "evaluate" else "losses"
        assert_close(ours.result[field], theirs.result[field])
    nodes = {address_of(run).partition(":")[0] for run in trainings}
    assert nodes <= {"0x7f000001", "0x7f000002"}


def test_a_requeued_job_gives_identical_weights(project: Path, undisturbed: StartUndisturbed) -> None:
    """The test interrupts the training with `scontrol requeue`."""
    profile = slow_profile(700)
    reference = undisturbed(profile, "--row", "dice alone")
    launch("table5", profile, cluster_profile(1), "--row", "dice alone")
    plan = plan_of("table5", profile=profile, row="dice alone")
    run = training(plan)
    wait_for(lambda: steps_done(run) > 20, 60, "20 steps")
    assert state_of(run, plan).state == "running"
    slurm("scontrol", "requeue", job_of(run))
    wait_for_state(run, plan, "queued", 30)
    wait_for_state(run, plan, "running", 60, attempts=2)
    wait_for(lambda: done(plan), 300, "records")
    last = latest_attempt(run_folder(run.key))
    assert last is not None
    assert last.number >= 2
    assert "resuming after step" in run_folder(run.key).log.read_text()
    assert_same_bits(run_folder(run.key).weights, reference.weights(run))
    record = Store().load(run.key)
    assert record is not None
    assert record.provenance["attempts"] == last.number


def test_a_job_over_its_time_limit_resumes_and_gives_identical_weights(
    project: Path, undisturbed: StartUndisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is lowered to a minute when the training has begun, and raised again for the second attempt.

    The training is thus interrupted on a machine of any speed. SLURM sends the signal 50 s before the limit, when it next looks.
    The job's own `scontrol requeue` is slow, so that SLURM ends the job's processes while it still runs.
    """
    monkeypatch.setenv("PATH", slow_scontrol(tmp_path))
    profile = slow_profile(2500)
    reference = undisturbed(profile, "--row", "dice alone")
    launch("table5", profile, cluster_profile(1, signal_delay=50), "--row", "dice alone")
    plan = plan_of("table5", profile=profile, row="dice alone")
    run = training(plan)
    wait_for(lambda: steps_done(run) > 20, 90, "20 steps")
    slurm("scontrol", "update", f"JobId={job_of(run)}", "TimeLimit=1")
    wait_for(lambda: "timed-out" in job_output(run), 120, "signal")
    slurm("scontrol", "update", f"JobId={job_of(run)}", "TimeLimit=10")
    wait_for_state(run, plan, "running", 90, attempts=2)
    first = json.loads(run_folder(run.key).end(1, 0).read_text())
    assert first["outcome"] == "interrupted", first
    wait_for(lambda: done(plan), 400, "records")
    assert "resuming after step" in run_folder(run.key).log.read_text()
    assert_same_bits(run_folder(run.key).weights, reference.weights(run))


def test_cancel_includes_the_waiting_runs(project: Path) -> None:
    profile = slow_profile(4000)
    launch("table5", profile, cluster_profile(1), "--row", "dice alone")
    plan = plan_of("table5", profile=profile, row="dice alone")
    run = training(plan)
    wait_for(lambda: steps_done(run) > 5, 60, "5 steps")
    assert run_cli(["cancel", run.key, "--profile", profile]) == 0
    wait_for(lambda: {status.state for status in plan_status(plan)} == {"cancelled"}, 10, "state cancelled")
    wait_for(lambda: not slurm("squeue", "--noheader"), 30, "an empty queue")
    launch("table5", profile, cluster_profile(1), "--row", "dice alone")
    assert {status.state for status in plan_status(plan)} == {"cancelled"}, (
        "launch does not send a cancelled run again; retry would"
    )


@pytest.mark.parametrize(("ranks", "nodes"), [(2, 1), (1, 2)])
def test_a_killed_rank_ends_its_job_and_retry_finishes_the_run(project: Path, ranks: int, nodes: int) -> None:
    profile, cluster = slow_profile(400), cluster_profile(ranks, nodes)
    launch("table5", profile, cluster, "--row", "dice alone")
    plan = plan_of("table5", profile=profile, row="dice alone")
    run = training(plan)
    wait_for(lambda: steps_done(run) > 15, 90, "15 steps")
    began = time.monotonic()
    os.kill(process_of(run, 1), signal.SIGKILL)
    status = wait_for(lambda: (s := state_of(run, plan)).state == "failed" and s, 30, "state failed")
    assert time.monotonic() - began < 30 * slowness()
    assert ("rank 1 on 0x7f000002" if nodes == 2 else "rank 1 on 0x7f00000") in str(status.reason)
    assert "Killed" in str(status.reason)
    wait_for(lambda: not slurm("squeue", "--noheader"), 30, "empty queue (the waiting evaluation must be gone, too)")
    assert run_cli(["launch", "table5", "--profile", profile, "--cluster", cluster, "--row", "dice alone"]) == 0
    assert state_of(run, plan).state == "failed", "launch does not send a failed run again"
    assert run_cli(["retry", "table5", "--profile", profile, "--cluster", cluster, "--row", "dice alone"]) == 0
    wait_for(lambda: done(plan), 480, "records")
    assert "resuming after step" in run_folder(run.key).log.read_text()


def test_a_stopped_rank_is_noticed(project: Path) -> None:
    """After SIGSTOP the process is alive but does nothing."""
    profile = slow_profile(2000)
    launch("table5", profile, cluster_profile(2, hang_seconds=round(15 * slowness())), "--row", "dice alone")
    plan = plan_of("table5", profile=profile, row="dice alone")
    run = training(plan)
    wait_for(lambda: steps_done(run) > 10, 90, "10 steps")
    os.kill(process_of(run, 1), signal.SIGSTOP)
    status = wait_for(lambda: (s := state_of(run, plan)).state == "failed" and s, 60, "state failed")
    assert "rank 1 hung in" in str(status.reason)
    wait_for(lambda: not slurm("squeue", "--noheader"), 30, "an empty queue")
    status = state_of(run, plan)
    assert (status.state, "rank 1 hung in" in str(status.reason)) == ("failed", True), (
        "the reason is still known after the job has ended"
    )


def test_a_lost_node_does_not_change_the_weights(project: Path, cluster: Path, undisturbed: StartUndisturbed) -> None:
    """The test kills slurmd. SLURM starts the job again on the other node; the old copy still runs, and stops itself."""
    profile = slow_profile(1500)
    reference = undisturbed(profile, "--row", "dice alone")
    launch("table5", profile, cluster_profile(1), "--row", "dice alone")
    plan = plan_of("table5", profile=profile, row="dice alone")
    run = training(plan)
    wait_for(lambda: steps_done(run) > 15, 60, "15 steps")
    old = process_of(run, 0)
    node = slurm("squeue", "--noheader", "--format=%N", "--states=running")
    daemon = int((cluster / "pids" / f"slurmd.{node}.pid").read_text())
    os.kill(daemon, signal.SIGKILL)
    try:
        wait_for(lambda: state_of(run, plan).attempts == 2, 90, "second attempt")
        end = run_folder(run.key).end(1, 0)
        wait_for(end.exists, 30, "end of the old copy")
        assert json.loads(end.read_text())["outcome"] == "superseded"
        assert state_of(run, plan_of("table5", profile=profile, row="dice alone")).state in ("running", "done")
        wait_for(
            lambda: not Path(f"/proc/{old}").exists() or "Z" in Path(f"/proc/{old}/stat").read_text().split()[2], 30, "its end"
        )
        wait_for(lambda: done(plan), 480, "records")
    finally:
        subprocess.run(["/usr/sbin/slurmd", "-c", "-N", node, "-f", str(cluster / "slurm.conf")], check=True)
    assert_same_bits(run_folder(run.key).weights, reference.weights(run))


def test_twenty_random_kills_do_not_change_the_records(project: Path, undisturbed: StartUndisturbed) -> None:
    """While a table runs, the test kills processes and requeues jobs. It sends failed runs again until all are done."""
    profile = slow_profile(100)
    reference = undisturbed(profile)
    chance, kills = random.Random(0), 0
    launch("table5", profile, cluster_profile(1, parallelism=2))
    plan = plan_of("table5", profile=profile)
    began = time.monotonic()
    while not done(plan) and time.monotonic() - began < 400 * slowness():
        running = [status for status in plan_status(plan_of("table5", profile=profile)) if status.state == "running"]
        if running and kills < 20:
            victim = chance.choice(running)
            time.sleep(chance.uniform(0.0, 1.0))
            if chance.random() < 0.15:
                slurm("scontrol", "requeue", str(victim.job), check=False)
            else:
                try:
                    os.kill(process_of(victim.run, 0), signal.SIGKILL)
                except (ProcessLookupError, KeyError):
                    continue
            kills += 1
        # retry sends the runs again that are no longer in the queue.
        if run_cli(["retry", "table5", "--profile", profile, "--cluster", cluster_profile(1, parallelism=2)]) != 0:
            continue
        time.sleep(1.0)
    assert done(plan), f"after {kills} kills"
    assert kills == 20
    assert reference.process.wait(timeout=300 * slowness()) == 0
    for key, run in plan.runs.items():
        ours, theirs = Store().load(key), Store(reference.folder / "results").load(key)
        assert ours is not None
        assert theirs is not None
        same = {"seconds": 0}
        assert {**ours.result, **same} == {**theirs.result, **same}, run.label
        if run.stage == "train":
            assert_same_bits(run_folder(key).weights, reference.weights(run))
            load_weights(run_folder(key).weights)


def test_three_hundred_runs_are_sent_in_ten_seconds(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """launch asks the scheduler for its queue once, and calls sbatch once for each array."""
    spec = {
        "title": "many", "columns": ["n"], "figures": ["AP"],
        "rows": [
            {"name": f"{n} maps", "labels": {"n": n}, "set": {"model.decoder.depth": 1 + n % 6, "loss.class_weight": 1 + n / 100}}
            for n in range(150)
        ],
    }  # fmt: skip
    Path("many.yaml").write_text(json.dumps(spec))
    calls = project / "calls.txt"
    fakes = project / "bin"
    fakes.mkdir()
    for command in ("sbatch", "squeue", "sacct", "scontrol", "sinfo"):
        (fakes / command).write_text(f'#!/bin/sh\necho {command} >> {calls}\nexec {shutil.which(command)} "$@"\n')
        (fakes / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{fakes}:{os.environ['PATH']}")
    began = time.monotonic()
    launch("many.yaml", "smoke", cluster_profile(1, parallelism=1))
    assert time.monotonic() - began < 10 * slowness()
    asked = calls.read_text().split()
    assert sorted(asked) == ["sbatch", "sbatch", "sbatch", "scontrol", "squeue"], (
        "one sbatch call each for the pretraining, the trainings and the evaluations"
    )
    plan = plan_of("many.yaml")
    assert len(plan.runs) == 301
    for _ in range(5):
        assert run_cli(["status", "many.yaml", "--profile", "smoke", "--scheduler", "--device", "cpu"]) == 0
    assert calls.read_text().split().count("squeue") == 1, "status reuses an answer for half a minute"
    calls.unlink()
    assert run_cli(["status", "many.yaml", "--profile", "smoke", "--device", "cpu"]) == 0
    assert not calls.exists(), "without --scheduler, status does not ask SLURM"


def test_a_wrong_partition_gives_a_one_line_error_and_queues_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("wrong.yaml").write_text("partition: nowhere")
    assert run_cli(["launch", "table5", "--profile", "smoke", "--cluster", "wrong.yaml", "--row", "dice alone"]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: slurm refused the pretrain jobs")
    assert "partition" in error[-1]
    assert not list(Path("runs").glob("*/submitted.json"))


def test_a_second_launch_does_not_change_the_records(project: Path) -> None:
    """A launch of runs whose records exist succeeds, and the records stay the same."""
    launch("table5", "smoke", cluster_profile(1), "--row", "dice alone")
    plan = plan_of("table5", row="dice alone")
    wait_for(lambda: done(plan), 120, "records")
    kept = {key: Store().path(key).read_bytes() for key in plan.runs}
    record = Store().load(training(plan).key)
    assert isinstance(record, Record)
    launch("table5", "smoke", cluster_profile(1), "--row", "dice alone")
    assert {key: Store().path(key).read_bytes() for key in plan.runs} == kept


def test_a_second_cluster_on_the_same_ports_is_refused_in_one_line(cluster: Path, tmp_path: Path) -> None:
    """A cluster that a killed test left behind once gave eleven errors without a reason."""
    start = Path(__file__).parents[2] / "slurm" / "local-cluster" / "start.sh"
    ended = subprocess.run([start, tmp_path / "second"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: port ")
    assert "is in use" in ended.stderr
    assert not (tmp_path / "second" / "slurm.conf").exists()
