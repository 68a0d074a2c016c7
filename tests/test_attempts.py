"""Check which process may write to a run's folder: claims, heartbeats, takeovers, and the check before each write."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sparseinst import attempt_files, attempts
from sparseinst.attempt_files import AttemptEnd, AttemptRecord, AttemptStart, Heartbeat, describe_hang, latest_attempt
from sparseinst.attempts import Attempt, Held, Job, Superseded
from sparseinst.errors import RunFailed
from sparseinst.files import atomic
from sparseinst.paths import RunPaths


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run")


def rewrite(attempt: Attempt, **changes: Any) -> None:
    """Change what the attempt's file says about its process."""
    attempt.paths.attempt(attempt.number).write_text(json.dumps({**attempt.start.model_dump(), **changes}))


def end_of(attempt: AttemptRecord, rank: int = 0) -> AttemptEnd:
    end = attempt.ends[rank]
    assert end is not None
    return end


def test_only_one_attempt_runs_at_a_time(paths: RunPaths) -> None:
    with Attempt.begin(paths) as first:
        with pytest.raises(Held, match=f"another process is at work in this folder .*pid {os.getpid()}"):
            Attempt.begin(paths)
        first.check()
    with Attempt.begin(paths) as second:
        assert second.number == 2
    last = latest_attempt(paths)
    assert last is not None
    assert (end_of(last).outcome, last.at_work()) == ("done", False)


def test_only_one_of_six_simultaneous_attempts_begins(paths: RunPaths) -> None:
    code = (
        "import sys, time; from pathlib import Path; from sparseinst.attempts import *; from sparseinst.paths import RunPaths\n"
        f"paths = RunPaths(Path({str(paths.root)!r})); time.sleep(max(0, {time.time() + 1.5} - time.time()))\n"
        "try:\n    a = Attempt.begin(paths)\nexcept Held:\n    sys.exit(3)\nwith a:\n    time.sleep(1)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(6)]
    assert sorted(process.wait() for process in processes) == [0, 3, 3, 3, 3, 3]


def test_a_killed_process_does_not_block_the_folder(paths: RunPaths) -> None:
    code = (
        "import os; from pathlib import Path; from sparseinst.attempts import *; from sparseinst.paths import RunPaths\n"
        f"Attempt.begin(RunPaths(Path({str(paths.root)!r}))).__enter__(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    last = latest_attempt(paths)
    assert last is not None
    assert (last.ended, last.at_work()) == (False, False)
    with Attempt.begin(paths) as second:
        assert second.number == 2


def test_a_requeued_job_takes_over_and_its_old_copy_stops(paths: RunPaths) -> None:
    old = Attempt.begin(paths, job=Job("12_3"))
    for other in (Job("12_3"), Job("13"), None):  # a second copy of the same start, another job, a `run`
        with pytest.raises(Held):
            Attempt.begin(paths, job=other)
    new = Attempt.begin(paths, job=Job("12_3", restarts=1))
    kept = paths.root / "checkpoint"
    with new, atomic(kept, new.check) as temporary:
        temporary.write_text("new")
    with (
        pytest.raises(Superseded, match="a newer attempt has taken over; attempt 1 stops"),
        old,
        atomic(kept, old.check) as temporary,
    ):
        temporary.write_text("old")
    assert kept.read_text() == "new"
    assert list(paths.root.glob(".*.tmp")) == []
    assert json.loads(paths.end(1, 0).read_text())["outcome"] == "superseded"


def test_the_heartbeat_shows_whether_a_process_on_another_machine_is_alive(paths: RunPaths) -> None:
    with Attempt.begin(paths) as attempt:
        rewrite(attempt, machine="elsewhere", host="node7")
        with pytest.raises(Held, match="host node7"):
            Attempt.begin(paths)
        long_ago = time.time() - attempt_files.LOST_SECONDS - 1
        os.utime(paths.beat(1, 0), (long_ago, long_ago))
        with Attempt.begin(paths) as second:
            assert second.number == 2
            with pytest.raises(Superseded):
                attempt.check()


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (RunFailed("no space left"), "failed", "no space left"),
        (RuntimeError("the card fell out\nof its slot"), "failed", "RuntimeError: the card fell out"),
        (KeyboardInterrupt(), "interrupted", None),
        (SystemExit(1), "interrupted", None),
    ],
)
def test_the_outcome_and_the_reason_are_recorded(paths: RunPaths, error: BaseException, outcome: str, reason: str | None) -> None:
    with pytest.raises(type(error)), Attempt.begin(paths):
        raise error
    last = latest_attempt(paths)
    assert last is not None
    assert (end_of(last).outcome, end_of(last).reason, last.failure()) == (outcome, reason, reason)


def test_other_ranks_join_and_the_first_failure_is_the_reason(paths: RunPaths) -> None:
    job = Job("7")
    rank0 = Attempt.begin(paths, job=job, world_size=2, address="host:1")
    rank1 = Attempt.join(paths, job, 1)
    assert (rank1.number, rank1.address, rank1.world_size) == (1, "host:1", 2)
    with pytest.raises(MemoryError), rank1:
        raise MemoryError("rank 1 is out of memory")
    with pytest.raises(RuntimeError), rank0:
        raise RuntimeError("connection closed by peer")
    last = latest_attempt(paths)
    assert last is not None
    assert last.failure() == "rank 1: MemoryError: rank 1 is out of memory"


def test_joining_an_attempt_that_never_began_fails(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "JOIN_SECONDS", 0.5)
    with pytest.raises(RunFailed, match="rank 0 of job 7 did not begin"):
        Attempt.join(paths, Job("7"), 1)


def test_the_hanging_rank_is_the_one_that_does_not_wait() -> None:
    now = time.time()
    start = AttemptStart(world_size=3, began=now - 1000)
    beats = {
        0: (1.0, Heartbeat(phase="wait", step=41, since=now - 320)),
        1: (1.0, Heartbeat(phase="wait", step=41, since=now - 321)),
        2: (1.0, Heartbeat(phase="data", step=41, since=now - 322)),
    }
    assert describe_hang(AttemptRecord(1, start, beats, {}), 300) == "rank 2 hung in data of step 41 for 322 s"
    assert describe_hang(AttemptRecord(1, start, beats, {}), 400) is None
    silent = {**beats, 1: (310.0, beats[1][1])}
    assert str(describe_hang(AttemptRecord(1, start, silent, {}), 300)).startswith("rank 1 hung in wait of step 41")


def test_a_hanging_process_ends_itself_and_records_the_reason(paths: RunPaths) -> None:
    code = (
        "import time; from pathlib import Path; from sparseinst import attempts; from sparseinst.paths import RunPaths\n"
        "attempts.BEAT_SECONDS = 0.2\n"
        f"with attempts.Attempt.begin(RunPaths(Path({str(paths.root)!r})), hang_seconds=1) as a:\n"
        "    a.at('data', 5); time.sleep(60)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 1
    last = latest_attempt(paths)
    assert last is not None
    assert str(last.failure()).startswith("rank 0 hung in data of step 5 for")
    stacks = paths.stacks(1, 0).read_text()
    assert "Thread" in stacks
    assert 'File "<string>", line' in stacks, "the line in which the main thread hangs"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_hangs_in_compiled_code_writes_its_stacks(paths: RunPaths, rank: int) -> None:
    """This regular expression takes forever and holds the interpreter's lock, so that no other thread of Python runs."""
    code = (
        "import re; from pathlib import Path; from sparseinst import attempts; from sparseinst.paths import RunPaths\n"
        "attempts.BEAT_SECONDS = 0.2\n"
        f"paths, job = RunPaths(Path({str(paths.root)!r})), attempts.Job('7')\n"
        "attempt = attempts.Attempt.begin(paths, job=job, world_size=2, hang_seconds=1)\n"
        f"with attempt if {rank} == 0 else attempts.Attempt.join(paths, job, {rank}):\n"
        "    re.match(r'(a+)+$', 'a' * 60 + 'b')"
    )
    deadline = time.monotonic() + 60
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            while time.monotonic() < deadline and not (paths.stacks(1, rank).exists() and paths.stacks(1, rank).stat().st_size):
                time.sleep(0.1)
            if rank == 0:
                assert process.wait(10) == 1
            else:  # rank 0 ends the job
                time.sleep(0.5)
                assert process.poll() is None
        finally:
            process.kill()
    assert 'File "<string>", line 6' in paths.stacks(1, rank).read_text(), "the line in which the main thread hangs"


def test_an_attempt_that_does_not_hang_leaves_no_stacks(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "BEAT_SECONDS", 0.1)
    with Attempt.begin(paths, hang_seconds=3) as attempt:
        for _ in range(18):  # longer than the watchdog's limit
            attempt.at("data")
            time.sleep(0.2)
    assert not paths.stacks(1, 0).exists()


def test_damaged_files_count_as_empty(paths: RunPaths) -> None:
    with Attempt.begin(paths):
        pass
    for file in paths.attempts.iterdir():
        file.write_text("{")
    last = latest_attempt(paths)
    assert last is not None
    assert last.failure() is None
    with Attempt.begin(paths) as second:
        assert second.number == 2
    assert socket.gethostname() == second.start.host


DAMAGED = ["", "[]", "12", "null", '"x"', "{", "[" * 100_000, b"\xff\xfe", '{"a": "\\ud800"}']


@pytest.mark.parametrize("content", [*DAMAGED, '{"since": null}', '{"since": "x"}', '{"phase": 3}', '{"since": 1e400}'])
def test_a_damaged_heartbeat_counts_as_empty(paths: RunPaths, content: str | bytes) -> None:
    attempt = Attempt.begin(paths)
    paths.beat(1, 0).write_bytes(content if isinstance(content, bytes) else content.encode())
    last = latest_attempt(paths)
    assert last is not None
    assert last.beats[0][0] == float("inf")
    assert last.at_work()
    assert describe_hang(last, 60) == f"rank 0 hung in an unknown phase for {time.time() - attempt.start.began:.0f} s"


@pytest.mark.parametrize(
    "content",
    [*DAMAGED, '{"began": null}', '{"pid": "x"}', '{"restarts": []}', '{"world_size": 1e30}', '{"machine": 1}', '{"job": {}}'],
)
def test_a_damaged_attempt_counts_as_empty(paths: RunPaths, content: str | bytes) -> None:
    Attempt.begin(paths)
    for path in (paths.attempt(1), paths.end(1, 0)):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    last = latest_attempt(paths)
    assert last is not None
    assert (last.start, last.ends, last.ended, last.done) == (AttemptStart(), {0: None}, True, False)
    assert last.failure() is None
    assert Attempt.begin(paths, job=Job("1", restarts=1)).number == 2


def test_files_of_the_first_version_are_read(paths: RunPaths) -> None:
    paths.attempts.mkdir(parents=True)
    paths.attempt(1).write_text('{"began": 12, "host": "node7", "pid": 3, "job": "5", "restarts": 2, "world_size": 2}\n')
    paths.beat(1, 1).write_text('{"phase": "step", "step": 41, "since": 20, "later": true}\n')
    paths.end(1, 0).write_text('{"outcome": "failed", "reason": "no space left", "at": 30}\n')
    last = latest_attempt(paths)
    assert last is not None
    assert (last.began, last.job, last.start.restarts, last.start.hang_seconds) == (12, "5", 2, None)
    assert last.beats[1][1] == Heartbeat(phase="step", step=41, since=20)
    assert last.failure() == "rank 0: no space left"


def test_an_attempts_file_holds_plain_values(paths: RunPaths) -> None:
    attempt = Attempt.begin(paths, job=Job("5", 1), world_size=2, hang_seconds=7)
    written = json.loads(paths.attempt(1).read_text())
    names = ["began", "host", "machine", "pid", "process", "job", "restarts", "world_size", "address", "hang_seconds"]
    assert list(written) == names
    assert AttemptStart(**written) == attempt.start
