"""Calendar against a loop over epochs, batches and windows that counts everything."""

from __future__ import annotations

from typing import Any, List, NamedTuple, Optional, Sequence

import pytest
from hypothesis import given, strategies as st

from ofengine.rates.calendar import Calendar, ceil_div

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
WINDOWS = st.integers(1, 5)
INTERVALS = st.integers(1, 12)


class Step(NamedTuple):
    """What a hand-counted loop knows when it makes an optimizer step."""

    epoch: int
    events: int
    first_of_epoch: int


def count_by_hand(
    lengths: Sequence[int], accumulate: int, every: int = 1, per_epoch: bool = True
) -> List[Step]:
    """Every optimizer step of a run over epochs of these lengths."""
    steps: List[Step] = []
    events = batches_in_run = 0
    for epoch, length in enumerate(lengths):
        first = len(steps)
        window: List[int] = []
        for batch in range(length):
            window.append(batch if per_epoch else batches_in_run)
            batches_in_run += 1
            if len(window) == accumulate or batch == length - 1:
                steps.append(Step(epoch, events, first))
                events += sum(index % every == 0 for index in window)
                window.clear()
    return steps


def check(calendar: Calendar, steps: Sequence[Step], every: int, per_epoch: bool) -> None:
    for step, expected in enumerate(steps):
        assert calendar.epoch_of(step) == expected.epoch, step
        assert calendar.events_before(step, every, per_epoch) == expected.events, step


@given(
    length=st.integers(1, 9),
    accumulate=WINDOWS,
    every=INTERVALS,
    per_epoch=st.booleans(),
    told=st.integers(0, 5),
)
def test_epochs_of_one_known_length(
    length: int, accumulate: int, every: int, per_epoch: bool, told: int
) -> None:
    """Steps, epochs and events are known ahead, and stay as they are when epochs end."""
    steps = count_by_hand([length] * 6, accumulate, every, per_epoch)
    calendar = Calendar(length, accumulate)
    check(calendar, steps, every, per_epoch)
    for epoch in range(told):
        assert calendar.epoch_ended(epoch, length) is False
    check(calendar, steps, every, per_epoch)


@given(
    expected=st.one_of(st.none(), st.integers(1, 9)),
    lengths=LENGTHS,
    accumulate=WINDOWS,
    every=INTERVALS,
    per_epoch=st.booleans(),
)
def test_epochs_of_any_length_once_they_ended(
    expected: Optional[int], lengths: List[int], accumulate: int, every: int, per_epoch: bool
) -> None:
    """What is past is right; what is to come is taken to be as long as was expected.

    Where nothing was expected, it is taken to be as long as the first epoch was.
    """
    calendar = Calendar(expected, accumulate)
    for epoch, length in enumerate(lengths):
        if expected is None and epoch == 0:
            assert calendar.epoch_ended(epoch, length) is True
        else:
            usual = lengths[0] if expected is None else expected
            assert calendar.epoch_ended(epoch, length) is (length != usual)
        usual = lengths[0] if expected is None else expected
        run = [*lengths[: epoch + 1], usual, usual, usual]
        check(calendar, count_by_hand(run, accumulate, every, per_epoch), every, per_epoch)


@given(accumulate=WINDOWS, every=INTERVALS, per_epoch=st.booleans())
def test_a_first_epoch_of_unknown_length_goes_on(
    accumulate: int, every: int, per_epoch: bool
) -> None:
    """As long as nobody knows the length, every step is the first epoch's."""
    steps = count_by_hand([50], accumulate, every, per_epoch)[:-1]  # the last window may be short
    check(Calendar(None, accumulate), steps, every, per_epoch)


@given(
    expected=st.integers(1, 9),
    lengths=st.lists(st.integers(1, 9), max_size=4),
    accumulate=WINDOWS,
    every=INTERVALS,
    per_epoch=st.booleans(),
    stop=st.integers(1, 40),
)
def test_next_epoch_and_next_event(
    expected: int,
    lengths: List[int],
    accumulate: int,
    every: int,
    per_epoch: bool,
    stop: int,
) -> None:
    """The next change is found, however far away it is."""
    calendar = Calendar(expected, accumulate)
    for epoch, length in enumerate(lengths):
        calendar.epoch_ended(epoch, length)
    steps = count_by_hand([*lengths, *[expected] * 45], accumulate, every, per_epoch)
    for step in range(min(stop, 20)):
        next_epoch = next(i for i, s in enumerate(steps) if s.epoch == steps[step].epoch + 1)
        assert calendar.next_epoch(step) == next_epoch
        later = [i for i, s in enumerate(steps) if s.events > steps[step].events and i <= stop]
        found = calendar.next_event(step, every, per_epoch, stop)
        assert found == (later[0] if later else stop)


def test_the_cookbook_s_calendar() -> None:
    """In epochs of 23 batches, decay every 10: after the batches 0, 10 and 20 of each."""
    calendar = Calendar(23)
    seen = [calendar.events_before(step, 10, per_epoch=True) for step in range(47)]
    events = [step for step in range(46) if seen[step + 1] > seen[step]]
    assert events == [0, 10, 20, 23, 33, 43]
    seen = [calendar.events_before(step, 10, per_epoch=False) for step in range(47)]
    assert [step for step in range(46) if seen[step + 1] > seen[step]] == [0, 10, 20, 30, 40]


def test_far_steps_are_found_without_counting() -> None:
    """A step of the far future is located by arithmetic, not by walking there."""
    calendar = Calendar(1000, accumulate=3)
    step = 334 * 10**9
    assert calendar.epoch_of(step - 1) == 10**9 - 1
    assert calendar.epoch_of(step) == 10**9
    assert calendar.events_before(step, 10, per_epoch=True) == 100 * 10**9
    assert calendar.events_before(step, 7, per_epoch=False) == ceil_div(10**12, 7)


@pytest.mark.parametrize("a, b, expected", [(0, 3, 0), (1, 3, 1), (3, 3, 1), (4, 3, 2), (9, 1, 9)])
def test_ceil_div(a: int, b: int, expected: Any) -> None:
    """Division that rounds up."""
    assert ceil_div(a, b) == expected
