"""Name this machine, its processes and its devices, and count its cores. Imports no torch."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from sparseinst.errors import UserError
from sparseinst.words import counted


@cache
def machine_name() -> str:
    """Return a name that identifies this machine, its current boot and this container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # these files do not exist on every system
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
            str(Path("/proc/self/ns/pid").readlink()),
        ]
    return " ".join(parts)


def process_name(pid: int) -> str | None:
    """Return a name for a running process of this machine, from its id and start time; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self").exists() or not pid:
            return None
        try:  # this system has no /proc
            os.kill(pid, 0)
        except OSError:
            return None
        return str(pid)
    return None if fields[0] in "ZX" else f"{pid} {fields[19]}"  # field 22 of /proc/PID/stat: start time, in ticks since boot


def usable_cores() -> int:
    """Return the number of cores that this process may use: those of its affinity, or fewer if its container has a quota.

    A quota of two and a half cores counts as two.
    """
    return max(1, int(min(_cores_of_affinity(), _cores_of_quota())))


def machine_memory() -> int:
    """Return the bytes of this machine's memory, or the limit of this process's container or job if that is lower."""
    return int(min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _memory_of_groups()))


def _cores_of_affinity() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # this function does not exist on every system
        return os.cpu_count() or 1


_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def _cores_of_quota(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> float:
    """Return how many cores the quotas of its control groups grant this process; infinity without a quota."""
    return min(map(_quota_of_group, _own_groups("cpu", cgroups, own)), default=math.inf)


def _memory_of_groups(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> float:
    """Return how many bytes of memory its control groups grant this process; infinity without a limit."""
    limit = math.inf
    for folder in _own_groups("memory", cgroups, own):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                limit = min(limit, int((folder / name).read_text(encoding="ascii")))
    return limit


def _own_groups(controller: str, cgroups: Path, own: Path) -> Iterator[Path]:
    """Yield the folders of the Linux control groups, version 1 or 2, that this process belongs to; none on another system.

    A process has to keep the limits of its own group and those of the groups around it.

    Source:
        https://docs.kernel.org/admin-guide/cgroup-v2.html and https://docs.kernel.org/scheduler/sched-bwc.html
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroups / controller if controllers else cgroups
        # In a container, the path can be the host's and not exist here; the root then is the container's own group.
        innermost = root / group.strip("/")
        yield from (folder for folder in (innermost, *innermost.parents) if folder.is_relative_to(root))


def _quota_of_group(folder: Path) -> float:
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        granted, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        return int(granted) / int(period)
    with contextlib.suppress(OSError, ValueError):
        granted, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
        return int(granted) / int(period) if int(granted) > 0 else math.inf
    return math.inf


def limit_threads() -> str | None:
    """Give OpenMP at most as many threads as there are usable cores, before torch is loaded.

    OpenMP respects the affinity itself, but not a container's quota. With more threads than cores, they wait for each other. A
    number that the user has set stays.

    Returns:
        A line for the user if the number that is set exceeds the cores.
    """
    cores = usable_cores()
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if not chosen:
        if cores < _cores_of_affinity():
            os.environ["OMP_NUM_THREADS"] = str(cores)
        return None
    if chosen.isdigit() and int(chosen) > cores:
        return f"OMP_NUM_THREADS={chosen}, but this process may use {counted(cores, 'core')}; more threads are slow"
    return None


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait for each other, in this process and in those that it starts.

    By default they spin. If other work shares the cores, a thread that spins keeps the one that it waits for from running, and a
    step can take minutes. This must happen before torch is loaded. A policy that the user has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@cache
def device_name(device: str | None) -> str:
    """Return the name that the driver or the system gives a device.

    Args:
        device: cpu, cuda or cuda:N. None means the first GPU, if there is one.

    Returns:
        The GPU's name, or the processor's name for cpu and if there is no such GPU.

    Raises:
        UserError: `device` has another form.
    """
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"device {device!r}: cpu, cuda or cuda:1 was expected")
    if device != "cpu":
        index = int((device or "").partition(":")[2] or 0)
        names = gpu_names()
        if index < len(names):
            return names[index]
    return _processor_name()


@cache
def gpu_names() -> list[str]:
    """Return the names of this machine's GPUs, as nvidia-smi prints them. The list is empty without a driver."""
    return _ask_driver("name")


@cache
def processor_model() -> str:
    """Return the processor's name with its family, model and stepping, which several processors with one name differ in."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return _processor_name()
    first = information.read_text(encoding="utf-8").partition("\n\n")[0]
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    details = [f"{name} {fields[key]}" for name, key in _PROCESSOR_DETAILS.items() if key in fields]
    return ", ".join([_processor_name(), *details])


_PROCESSOR_DETAILS = {"family": "cpu family", "model": "model", "stepping": "stepping"}


@cache
def gpu_driver() -> str | None:
    """Return the version of the GPU's driver; None without one."""
    return next(iter(_ask_driver("driver_version")), None)


def _ask_driver(what: str) -> list[str]:
    """Return what nvidia-smi says about each GPU of this machine. The list is empty without a driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    asked = subprocess.run([command, f"--query-gpu={what}", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return [line.strip() for line in asked.stdout.splitlines() if line.strip()] if asked.returncode == 0 else []


def energy_counters() -> dict[str, tuple[int, int]]:
    """Return the processor packages' energy counters (RAPL): microjoules so far, and the value at which the counter restarts.

    The dictionary is empty where the system does not show them.
    """
    counters = {}
    for package in sorted(Path("/sys/class/powercap").glob("intel-rapl:?")):
        with contextlib.suppress(OSError, ValueError):  # only root may read them on most systems
            now, most = (int((package / name).read_text()) for name in ("energy_uj", "max_energy_range_uj"))
            counters[package.name] = (now, most)
    return counters


def energy_since(before: dict[str, tuple[int, int]]) -> float | None:
    """Return the joules that the processor packages used since `before`, of all processes; None if that is unknown."""
    now = energy_counters()
    if not before or before.keys() != now.keys():
        return None
    return sum((now[name][0] - start) % most for name, (start, most) in before.items()) / 1e6


def _processor_name() -> str:
    """Return the name of the processor."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def multiplies_bfloat16(*, matrices: bool = False) -> bool:
    """Return whether the CPU has instructions for bfloat16 numbers; False if the system does not say.

    Args:
        matrices: ask for instructions for whole matrices (AMX).
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    wanted = {"amx_bf16"} if matrices else {"avx512_bf16", "amx_bf16", "bf16"}
    return not wanted.isdisjoint(flags)
