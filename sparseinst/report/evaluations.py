"""Return all recorded evaluations as one data frame. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pandas as pd

from sparseinst.ablation.store import RESULTS, Store
from sparseinst.ablation.study import EXPERIMENTS, Figure, read_profile, read_tables, row_config
from sparseinst.report.records import EVALUATED, Column, commit_of, find_records, sample_of

_log = logging.getLogger(__name__)

COLUMNS = ("table", "row", "seed", "profile", *EVALUATED, "key", "train_key", "commit", "not_trained")


def results(
    tables: str | Sequence[str] = (), profile: str | Sequence[str] | None = None, folder: Path | str = RESULTS
) -> pd.DataFrame:
    """Return a line for each recorded evaluation of a row of a table, as the report reads it.

    Args:
        tables: tables by name (`table5`) or specs by path; the default is all tables in `experiments/`.
        profile: one or more scales, by name or path; None takes those that the records name.
        folder: the results folder, which holds `records/`.

    Returns:
        A frame with the columns `table`, `row`, `seed`, `profile`; the AP metrics and the metrics of the activation maps, in
        percent except `lift` and `duplicates`, NaN if unknown; `key` of the evaluation, `train_key` of its training; `commit`
        of the code that evaluated, with a plus if the code differed from it; and `not_trained`, the reasons why the training is
        no evidence, empty if there are none. Rows of several tables can share an evaluation, so a key can occur more than once.

    Raises:
        UserError: a spec or profile does not exist or contains a mistake, or the folder is a file.
    """
    store = Store(Path(folder))
    keys = store.keys()
    names = _recorded_profiles(store, keys) if profile is None else profile
    scales = [read_profile(name) for name in ([names] if isinstance(names, str) else names)]
    lines: list[dict[str, Any]] = []
    for table in read_tables([tables] if isinstance(tables, str) else tables):
        for scale in scales:
            for row in table.spec.rows:
                entry = find_records(table, row, scale, store, {}, keys)
                for seed, record in sorted(entry.evaluations.items()):
                    base = row_config(table.spec, row, scale, seed)
                    values = {metric: sample_of(entry, Column(cast(Figure, metric)), {seed}) for metric in EVALUATED}
                    lines.append(
                        {
                            **{"table": table.name, "row": row.name, "seed": seed, "profile": scale.name},
                            **{metric: sample.mean if sample is not None else None for metric, sample in values.items()},
                            "key": record.key,
                            "train_key": base.train_key(),
                            "commit": commit_of(record.provenance),
                            "not_trained": "; ".join(
                                why.removeprefix(f"seed {seed}: ")
                                for why in entry.not_trained
                                if why.startswith(f"seed {seed}: ")
                            ),
                        }
                    )
    frame = pd.DataFrame(lines, columns=list(COLUMNS))
    return frame.astype(dict.fromkeys(EVALUATED, float))


def _recorded_profiles(store: Store, keys: set[str]) -> list[str]:
    """Return the names of the profiles under which evaluations were recorded, sorted, without unknown ones."""
    records = (store.load(key) for key in keys)
    named = {str(r.provenance.get("profile")) for r in records if r is not None and r.kind == "evaluate"}
    known = {path.stem for path in (EXPERIMENTS / "profiles").glob("*.yaml")}
    for name in sorted(named - known):
        _log.warning("evaluations of the profile %s are left out, because %s/profiles has no such file", name, EXPERIMENTS)
    return sorted(named & known)
