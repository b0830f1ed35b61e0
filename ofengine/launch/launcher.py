"""Starts the ranks of one host, and sees to it that they all end where one does.

The launcher waits for signals, for ranks that end and for what they write, and looks ten times a
second at what they tell in their slots (:mod:`.slot`). Who is at fault is decided by
:mod:`.verdict`. Launchers on several hosts do not talk to each other: where the ranks of one are
gone, OneFlow aborts those of the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import socket
import threading
import time
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence

from ofengine.errors import ConfigurationError
from ofengine.launch import environment, network, slot, verdict
from ofengine.launch.process import RankProcess, descendants, kill_all_but, say
from ofengine.launch.signals import Signals
from ofengine.processes import supervisor
from ofengine.processes.supervisor import duration

DEFAULT_PORT = 29500
"""Where rank 0 is found by ranks on other hosts; OneFlow's launcher has the same."""
_TICK = 0.1
_HEAD_START = 10.0
"""Seconds that rank 0 is given to reach OneFlow's rendezvous before the others are started. One
that is there before it costs about as much."""
_MEETING = 120.0
"""Seconds that OneFlow's rendezvous may take, or the limit for a hang where that is more."""
_SAME_SIGNAL = 0.5
"""Seconds in which a signal that comes again is the same one, sent to the group as well."""
_PATIENCE, _PATIENCE_WHEN_STOPPING = 0.5, 30.0
"""Seconds after which a rank that has ended, and should not have, is at fault."""
_FAILING_TOGETHER = 0.3
"""Seconds in which other ranks may begin to fail of the same exception ..."""
_LAST_HOOKS = 10.0
"""... and seconds that they have then for their hooks, and after a signal for their exit."""
_PR_SET_CHILD_SUBREAPER = 36


class Nodes(NamedTuple):
    """How many ranks there are, and where."""

    ranks: int
    """On this host."""
    nodes: int
    node_rank: int
    master_addr: str
    master_port: int


class _Outcome(NamedTuple):
    code: int
    fault: Optional[verdict.Fault] = None
    restarts: int = 0
    """How many restarts the ranks have asked for."""
    seconds: float = 0.0


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
    before, started = descendants(), time.time()
    with Signals() as signals, _orphans_come_here():
        number = 0
        while True:
            number += 1
            tag = f"{number}:{os.getpid()}:{started}"
            session = _Session(
                command, where, tag, signals, hang_timeout or math.inf, show_all, before
            )
            outcome = session.run()
            if not _again(outcome, number, where):
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
    elif not 1 <= master_port <= 65535:
        raise ConfigurationError(f"master_port={master_port}: give a number from 1 to 65535.")
    if node_rank == 0 and not network.is_free(master_port):
        raise ConfigurationError(
            f"master_port={master_port}: another process of this host has it; choose another."
        )
    return Nodes(ranks, nodes, node_rank, master_addr, master_port)


def _again(outcome: _Outcome, number: int, where: Nodes) -> bool:
    """Tell of a fault; True where all ranks are to be started again."""
    fault = outcome.fault
    if fault is None:
        return False
    who = f"rank {fault.rank} of {where.ranks * where.nodes}, on host {socket.gethostname()},"
    said = f"ofengine: after {duration(outcome.seconds)} {who} {fault.what}."
    if fault.kind != "crash" or not outcome.restarts:
        say(f"{said} All ranks here have been ended.")
        return False
    left = outcome.restarts - number
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


class _Session:
    """One life of all ranks of this host, from the first that starts to the last that ends."""

    def __init__(
        self,
        command: Sequence[str],
        where: Nodes,
        tag: str,
        signals: Signals,
        limit: float,
        show_all: bool,
        strangers: Sequence[int],
    ) -> None:
        self._command, self._where = command, where
        self._signals, self._limit = signals, limit
        self._show_all, self._strangers = show_all, strangers
        self._environment = {**os.environ, **_threads(where.ranks), supervisor.VARIABLE: tag}
        self._prepare = supervisor.child_preparation(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        self._ranks: List[RankProcess] = []
        self._seen: List[verdict.Seen] = []
        self._begun = self._looked = time.monotonic()
        self._stopped_by: Optional[int] = None
        self._stopping = 0.0
        self._kill = False
        self._met = 0.0
        """Seconds for which rank 0 has been waiting at the rendezvous; -1 once that is over."""

    def run(self) -> _Outcome:
        """Start the ranks, and wait for their end."""
        fault = None
        try:
            if self._where.node_rank == 0:
                self._start(0)
            while fault is None and not self._is_over():
                fault = self._turn()
            if fault is not None:
                self._let_go(fault)
        finally:
            restarts = max((each.slot[slot.RESTARTS] for each in self._ranks), default=0)
            self._end_all(fault is not None or self._kill)
            words = [each.last_words() for each in self._ranks if fault and each.rank == fault.rank]
            for each in self._ranks:
                each.finish()
        seconds = time.monotonic() - self._begun
        if fault is not None:
            if "".join(words):
                say("".join(words).rstrip("\n"))
            restarts = 0 if self._stopped_by is not None else restarts
            return _Outcome(fault.code, fault, restarts, seconds)
        code = max((abs(each.code or 0) for each in self._ranks), default=1)
        if self._stopped_by is not None and (code or not self._ranks or self._kill):
            return _Outcome(128 + self._stopped_by)
        return _Outcome(code)

    # ------------------------------------------------------------------ one turn

    def _turn(self) -> Optional[verdict.Fault]:
        files = [each.output for each in self._ranks if each.output is not None]
        self._signals.wait(_TICK, files)
        for each in self._ranks:
            each.read()
        # Not more than passed here: the host, or this process, may have been asleep.
        now = time.monotonic()
        seconds, self._looked = min(now - self._looked, 10 * _TICK), now
        self._seen = [each.look(seconds) for each in self._ranks]
        self._heed_signals(seconds)
        if self._kill:
            return None
        self._start_others(seconds)
        stopping = self._stopped_by is not None
        return (
            verdict.death(self._seen, stopping)
            or verdict.early(self._seen, _PATIENCE_WHEN_STOPPING if stopping else _PATIENCE)
            or verdict.hang(self._seen, self._limit)
            or self._missed()
        )

    def _is_over(self) -> bool:
        started = len(self._ranks) == self._where.ranks or self._stopped_by is not None
        return self._kill or (started and all(each.code is not None for each in self._ranks))

    def _missed(self) -> Optional[verdict.Fault]:
        """Not all ranks have come to OneFlow's rendezvous."""
        limit = max(self._limit, _MEETING)
        if self._met <= limit:
            return None
        at = f"{self._where.master_addr}:{self._where.master_port}"
        what = f"waited {duration(limit)} at {at} for ranks that did not come"
        return verdict.Fault(self._where.node_rank * self._where.ranks, what, 1, "hang")

    # ------------------------------------------------------------------ the start

    def _start(self, local_rank: int) -> None:
        where = self._where
        world = environment.place(local_rank, where.ranks, where.nodes, where.node_rank)
        variables = environment.variables(world, where.master_addr, where.master_port)
        self._ranks.append(
            RankProcess(
                self._command,
                {**self._environment, **variables},
                world,
                self._prepare,
                self._show_all,
            )
        )

    def _start_others(self, seconds: float) -> None:
        """Start those that are not, once rank 0 is where OneFlow's ranks meet."""
        where = self._where
        if where.node_rank == 0:
            listens = self._met >= 0 and network.is_listening(where.master_port)
            if listens:
                self._met += seconds
            elif self._met > 0:
                self._met = -1.0
            due = listens or self._met < 0 or time.monotonic() - self._begun > _HEAD_START
        else:
            due = bool(self._ranks) or network.answers(where.master_addr, where.master_port)
            self._met = -1.0 if due else self._met + seconds
        if due and self._stopped_by is None:
            for local_rank in range(len(self._ranks), where.ranks):
                self._start(local_rank)

    # ------------------------------------------------------------------ signals

    def _heed_signals(self, seconds: float) -> None:
        for number in self._signals.received[:]:
            self._signals.received.remove(number)
            if number == signal.SIGTSTP:
                self._pause()
            elif number not in supervisor.STOPS:
                self._send(number)
            elif self._stopped_by is None:
                self._stopped_by = number
                self._send(number)
            elif self._stopping > _SAME_SIGNAL:
                self._kill = True
        if self._stopped_by is not None:
            self._stopping += seconds
            # They are at their end, or were still coming to it: nothing is left to be saved.
            at_end = all(each.is_gone for each in self._seen) and min(
                (each.gone for each in self._seen), default=math.inf
            )
            meeting = self._met >= 0 and self._where.ranks > 1
            self._kill |= bool(at_end and at_end > _LAST_HOOKS) or (
                meeting and self._stopping > 2.0
            )

    def _send(self, number: int) -> None:
        for each in self._ranks:
            each.send(number)

    def _pause(self) -> None:
        """Ctrl-Z: stop the ranks, then this process, until somebody has it go on."""
        for each in self._ranks:
            each.send_to_all_of_it(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        for each in self._ranks:
            each.send_to_all_of_it(signal.SIGCONT)

    # ------------------------------------------------------------------ the end

    def _let_go(self, fault: verdict.Fault) -> None:
        """Let ranks that fail of the same finish their hooks; have one that hangs show where."""
        if fault.kind == "hang":
            for each in self._ranks:
                if each.rank == fault.rank:
                    each.dump()
            time.sleep(0.3)
            return
        begun = time.monotonic()
        while fault.kind == "exception" and not self._signals.received:
            passed = time.monotonic() - begun
            together = all(each.leaving or each.is_gone for each in self._seen)
            done = all(each.is_gone for each in self._seen)
            if done or passed > (_LAST_HOOKS if together else _FAILING_TOGETHER):
                return
            self._signals.wait(_TICK / 4, [])
            for each in self._ranks:
                each.read()
            self._seen = [each.look(_TICK / 4) for each in self._ranks]

    def _end_all(self, by_force: bool) -> None:
        """No rank is left, and nothing that they have started where they are ended by force."""
        by_force = by_force or any(each.look(0).code is None for each in self._ranks)
        if by_force:
            for each in self._ranks:
                each.send_to_all_of_it(signal.SIGKILL)
            known = [*self._strangers, *(each.process.pid for each in self._ranks)]
            kill_all_but(known)


def _threads(ranks: int) -> Dict[str, str]:
    """Each rank has its share of the processors, unless the user says otherwise."""
    if "OMP_NUM_THREADS" in os.environ or ranks == 1:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks))}
