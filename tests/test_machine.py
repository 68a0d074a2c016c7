"""Check how many cores and threads a process is given."""

import math
import os
from pathlib import Path

import pytest

from sparseinst import machine


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/", {}, math.inf),
        ("0::/job/step", {"job/cpu.max": "400000 100000\n", "job/step/cpu.max": "max 100000\n"}, 4.0),
        ("0::/job/step", {"job/cpu.max": "400000 100000\n", "job/step/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/of/the/host", {"cpu.max": "200000 100000\n"}, 2.0),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "300000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 3.0),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("3:memory:/a", {"a/cpu.max": "100000 100000\n"}, math.inf),
    ],
)
def test_quotas_of_control_groups(group: str, files: dict[str, str], cores: float, tmp_path: Path) -> None:
    for name, content in files.items():
        write(tmp_path / "cgroup" / name, content)
    write(tmp_path / "own", group + "\n")
    assert machine._cores_of_quota(tmp_path / "cgroup", tmp_path / "own") == cores


def test_no_control_groups(tmp_path: Path) -> None:
    assert machine._cores_of_quota(tmp_path, tmp_path / "missing") == math.inf


@pytest.mark.parametrize(
    ("group", "files", "limit"),
    [
        ("0::/", {"memory.max": "5000\n"}, 5000),
        ("0::/", {"memory.max": "max\n"}, math.inf),
        ("0::/job/step", {"memory.max": "9000\n", "job/memory.max": "4000\n", "job/step/memory.max": "max\n"}, 4000),
        ("3:memory:/a", {"memory/memory.limit_in_bytes": "9000\n", "memory/a/memory.limit_in_bytes": "3000\n"}, 3000),
        ("3:cpu:/a", {"memory/a/memory.limit_in_bytes": "3000\n"}, math.inf),
    ],
)
def test_control_groups_limit_the_memory(group: str, files: dict[str, str], limit: float, tmp_path: Path) -> None:
    for name, content in files.items():
        write(tmp_path / "cgroup" / name, content)
    write(tmp_path / "own", group + "\n")
    assert machine._memory_of_groups(tmp_path / "cgroup", tmp_path / "own") == limit
    assert machine.machine_memory() > 2**20


@pytest.mark.parametrize(("quota", "expected"), [(math.inf, 4), (8.0, 4), (2.5, 2), (0.3, 1)])
def test_a_quota_limits_the_cores(quota: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cores_of_affinity", lambda: 4)
    monkeypatch.setattr(machine, "_cores_of_quota", lambda: quota)
    assert machine.usable_cores() == expected


@pytest.mark.parametrize(
    ("chosen", "quota", "threads", "warns"),
    [
        (None, 2.5, "2", False),
        (None, math.inf, None, False),
        ("1", 2.5, "1", False),
        ("8", math.inf, "8", True),
        ("2,1", 1.0, "2,1", False),
    ],
)
def test_threads_are_limited_to_the_cores(
    chosen: str | None, quota: float, threads: str | None, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_cores_of_affinity", lambda: 4)
    monkeypatch.setattr(machine, "_cores_of_quota", lambda: quota)
    monkeypatch.setenv("OMP_NUM_THREADS", chosen or "")
    if chosen is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    warning = machine.limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == threads
    assert (warning is not None) == warns
    if warning:
        assert "may use 4 cores" in warning
