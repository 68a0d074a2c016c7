"""Set the records and folders of runs aside, so that the runs are done again. Imports no torch."""

from __future__ import annotations

from collections.abc import Container, Iterable

from sparseinst.ablation.store import Store
from sparseinst.attempt_files import latest_attempt
from sparseinst.errors import UserError
from sparseinst.files import free_path, make_folder
from sparseinst.overrides import parse_config
from sparseinst.paths import RETIRED, run_folder


def retire(keys: Iterable[str], store: Store, busy: Container[str] = ()) -> list[str]:
    """Set runs aside: each record becomes `KEY.retired` in its folder, and each run's folder moves to `runs/retired`.

    A training takes all evaluations of it with it, because they describe its weights.

    Args:
        keys: the keys of the runs; those with neither a record in the store's folder nor a folder are left out.
        busy: the keys of runs that a job of a cluster is doing or will do.

    Returns:
        The keys of the runs that were set aside.

    Raises:
        UserError: one of the runs is busy, or a process is working on it; then none is set aside.
    """
    chosen = dict.fromkeys(keys)
    chosen |= dict.fromkeys(evaluations_of(chosen, store))
    known = [key for key in chosen if store.path(key).exists() or run_folder(key).root.exists()]
    for key in known:
        attempt = latest_attempt(run_folder(key))
        if key in busy or (attempt is not None and attempt.at_work()):
            raise UserError(f"{run_folder(key).root}: this run is sent or running: stop it first; nothing was set aside")
    for key in known:
        store.retire(key)
        if run_folder(key).root.exists():
            run_folder(key).root.rename(free_path(make_folder(RETIRED) / key))
    return known


def evaluations_of(trainings: Container[str], store: Store) -> list[str]:
    """Return the keys of all recorded evaluations of these trainings, whatever their table and seed."""
    found = []
    for key in sorted(store.keys()):
        record = store.load(key) if store.path(key).exists() else None
        if record is not None and record.kind == "evaluate":
            training = record.provenance.get("training") or (parse_config(record.config).train_key() if record.config else None)
            if training in trainings:
                found.append(key)
    return found
