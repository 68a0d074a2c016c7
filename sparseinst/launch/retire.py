"""Set the records and folders of runs aside, so that the runs are done again. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sparseinst.ablation.store import Store
from sparseinst.attempt_files import latest_attempt
from sparseinst.errors import UserError
from sparseinst.files import make_folder
from sparseinst.launch.submission import read_submission
from sparseinst.paths import RETIRED, run_folder


def retire(keys: Iterable[str], store: Store) -> list[str]:
    """Set runs aside: each record becomes `KEY.retired` in its folder, and each run's folder moves to `runs/retired`.

    Args:
        keys: the keys of the runs; those with neither a record in the store's folder nor a folder are left out.

    Returns:
        The keys of the runs that were set aside.

    Raises:
        UserError: a process or a job of a cluster may be working on one of the runs; then none is set aside.
    """
    known = [key for key in dict.fromkeys(keys) if store.path(key).exists() or run_folder(key).root.exists()]
    for key in known:
        paths = run_folder(key)
        attempt = latest_attempt(paths)
        if attempt is not None and attempt.at_work():
            raise UserError(f"{paths.root}: a process is working on this run: stop it first; nothing was set aside")
        if not store.has(key) and read_submission(paths) is not None and attempt is None:
            raise UserError(f"{paths.root}: a job for this run was sent to a cluster: cancel it first; nothing was set aside")
    for key in known:
        if store.path(key).exists():
            store.path(key).rename(_free(store.path(key).with_suffix(".retired")))
        if run_folder(key).root.exists():
            run_folder(key).root.rename(_free(make_folder(RETIRED) / key))
    return known


def _free(path: Path) -> Path:
    """Return the path, or the first of `NAME-2`, `NAME-3` and so on that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate
