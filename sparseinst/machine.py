"""Name this machine, its processes and its devices, and count its cores. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import socket
import subprocess
from functools import cache
from pathlib import Path

from sparseinst.errors import UserError


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
    """Return the number of cores that this process may use. On a cluster it can be smaller than the machine's."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # this function does not exist on every system
        return os.cpu_count() or 1


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
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    asked = subprocess.run([command, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return [line.strip() for line in asked.stdout.splitlines() if line.strip()] if asked.returncode == 0 else []


def _processor_name() -> str:
    """Return the name of the processor."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
