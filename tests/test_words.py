"""Check the words of messages: numbers with their nouns, and estimated times."""

import pytest

from sparseinst.cli.models import _time
from sparseinst.words import counted, three_digits


def test_a_noun_and_its_verb_fit_the_number() -> None:
    assert [counted(count, "image", "has", "have") for count in (0, 1, 2)] == ["0 images have", "1 image has", "2 images have"]
    assert [counted(count, "class") for count in (1, 2)] == ["1 class", "2 classes"]


def test_large_numbers_have_no_powers_of_ten() -> None:
    assert [three_digits(value) for value in (0.2512, 16.84, 99.96, 8841.0)] == ["0.251", "16.8", "100", "8,841"]


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0.001, "about 1 minute"), (0.2, "about 12 minutes"), (2.04, "about 2.0 hours"), (8840.0, "about 8,840.0 hours")],
)
def test_a_short_time_is_given_in_minutes(hours: float, text: str) -> None:
    assert _time(hours) == text
