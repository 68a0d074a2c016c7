"""End a training after its current step when the user or the system asks it to stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from sparseinst.distributed import world_size

_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)  # the command line gives SIGTERM the handler of Ctrl-C


class StopRequest:
    """Note SIGINT (Ctrl-C) and SIGTERM while the block runs, so that a training can save a checkpoint before it ends.

    The first signal only sets `requested`; a second signal ends the process at once. A signal that has another handler than
    Python's default, such as a scheduler's, is left alone.

    In a process group, all signals are left alone, because all processes would have to stop after the same step. A signal then
    ends the process at once, and the training can continue from its last regular checkpoint.
    """

    def __init__(self) -> None:
        self.requested = False
        self._replaced: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread() and world_size() == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) in _DEFAULTS:
                    self._replaced[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced = {}

    def stopped(self, done: int, total: int) -> SystemExit:
        """Return the exception that ends a training after `done` steps and a checkpoint. The user sees its text."""
        return SystemExit(f"stopped after step {done} of {total} with a checkpoint; the same command continues there")
