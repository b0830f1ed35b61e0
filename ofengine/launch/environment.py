"""Which rank this process is, by the environment variables that OneFlow reads.

OneFlow takes ``MASTER_ADDR``, ``MASTER_PORT``, ``WORLD_SIZE``, ``RANK`` and ``LOCAL_RANK``. Where
one of the first four is missing it sets them all to those of a lone process, which would train by
itself while the others wait for it; here that is an error.
"""

from __future__ import annotations

import os
from typing import Dict, Iterable, Mapping, Optional

import attrs

from ofengine.errors import ConfigurationError

_NEEDED = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")
_ADVICE = "Start the ranks with `ofengine launch`, or unset {} for a lone process."


@attrs.frozen
class World:
    """Where one rank stands among all."""

    rank: int
    """From 0 to ``world_size`` - 1."""
    world_size: int
    """How many ranks there are, on all nodes together."""
    local_rank: int
    """From 0 on, on this node."""
    local_world_size: int
    """Ranks on each node."""
    node_rank: int
    """Which node (host) this is, from 0 on."""
    nodes: int
    """How many nodes there are."""


def read(environ: Optional[Mapping[str, str]] = None) -> Optional[World]:
    """Where this process stands among the ranks; None for a lone process.

    A lone process in which OneFlow has been imported, and its children, have ``WORLD_SIZE=1`` and
    ``RANK=-1``: they are no ranks. ``LOCAL_WORLD_SIZE`` says how many ranks a node has. OneFlow's
    own launcher does not set it: then all are taken to be on one node where rank and local rank
    are equal, and elsewhere as many on a node as the two numbers allow.

    Args:
        environ: the variables. Default: those of this process.

    Raises:
        ConfigurationError: some are missing, or contradict each other.
    """
    given = os.environ if environ is None else environ
    here = {name: given[name] for name in _NEEDED if given.get(name)}
    if environ is None and _oneflow_has_set(here):
        # What it has written over is still known: were some given, and not all?
        at_start = _at_start()
        here = {name: at_start[name] for name in _NEEDED if at_start.get(name)}
        if len(here) == len(_NEEDED):
            return None
    if not here or (here.get("WORLD_SIZE") == "1" and here.get("RANK") in (None, "0", "-1")):
        return None
    missing = [name for name in _NEEDED if name not in here]
    if missing:
        raise ConfigurationError(
            f"{_listed(here)} {_be(here)} set, but not {_listed(missing)}, so this process cannot "
            f"tell which rank it is. {_ADVICE.format(_listed(here))}"
        )
    return _world(here, given.get("LOCAL_WORLD_SIZE"))


def variables(world: World, master_addr: str, master_port: int) -> Dict[str, str]:
    """The variables that make a process the rank that ``world`` says."""
    return {
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": str(master_port),
        "WORLD_SIZE": str(world.world_size),
        "RANK": str(world.rank),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_world_size),
    }


def place(local_rank: int, ranks: int, nodes: int = 1, node_rank: int = 0) -> World:
    """Rank ``local_rank`` of ``ranks`` on node ``node_rank`` of ``nodes``."""
    return World(
        rank=node_rank * ranks + local_rank,
        world_size=nodes * ranks,
        local_rank=local_rank,
        local_world_size=ranks,
        node_rank=node_rank,
        nodes=nodes,
    )


def _oneflow_has_set(here: Mapping[str, str]) -> bool:
    return here.get("WORLD_SIZE") == "1" and here.get("RANK") == "-1"


def _at_start() -> Dict[str, str]:
    """The variables with which this process was started."""
    try:
        with open("/proc/self/environ", "rb") as file:
            pairs = [os.fsdecode(each).partition("=") for each in file.read().split(b"\0")]
    except OSError:
        return {}
    return {name: value for name, _, value in pairs}


def _world(here: Mapping[str, str], per_node: Optional[str]) -> World:
    size = _number("WORLD_SIZE", here["WORLD_SIZE"], 1)
    rank = _number("RANK", here["RANK"], 0, size - 1, f"WORLD_SIZE={size}")
    local = _number("LOCAL_RANK", here["LOCAL_RANK"], 0, rank, f"RANK={rank}")
    _number("MASTER_PORT", here["MASTER_PORT"], 1, 65535)
    if per_node:
        each = _number("LOCAL_WORLD_SIZE", per_node, 1, size, f"WORLD_SIZE={size}")
        fits = size % each == 0 and rank % each == local
    elif rank == local:
        each, fits = size, True
    else:
        # Ranks are numbered node by node: rank = node * each + local.
        possible = (n for n in range(size, local, -1) if size % n == (rank - local) % n == 0)
        each = next(possible, 0)
        fits = each > 0
    if not fits:
        of_node = f" and LOCAL_WORLD_SIZE={per_node}" if per_node else ""
        raise ConfigurationError(
            f"WORLD_SIZE={size}, RANK={rank}, LOCAL_RANK={local}{of_node} contradict each other: "
            "each node has the same number of ranks, and they are counted node by node. Start "
            "them with `ofengine launch`."
        )
    return place(local, each, size // each, rank // each)


def _number(name: str, text: str, low: int, high: Optional[int] = None, because: str = "") -> int:
    try:
        number = int(text)
    except ValueError:
        raise ConfigurationError(f"{name}={text!r} is no whole number.") from None
    if number < low or (high is not None and number > high):
        span = f"from {low} on" if high is None else f"from {low} to {high}"
        given = f" with {because}" if because else ""
        raise ConfigurationError(
            f"{name}={number} cannot be{given}: it is a number {span}. Start the ranks with "
            "`ofengine launch`."
        )
    return number


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _be(names: Mapping[str, str]) -> str:
    return "is" if len(names) == 1 else "are"
