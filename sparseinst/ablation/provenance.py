"""Under what conditions a result came about. Imports no torch."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import resource
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparseinst.paths import RunPaths

PACKAGE = Path(__file__).parents[1]
SNAPSHOT = "snapshot.json"
"""Beside a copy of the package: its `code_version`."""
PACKAGES = ("sparseinst", "torch", "torchvision", "timm", "numpy", "scipy", "hotcoco")


@cache
def code_version() -> dict[str, str | None]:
    """The commit of the code that runs, and the content's hash where it differs from that; None where it is no git checkout."""
    snapshot = PACKAGE.parent / SNAPSHOT
    if snapshot.exists():  # a copy, made when a job was sent to a cluster
        described: dict[str, str | None] = json.loads(snapshot.read_text(encoding="utf-8"))
        return described

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):  # no git, or no repository
            return None
        return done.stdout

    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--", ".")  # new files, too
    return {"commit": commit.strip() if commit else None, "changes": code_digest() if changed else None}


def code_files() -> list[Path]:
    """Those of the package, relative to it."""
    files = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file())
    return sorted(path for path in files if "__pycache__" not in path.parts)


@cache
def code_digest() -> str:
    """16 hexadecimal digits of the package's content."""
    digest = hashlib.sha256()
    for path in code_files():
        digest.update(f"{path} {hashlib.sha256((PACKAGE / path).read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def note_code(paths: RunPaths) -> None:
    """Note in a run's folder that this code works on its training."""
    paths.root.mkdir(parents=True, exist_ok=True)
    # On a line of its own, also after one that a kill cut off.
    cut_off = paths.code.exists() and not paths.code.read_bytes().endswith(b"\n")
    with paths.code.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_off + json.dumps({**code_version(), "versions": versions()}) + "\n")


def trained_by(paths: RunPaths) -> dict[str, Any]:
    """Commit, changes and versions of the code that made a run's weights, which need not be the code that records it: the last
    that worked on them, and under `earlier` the others. Unknown, None, where nothing is noted, or a kill cut it off.
    """
    unknown: dict[str, Any] = {"commit": None, "changes": None, "versions": {}}
    noted = [unknown]
    if paths.code.exists():
        noted = [_noted(line) or unknown for line in paths.code.read_text(encoding="utf-8").splitlines()] or noted
    *before, last = noted
    earlier = [code for index, code in enumerate(before) if code != last and code not in before[:index]]
    return {**last, **({"earlier": earlier} if earlier else {})}


def _noted(line: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return found


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}


def describe(
    *, profile: str, device: str, world_size: int, attempts: int, seed: int, seconds: float, data: str | None
) -> dict[str, Any]:
    """Provenance of one stage that just ended in this process.

    Args:
        device: the name of the device it ran on.
        world_size: processes that worked on it together.
        attempts: how often it was begun.
        seconds: wall time.
        data: hash of the annotation file it read.
    """
    return {
        **code_version(),
        "versions": versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "profile": profile,
        "device": device,
        "world_size": world_size,
        "attempts": attempts,
        "seed": seed,
        "data": data,
        "seconds": round(seconds, 3),
        "peak_memory_mb": _peak_memory_mb(),
        "ended": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _peak_memory_mb() -> int:
    """Of this process so far, in the machine's memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 if sys.platform != "darwin" else 1024**2))
