"""Launch, survive, resume: on a real SLURM cluster of two make-believe nodes on this machine.

`make test-slurm` runs these; they need Debian's slurm-wlm and munge. There is no accounting, so `status` tells from files alone.
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

from sparseinst.ablation.status import plan_status
from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.work import run_folder
from sparseinst.attempts import latest
from sparseinst.cli import run_cli
from sparseinst.engine.checkpoint import load_weights

from .lab import (
    Undisturbed,
    assert_close,
    assert_same_bits,
    done,
    job_of,
    launch,
    plan_of,
    process_of,
    slow,
    slurm,
    state_of,
    steps_done,
    tasks,
    training,
    wait_for,
)

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(shutil.which("slurmctld", path="/usr/sbin:/sbin:" + os.environ["PATH"]) is None, reason="no SLURM here"),
]


def test_a_table_over_two_nodes_ends_with_the_records_of_run(project: Path) -> None:
    """An array of 2 x 2 processes a job, in global mode, against one process after the other here."""
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
    subprocess.run(command, check=True, timeout=300, capture_output=True, env=environment)
    Path("runs").rename("runs-of-run")

    launch("table5", "smoke", "local-cluster")
    plan = plan_of("table5")
    assert {status.state for status in plan_status(plan)} <= {"queued", "running"}
    wait_for(lambda: done(plan), 240, "records")
    assert {status.state for status in plan_status(plan_of("table5"))} == {"done"}
    trainings = [run for run in plan.runs.values() if run.stage == "train"]
    assert {job_of(run).partition("_")[0] for run in trainings} == {job_of(trainings[0]).partition("_")[0]}, "one array"
    for run in plan.runs.values():
        ours, theirs = Store().load(run.key), Store(Path("by-run")).load(run.key)
        assert ours is not None
        assert theirs is not None
        assert ours.provenance["world_size"] == 4
        assert ours.provenance["commit"] == theirs.provenance["commit"]
        assert ours.config == theirs.config
        what = "losses" if run.stage == "train" else "figures"
        assert_close(ours.result[what], theirs.result[what])
    nodes = {latest(run_folder(run.key)).about["address"].partition(":")[0] for run in trainings}  # type: ignore[union-attr]
    assert nodes <= {"0x7f000001", "0x7f000002"}

    # Comparisons too, by whichever evaluation ended last.
    def compared() -> bool:
        return sum(json.loads(path.read_text())["kind"] == "compare" for path in Store().folder.glob("*.json")) == 3

    wait_for(compared, 30, "comparisons")


def test_a_job_put_back_ends_the_same_to_the_bit(project: Path) -> None:
    """By `scontrol requeue`, in the middle."""
    profile = slow(700)
    reference = Undisturbed(profile, "--row", "dice alone")
    launch("table5", profile, tasks(1), "--row", "dice alone")
    plan = plan_of("table5", profile=profile, row="dice alone")
    run = training(plan)
    wait_for(lambda: steps_done(run) > 20, 60, "20 steps")
    assert state_of(run, plan).state == "running"
    slurm("scontrol", "requeue", job_of(run))
    wait_for(lambda: state_of(run, plan).state == "queued", 10, "state queued after the requeue")
    wait_for(lambda: state_of(run, plan).state == "running", 60, "second attempt")
    assert state_of(run, plan).attempts == 2
    wait_for(lambda: done(plan), 300, "records")
    last = latest(run_folder(run.key))
    assert last is not None
    assert last.number >= 2
    assert "resuming after step" in run_folder(run.key).log.read_text()
    assert_same_bits(run_folder(run.key).weights, reference.weights(run))
    record = Store().load(run.key)
    assert record is not None
    assert record.provenance["attempts"] == last.number


def test_a_job_out_of_time_goes_on_to_the_same_bits(project: Path) -> None:
    """2 minutes less 50 s for the signal, which SLURM may send up to a minute early."""
    profile = slow(1500)
    reference = Undisturbed(profile, "--row", "dice alone")
    launch("table5", profile, tasks(1, time=2, signal_delay=50), "--row", "dice alone")
    plan = plan_of("table5", profile=profile, row="dice alone")
    run = training(plan)
    wait_for(lambda: (state_of(run, plan).attempts, state_of(run, plan).state) == (2, "running"), 150, "second attempt")
    first = json.loads(run_folder(run.key).end(1, 0).read_text())
    assert first["outcome"] == "interrupted"
    assert (
        "timed-out"
        in Path(f"runs/jobs/{job_of(run)}_0_log.out").read_text() + Path(f"runs/jobs/{job_of(run)}_0_log.err").read_text()
    )
    wait_for(lambda: done(plan), 400, "records")
    assert "resuming after step" in run_folder(run.key).log.read_text()
    assert_same_bits(run_folder(run.key).weights, reference.weights(run))


def test_cancel_takes_what_waits_along(project: Path) -> None:
    profile = slow(4000)
    launch("table5", profile, tasks(1), "--row", "dice alone")
    plan = plan_of("table5", profile=profile, row="dice alone")
    run = training(plan)
    wait_for(lambda: steps_done(run) > 5, 60, "5 steps")
    assert run_cli(["cancel", run.key, "--profile", profile]) == 0
    wait_for(lambda: {status.state for status in plan_status(plan)} == {"cancelled"}, 10, "state cancelled")
    wait_for(lambda: not slurm("squeue", "--noheader"), 30, "an empty queue")
    launch("table5", profile, tasks(1), "--row", "dice alone")
    assert {status.state for status in plan_status(plan)} == {"cancelled"}, "launch leaves it alone, retry would not"


def test_a_killed_rank_ends_its_job_and_retry_finishes_it(project: Path) -> None:
    profile = slow(400)
    launch("table5", profile, tasks(2), "--row", "dice alone")
    plan = plan_of("table5", profile=profile, row="dice alone")
    run = training(plan)
    wait_for(lambda: steps_done(run) > 15, 90, "15 steps")
    began = time.monotonic()
    os.kill(process_of(run, 1), signal.SIGKILL)
    status = wait_for(lambda: (s := state_of(run, plan)).state == "failed" and s, 30, "state failed")
    assert time.monotonic() - began < 30
    assert "rank 1 on 0x7f00000" in str(status.reason)
    assert "Killed" in str(status.reason)
    wait_for(lambda: not slurm("squeue", "--noheader"), 30, "an empty queue: the evaluation that waited is gone, too")
    assert run_cli(["launch", "table5", "--profile", profile, "--cluster", tasks(2), "--row", "dice alone"]) == 0
    assert state_of(run, plan).state == "failed", "launch leaves what failed alone"
    assert run_cli(["retry", "table5", "--profile", profile, "--cluster", tasks(2), "--row", "dice alone"]) == 0
    wait_for(lambda: done(plan), 240, "records")
    assert "resuming after step" in run_folder(run.key).log.read_text()


def test_a_stopped_rank_is_noticed(project: Path) -> None:
    """SIGSTOP: alive, but it does nothing any more."""
    profile = slow(2000)
    launch("table5", profile, tasks(2, hang_seconds=15), "--row", "dice alone")
    plan = plan_of("table5", profile=profile, row="dice alone")
    run = training(plan)
    wait_for(lambda: steps_done(run) > 10, 90, "10 steps")
    os.kill(process_of(run, 1), signal.SIGSTOP)
    status = wait_for(lambda: (s := state_of(run, plan)).state == "failed" and s, 60, "state failed")
    assert "rank 1 hung in" in str(status.reason)
    wait_for(lambda: not slurm("squeue", "--noheader"), 30, "an empty queue")
    status = state_of(run, plan)
    assert (status.state, "rank 1 hung in" in str(status.reason)) == ("failed", True), "also once the job is over"


def test_a_lost_node_loses_nothing(project: Path, cluster: Path) -> None:
    """slurmd is killed: the job starts again on the other node while its old copy runs on beside it, and is fenced off."""
    profile = slow(1500)
    reference = Undisturbed(profile, "--row", "dice alone")
    launch("table5", profile, tasks(1), "--row", "dice alone")
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
        wait_for(lambda: done(plan), 240, "records")
    finally:
        subprocess.run(["/usr/sbin/slurmd", "-c", "-N", node, "-f", str(cluster / "slurm.conf")], check=True)
    assert_same_bits(run_folder(run.key).weights, reference.weights(run))


def test_twenty_random_kills_change_no_record(project: Path) -> None:
    """Over a table: processes killed, jobs put back. What failed is sent again, until all is done."""
    profile = slow(100)
    reference = Undisturbed(profile)
    chance, kills = random.Random(0), 0
    launch("table5", profile, tasks(1, parallelism=2))
    plan = plan_of("table5", profile=profile)
    until = time.monotonic() + 400
    while not done(plan) and time.monotonic() < until:
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
        # Whatever is not in the queue any more is sent again.
        if run_cli(["retry", "table5", "--profile", profile, "--cluster", tasks(1, parallelism=2)]) != 0:
            continue
        time.sleep(1.0)
    assert done(plan), f"after {kills} kills"
    assert kills == 20
    assert reference.process.wait(timeout=300) == 0
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
    """And the scheduler is asked for its queue once, and told once an array."""
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
    launch("many.yaml", "smoke", tasks(1, parallelism=1))
    assert time.monotonic() - began < 10
    asked = calls.read_text().split()
    assert sorted(asked) == ["sbatch", "sbatch", "scontrol", "squeue"]
    plan = plan_of("many.yaml")
    assert len(plan.runs) == 300
    for _ in range(5):
        assert run_cli(["status", "many.yaml", "--profile", "smoke", "--scheduler", "--device", "cpu"]) == 0
    assert calls.read_text().split().count("squeue") == 1, "an answer serves for half a minute"
    calls.unlink()
    assert run_cli(["status", "many.yaml", "--profile", "smoke", "--device", "cpu"]) == 0
    assert not calls.exists(), "status asks nobody"


def test_a_wrong_partition_is_one_line_and_nothing_is_queued(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("wrong.yaml").write_text("partition: nowhere")
    assert run_cli(["launch", "table5", "--profile", "smoke", "--cluster", "wrong.yaml", "--row", "dice alone"]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: slurm refused the train jobs")
    assert "partition" in error[-1]
    assert not list(Path("runs").glob("*/submitted.json"))


def test_records_are_whole(project: Path) -> None:
    """A job whose record is there already, because `run` made it meanwhile, ends well and leaves it."""
    launch("table5", "smoke", tasks(1), "--row", "dice alone")
    plan = plan_of("table5", row="dice alone")
    wait_for(lambda: done(plan), 120, "records")
    kept = {key: Store().path(key).read_bytes() for key in plan.runs}
    record = Store().load(training(plan).key)
    assert isinstance(record, Record)
    launch("table5", "smoke", tasks(1), "--row", "dice alone")
    assert {key: Store().path(key).read_bytes() for key in plan.runs} == kept
