"""Give the folders of runs names that people can read, and find runs by these names. Imports no torch."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable

from sparseinst.files import atomic
from sparseinst.paths import NAMES, RUNS, RunPaths

_log = logging.getLogger(__name__)


def give_name(paths: RunPaths, name: str) -> None:
    """Write a run's name into its folder, and link to the folder in `runs/by-name`.

    A run that several rows share keeps the name that it was given first.
    """
    if paths.name.exists():
        return
    with atomic(paths.name) as temporary:
        temporary.write_text(name + "\n", encoding="utf-8")
    link = NAMES / re.sub(r"[^\w ,.+()=-]+", "-", name)
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():  # the row had another key before its settings were changed: the newest run has the name
            link.unlink()
        link.symlink_to(os.path.relpath(paths.root, link.parent), target_is_directory=True)
    except OSError as error:  # some file systems have no links; the name in the folder is enough
        _log.info("%s: no link to %s (%s)", link, paths.root, error)


def named_runs() -> Iterable[tuple[RunPaths, str]]:
    """Yield the folders of runs of tables in `runs`, whatever their profile, with their names."""
    for file in sorted(RUNS.glob("*/name.txt")):
        paths = RunPaths(file.parent)
        yield paths, paths.read_name()


def folded(text: str) -> str:
    """Return a text in the form in which names are compared: `table5/dice` means the row `dice` of `table5`."""
    return " ".join(text.replace("/", " ").casefold().split())
