"""The provenance of a result: its code, software, device and time. Imports no torch."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sparseinst.files import parse_json
from sparseinst.machine import gpu_driver, processor_model
from sparseinst.paths import RunPaths

PACKAGE = Path(__file__).parents[1]
SNAPSHOT = "snapshot.json"
"""The file beside a copy of the package that holds its `code_version`."""
PACKAGES = ("sparseinst", "torch", "torchvision", "timm", "numpy", "scipy", "hotcoco")


@cache
def code_version() -> dict[str, str | None]:
    """Return the version of the code that runs.

    Returns:
        `commit`: the git commit; None if no git repository tracks the package. `changes`: the hash of the package's content if
        it differs from that commit or there is none, else None.
    """
    snapshot = PACKAGE.parent / SNAPSHOT
    if snapshot.exists():  # this is a copy, made when a job was sent to a cluster
        described: dict[str, str | None] = json.loads(snapshot.read_text(encoding="utf-8"))
        return described

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):  # no git, or no repository
            return None
        return done.stdout

    # The package may be installed inside another project's repository, which ignores it.
    tracked = git("ls-files", "--error-unmatch", "__init__.py") is not None
    commit = git("rev-parse", "HEAD") if tracked else None
    changed = commit is None or git("status", "--porcelain", "--", ".")  # this includes new files
    return {"commit": commit.strip() if commit else None, "changes": code_digest() if changed else None}


def code_files() -> list[Path]:
    """Return the package's files, as paths relative to it."""
    files = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file())
    return sorted(path for path in files if "__pycache__" not in path.parts)


@cache
def code_digest() -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the package's content."""
    digest = hashlib.sha256()
    for path in code_files():
        digest.update(f"{path} {hashlib.sha256((PACKAGE / path).read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def is_other_code(about: Mapping[str, Any]) -> bool:
    """Return whether code that made a record differs from the code that runs now by changes that were not committed.

    Two commits are not compared: the repository's history says what changed between them.
    """
    now = code_version()

    def differs(code: Mapping[str, Any]) -> bool:
        if code.get("changes") is not None:
            return bool(code["changes"] != code_digest())
        return now["changes"] is not None and now["commit"] is not None

    return any(map(differs, (about, *about.get("earlier", []))))


def note_code(paths: RunPaths) -> None:
    """Record in a run's folder that this version of the code trains it."""
    paths.root.mkdir(parents=True, exist_ok=True)
    # Begin a new line if a kill left the last one incomplete.
    cut_off = paths.code.exists() and not paths.code.read_bytes().endswith(b"\n")
    with paths.code.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_off + json.dumps({**code_version(), "versions": versions()}) + "\n")


class _Code(BaseModel):
    """The types of the fields of a line of code.jsonl."""

    commit: str | None = None
    changes: str | None = None
    versions: dict[str, str] = {}


def trained_by(paths: RunPaths) -> dict[str, Any]:
    """Return the code that trained a run's weights, which may differ from the code that records the run.

    Returns:
        `commit`, `changes` and `versions` of the last code that trained them, and under `earlier` those of any others. `commit`
        and `changes` are None if nothing was recorded or the line is damaged.
    """
    recorded = [_Code().model_dump()]
    if paths.code.exists():
        lines = paths.code.read_bytes().splitlines()
        recorded = [(parse_json(line, _Code) or _Code()).model_dump() for line in lines] or recorded
    *before, last = recorded
    earlier = [code for index, code in enumerate(before) if code != last and code not in before[:index]]
    return {**last, **({"earlier": earlier} if earlier else {})}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}


COMMAND = "SPARSEINST_COMMAND"
"""The environment variable that tells a job on a cluster which command sent it."""


def command_line() -> str:
    """Return the command that started this process or sent it to a cluster."""
    return os.environ.get(COMMAND) or shlex.join(["sparseinst", *sys.argv[1:]])


def describe(
    *,
    profile: str,
    device: str,
    world_size: int,
    attempts: int,
    seed: int,
    seconds: float,
    data: str | None,
    images: str | None = None,
    arithmetic: Mapping[str, str | int] | None = None,
) -> dict[str, Any]:
    """Return the provenance of a stage that has just ended in this process.

    Args:
        profile: the profile's name.
        device: the name of the device that the stage ran on.
        world_size: the number of processes that worked on it together.
        attempts: how often it was begun.
        seed: the seed of its training.
        seconds: its wall time.
        data: the hash of the annotation file that it read; None if it read none.
        images: the hash of the images that it read; see `images_digest`.
        arithmetic: see `device.arithmetic`. The same code can give other bits with other threads or instructions.
    """
    return {
        **code_version(),
        "versions": versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor_model(),
        "driver": gpu_driver(),
        "arithmetic": dict(arithmetic) if arithmetic is not None else None,
        "command": command_line(),
        "profile": profile,
        "device": device,
        "world_size": world_size,
        "attempts": attempts,
        "seed": seed,
        "data": data,
        "images": images,
        "seconds": round(seconds, 3),
        "peak_memory_mb": _peak_memory_mb(),
        "ended": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _peak_memory_mb() -> int:
    """Return the peak resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 if sys.platform != "darwin" else 1024**2))
