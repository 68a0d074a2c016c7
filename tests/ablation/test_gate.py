"""Check which trainings count as evidence."""

from typing import Any

from sparseinst.ablation.gate import curve, not_trained, untrained_ap

CONFIG = {"loss": {"dice_weight": 2.0}}


def training(late: float = 0.5, dice: float = 0.3, rise: float = 0.2) -> dict[str, Any]:
    """Return the result of a training of 1,000 steps whose loss is flat in the last fifth, except for its last tenth."""
    steps = []
    for iteration in range(10, 1001, 10):
        loss = 0.5 if iteration > 900 else late if iteration > 800 else 2.0
        steps.append({"iteration": iteration, "loss": loss, "loss_dice": dice})
    history = [{"iteration": 800, "AP": 30.0}, {"iteration": 900, "AP": 30.0 + rise}]
    return {"steps": 1000, "curve": curve(steps), "history": history}


def test_a_finished_training_passes() -> None:
    assert not_trained(training(), CONFIG) == []
    assert not_trained({"steps": 1000}, CONFIG) == [], "an old record has no curve"


def test_each_reason_is_found() -> None:
    assert not_trained(training(late=0.6), CONFIG) == ["the loss still falls by 16.7 % in the last tenth of the steps"]
    assert not_trained(training(dice=1.99), CONFIG) == ["the Dice loss ends at 99 % of its maximum"]
    assert not_trained(training(rise=3.5), CONFIG) == ["AP still rises by 3.5 in a tenth of the steps"]
    assert untrained_ap(0.4) == ["AP 0.4 is near zero"]
    assert untrained_ap(1.4) == []
    assert untrained_ap(None) == []


def test_a_curve_has_at_most_50_points_and_keeps_the_last_step() -> None:
    lines = [{"iteration": n, "loss": float(n), "learning_rate": 1.0} for n in range(1, 1235)]
    found = curve(lines)
    assert set(found) == {"iteration", "loss"}
    assert len(found["loss"]) == 50
    assert found["iteration"][-1] == 1234
    assert curve(lines[:2]) == {"iteration": [1, 2], "loss": [1.0, 2.0]}
