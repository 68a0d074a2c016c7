"""Follow the AP of the evaluations during training: which step was the best, and whether there is still progress."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class BestSoFar:
    """The best evaluation of a training until now. A checkpoint holds its state, so that a resumed run goes on with it."""

    ap: float | None = None
    """In percent; None before the first evaluation with an AP."""
    step: int = 0
    """The number of steps that were done."""
    without_better: int = 0
    """The number of evaluations since then."""

    def note(self, step: int, ap: float | None) -> bool:
        """Take in the evaluation after this many steps, and return whether it is the best."""
        if ap is not None and (self.ap is None or ap > self.ap):
            self.ap, self.step, self.without_better = ap, step, 0
            return True
        self.without_better += 1
        return False

    def describe(self, step: int, total: int, ap: float | None) -> str:
        """Return one line about the evaluation that was noted last."""
        if ap is None:
            return f"step {step} of {total}: no AP, because the validation images hold no objects"
        best = "the best so far" if step == self.step else f"the best is {self.ap:.1f}, after step {self.step}"
        return f"step {step} of {total}: AP {ap:.1f}; {best}"

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
