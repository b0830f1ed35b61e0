"""Starts the ranks of one host, once or again and again, and tells of the first that failed."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
import time
from typing import Iterator, Optional, Sequence

from ofengine.errors import ConfigurationError
from ofengine.launch import network
from ofengine.launch.link import Link, Nodes
from ofengine.launch.process import descendants
from ofengine.launch.session import Around, Outcome, Session
from ofengine.launch.signals import Signals
from ofengine.processes.supervisor import duration, say

DEFAULT_PORT = 29500
"""Where rank 0 is found by ranks on other hosts; OneFlow's launcher has the same."""
_PR_SET_CHILD_SUBREAPER = 36


def start_ranks(
    command: Sequence[str],
    ranks: int,
    *,
    nodes: int = 1,
    node_rank: int = 0,
    master_addr: str = "127.0.0.1",
    master_port: Optional[int] = None,
    hang_timeout: float = 300.0,
    show_all: bool = False,
) -> int:
    """Run ``command`` as ``ranks`` ranks on this host until all have ended; return the exit code.

    Where one rank fails, is killed, hangs or ends while others need it, all are ended, and stderr
    tells of the first. The first Ctrl-C or SIGTERM is passed on to every rank once, a second one
    kills them. All die with this process.

    Args:
        command: the program and its arguments.
        ranks: ranks on this host, from 1 on.
        nodes: hosts, each with as many ranks and a launcher of its own.
        node_rank: which of them this is, from 0 on.
        master_addr: the host of rank 0, as the others reach it.
        master_port: a free port there. Default: any for one host, 29500 for several.
        hang_timeout: seconds after which a rank that shows no sign of work hangs; 0: never.
        show_all: show what ranks other than 0 write, too.

    Returns:
        0 where all ranks ended with 0; else what the first to fail ended with, 128 + n after
        signal n.

    Raises:
        ConfigurationError: an argument is wrong; nothing was started.
    """
    where = _checked(ranks, nodes, node_rank, master_addr, master_port)
    if not hang_timeout >= 0:
        raise ConfigurationError(f"hang_timeout={hang_timeout}: give seconds from 0 on.")
    if threading.current_thread() is not threading.main_thread():
        raise ConfigurationError("ranks can be started in the main thread only.")
    public = network.public_addresses()
    if public:
        say(
            "ofengine: OneFlow's servers listen on every address of this host without "
            f"authentication, {public[0]} among them, which is public: have a firewall close "
            "them, or start the ranks in a network namespace (docs/en/scaling.md)."
        )
    started, life = time.time(), 0
    with contextlib.ExitStack() as stack:
        around = Around(
            signals=stack.enter_context(Signals()),
            link=stack.enter_context(contextlib.closing(Link(where))) if nodes > 1 else None,
            strangers=descendants(),
        )
        stack.enter_context(_orphans_come_here())
        while True:
            life += 1
            tag = f"{life}:{os.getpid()}:{started}"
            session = Session(command, where, around, life, tag, hang_timeout or math.inf, show_all)
            outcome = session.run()
            if not _again(outcome, life, where):
                return outcome.code
            if master_port is None and nodes == 1:
                where = where._replace(master_port=network.free_port())


def _checked(
    ranks: int, nodes: int, node_rank: int, master_addr: str, master_port: Optional[int]
) -> Nodes:
    for name, number in (("ranks", ranks), ("nodes", nodes)):
        if number < 1:
            raise ConfigurationError(f"{name}={number}: give a number from 1 on.")
    if not 0 <= node_rank < nodes:
        raise ConfigurationError(
            f"node_rank={node_rank}: with {nodes} nodes give a number from 0 to {nodes - 1}."
        )
    if nodes > 1 and node_rank > 0 and master_addr in ("127.0.0.1", "localhost", "::1"):
        say(
            f"ofengine: node {node_rank} looks for rank 0 at {master_addr}, which is this host; "
            "master_addr is the address of node 0."
        )
    if master_port is None:
        master_port = network.free_port() if nodes == 1 else DEFAULT_PORT
    # The launchers of several hosts meet at the port after it.
    ports = [master_port] if nodes == 1 else [master_port, master_port + 1]
    if not 1 <= master_port <= ports[-1] <= 65535:
        raise ConfigurationError(f"master_port={master_port}: give a number from 1 to 65535.")
    taken = [port for port in ports if node_rank == 0 and not network.is_free(port)]
    if taken:
        raise ConfigurationError(
            f"master_port={master_port}: another process of this host has port {taken[0]}; choose "
            "another."
        )
    return Nodes(ranks, nodes, node_rank, master_addr, master_port)


def _again(outcome: Outcome, life: int, where: Nodes) -> bool:
    """Tell of a fault; True where all ranks are to be started again."""
    fault = outcome.fault
    if fault is None:
        return False
    if outcome.words:
        say(outcome.words.rstrip("\n"))
    who = f"rank {fault.rank} of {where.ranks * where.nodes}, on host {outcome.host},"
    said = f"ofengine: after {duration(outcome.seconds)} {who} {fault.what}."
    if fault.kind != "crash" or not outcome.restarts:
        say(f"{said} All ranks here have been ended.")
        return False
    left = outcome.restarts - life
    if left < 0:
        say(f"{said} No restart is left of {outcome.restarts}. Giving up.")
        return False
    say(f"{said} All ranks start again from the last checkpoint; restarts left after that: {left}.")
    return True


@contextlib.contextmanager
def _orphans_come_here() -> Iterator[None]:
    """Whom the ranks leave behind becomes a child of this process, which can then end it."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
