"""Orders: what a run is to do between two steps because it was told so from outside."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Optional

import attrs

from ofengine.processes.requests import Listener, rates_in


@attrs.frozen
class Change:
    """Base rates that groups were given, and when; one line of the file that a resume reads."""

    run: str
    step: int
    batches_seen: int
    sitting: int
    rates: Dict[str, float]

    @classmethod
    def of(cls, said: Dict[str, Any]) -> Optional[Change]:
        """``said`` as a change; None where it is none."""
        rates = rates_in(said.get("rates"))
        at: Dict[str, Any] = {key: said.get(key) for key in ("step", "batches_seen", "sitting")}
        are_whole = all(type(each) is int and each >= 0 for each in at.values())
        if rates is None or not are_whole or not isinstance(said.get("run"), str):
            return None
        return cls(run=said["run"], rates=rates, **at)


@attrs.define
class Orders:
    """What waits to be done. The loop compares ``due`` after each batch, and looks at nothing else.

    Attributes:
        due: the batches seen from which on something is to be done; infinite for nothing.
        wanted: True where a request has come that the other ranks do not know of.
        agreed: True where all ranks know that rank 0 has one.
        repeats: changes of the run before it was resumed, that it has yet to come to, in order.
        listener: the run's end of the requests; None where it has no folder, and on other ranks.
    """

    due: float = math.inf
    wanted: bool = False
    agreed: bool = False
    repeats: List[Change] = attrs.Factory(list)
    listener: Optional[Listener] = None

    def came(self) -> None:
        """All ranks know of a request: it is done after this batch."""
        self.agreed = True
        self.due = 0

    def wait(self) -> None:
        """Nothing is to be done before the next change that is repeated."""
        self.wanted = self.agreed = False
        self.due = self.repeats[0].batches_seen if self.repeats else math.inf
