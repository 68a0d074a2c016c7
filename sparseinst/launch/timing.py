"""Time rows by turns and write their records. Imports no torch before it times."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from filelock import FileLock, Timeout

from sparseinst.ablation.plan import StageRun
from sparseinst.ablation.provenance import code_version
from sparseinst.ablation.store import Store
from sparseinst.attempts import Attempt, Held, Superseded
from sparseinst.launch.names import give_name
from sparseinst.launch.work import StageContext, check_device, timing_result, write_record
from sparseinst.machine import machine_name
from sparseinst.paths import RUNS, run_folder


def time_rows(
    runs: Sequence[StageRun], store: Store, context: StageContext, begin: Callable[[Sequence[StageRun]], None]
) -> dict[str, Exception | None]:
    """Time several rows by turns and write their records, so that changes of the machine's speed affect all rows alike.

    One process times at a time on a machine and device.

    Args:
        begin: is called with the rows that this process times.

    Returns:
        For each of these rows, by key: the exception that ended it, or None. Another process does the others.
    """
    RUNS.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"\W+", "-", f"{machine_name()}-{context.device_name}")
    ended: dict[str, Exception | None] = {}
    try:
        with FileLock(RUNS / f".timing-{device}.lock", timeout=0), ExitStack() as stack:
            claims: dict[str, _Claimed] = {}
            for run in runs:
                own = stack.enter_context(ExitStack())
                try:
                    attempt = own.enter_context(context.claim(run_folder(run.key)))
                except (Held, Superseded):  # another process is doing it
                    continue
                except Exception as error:  # noqa: BLE001 (the other rows are still timed)
                    ended[run.key] = error
                    continue
                if not run.is_done(store):
                    claims[run.key] = _Claimed(run, attempt, own)
            if claims:
                begin([claimed.run for claimed in claims.values()])
                _time_claimed(claims, store, context, ended)
    except Timeout:  # another process is timing
        return {}
    return ended


class _Claimed(NamedTuple):
    run: StageRun
    attempt: Attempt
    stack: ExitStack
    """Ends the attempt. With an exception, the attempt records its failure."""

    def fail(self, error: Exception) -> None:
        self.stack.__exit__(type(error), error, error.__traceback__)


def _time_claimed(
    claims: Mapping[str, _Claimed], store: Store, context: StageContext, ended: dict[str, Exception | None]
) -> None:
    """Time the claimed rows and write their records. The function adds to `ended`, unless another process takes a row over."""
    began = time.perf_counter()
    session = datetime.datetime.now(datetime.UTC).isoformat()
    try:
        code_version()  # it is asked once, before somebody edits the code
        check_device(context)
        from sparseinst.bench.benchmark import measure_latencies
        from sparseinst.device import pick_device

        measured = measure_latencies([claimed.run.config for claimed in claims.values()], device=pick_device(context.device))
    except Exception as error:  # noqa: BLE001 (each row records why it was not timed)
        for key, claimed in claims.items():
            claimed.fail(error)
            ended[key] = error
        return
    seconds = (time.perf_counter() - began) / len(measured)
    for (key, claimed), latency in zip(claims.items(), measured, strict=True):
        try:
            if isinstance(latency, Exception):
                raise latency
            give_name(run_folder(key), claimed.run.name(context.profile))
            outcome = timing_result(claimed.run, latency), None
            write_record(claimed.run, outcome, store, context, claimed.attempt, seconds, {}, session=session)
            ended[key] = None
        except Superseded as error:
            claimed.fail(error)
        except Exception as error:  # noqa: BLE001 (the other rows are still recorded)
            claimed.fail(error)
            ended[key] = error
