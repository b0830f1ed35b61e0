"""Which rank is at fault, from what is seen of all."""

from __future__ import annotations

from typing import List, Optional

import pytest

from ofengine.launch.verdict import Seen, death, early, hang

BUSY = Seen(0, connected=True, begun=1)
FAR = 1000.0


def ranks(*changes: object) -> List[Seen]:
    """Ranks 0, 1, ... at work in their first verb, each with its changes."""
    return [BUSY._replace(rank=n, **each) for n, each in enumerate(changes)]  # type: ignore[arg-type]


def who(fault: object) -> Optional[int]:
    return getattr(fault, "rank", None)


@pytest.mark.parametrize(
    ("seen", "first"),
    [
        (ranks({}, {}), None),
        (ranks({"code": -6}, {"code": -9}), 1),  # OneFlow aborts who loses another
        (ranks({"code": -6}, {"code": 1}), 1),
        (ranks({"code": -6}, {"code": 0}), 1),
        (ranks({"code": -6}, {"failed_at": 5}), 1),
        (ranks({}, {"code": -6}), 1),
        (ranks({"failed_at": 7}, {"failed_at": 5}, {"failed_at": 6}), 1),
        (ranks({"code": 0, "ended": 1}, {"code": 0, "ended": 1}), None),
        (ranks({"code": 0, "leaving": 2}, {}), None),  # the error was caught, perhaps by all
    ],
)
def test_the_first_death(seen: List[Seen], first: Optional[int]) -> None:
    assert who(death(seen, stopping=False)) == first


@pytest.mark.parametrize(
    ("change", "is_fault"),
    [
        ({"code": -15}, False),
        ({"code": 143}, False),
        ({"code": 0}, False),
        ({"code": -6, "over": True}, False),  # at OneFlow's exit
        ({"code": -9}, True),
        ({"failed_at": 1}, True),
    ],
)
def test_of_ranks_that_were_asked_to_stop_only_crashes_and_errors(
    change: object, is_fault: bool
) -> None:
    assert (death(ranks({}, change), stopping=True) is not None) == is_fault


@pytest.mark.parametrize(
    ("seen", "at_fault"),
    [
        (ranks({}, {"over": True, "gone": 0.6}), 1),
        (ranks({}, {"over": True, "gone": 0.4}), None),  # the other may come to the same
        (ranks({}, {"over": True, "gone": FAR, "ended": 1}), None),  # it has done its part
        (ranks({"begun": 2, "ended": 1}, {"over": True, "gone": FAR, "ended": 1}), 1),
        (ranks({"waits": 2.0}, {"over": True, "gone": 2.0, "ended": 1}), 1),
        (ranks({"waits": 2.0}, {"over": True, "gone": 0.5, "ended": 1}), None),
        (ranks({"waits": 6.0}, {"silent": 6.0, "leaving": 2}), 1),
        (ranks({"waits": 6.0}, {"silent": 6.0, "ended": 1}), 1),
        (ranks({"waits": 2.0}, {"silent": 6.0, "leaving": 2}), None),
        (ranks({"leaving": 1}, {"over": True, "gone": FAR, "leaving": 2}), None),  # so does it
        (ranks({"waits": FAR}, {"waits": FAR}), None),  # a matter of the limit for hangs
    ],
)
def test_an_early_end(seen: List[Seen], at_fault: Optional[int]) -> None:
    assert who(early(seen, patience=0.5)) == at_fault


@pytest.mark.parametrize(
    ("seen", "at_fault"),
    [
        (ranks({"silent": 9}, {"silent": 9}), None),
        (ranks({"silent": 11, "waits": 11}, {"silent": 10.9}), 1),
        (ranks({"silent": 11, "waits": 11}, {"silent": 12, "waits": 12}, {"silent": 11}), 2),
        (ranks({"silent": 11}, {"silent": 12}), 1),
        (ranks({"silent": 11}, {"begun": 0}), 1),
        (ranks({"silent": 11}, {"begun": 0, "connected": False}), 1),
        (ranks({"silent": 11}, {"ended": 1, "silent": 5}), 1),
        (ranks({"ended": 1, "silent": FAR}, {"ended": 1, "silent": FAR}), None),
        (ranks({"leaving": 1, "silent": 11}, {"leaving": 2, "silent": 1}), 1),
        (ranks({"silent": 11, "waits": 11}, {"silent": 0.1}), None),  # at work
    ],
)
def test_a_hang(seen: List[Seen], at_fault: Optional[int]) -> None:
    assert who(hang(seen, limit=10)) == at_fault


def test_where_all_wait_it_is_a_rank_of_another_host() -> None:
    fault = hang(ranks({"silent": 11, "waits": 11}, {"silent": 12, "waits": 12}), limit=10)
    assert fault is not None
    assert "waiting for a rank on another host" in fault.what
