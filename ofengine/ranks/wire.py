"""Short messages between the ranks, from host to host: they wait for no device.

OneFlow's collectives over tensors take their turn behind what a device has still to compute. What
ranks tell each other is known to Python long before: it goes by the broadcast that OneFlow sends
from host to host, of each rank in turn, while the devices go on.
"""

from __future__ import annotations

from typing import Callable, List, Optional

from ofengine._oneflow.host_messages import broadcast
from ofengine.errors import RankError
from ofengine.launch.environment import World
from ofengine.launch.heartbeat import exchange


class Wire:
    """This rank's end.

    Args:
        world: which rank it is, of how many.
    """

    def __init__(self, world: World) -> None:
        self._rank, self._size = world.rank, world.world_size
        self._is_cut = False

    def exchange(self, own: bytes, meanwhile: Optional[Callable[[], None]] = None) -> List[bytes]:
        """What each rank gives, in the order of ranks; all call it.

        ``meanwhile`` is called once, behind what this rank sends.

        Raises:
            RankError: an error has cut an earlier exchange off.
        """
        if self._is_cut:
            raise RankError("the ranks of this run have lost each other: start them again.")
        self._is_cut = True  # unless all goes well: what comes next could not be told from the rest
        given: List[bytes] = []
        with exchange:
            for rank in range(self._size):
                mine = rank == self._rank
                given.append(broadcast(own if mine else None, rank))
                if mine and meanwhile is not None:
                    meanwhile()
        self._is_cut = False
        return given
