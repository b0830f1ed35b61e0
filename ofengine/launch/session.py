"""One life of all ranks of this host, from the first that starts to the last that ends.

The launcher waits for signals, for ranks that end, for what they write and for other hosts, and
looks ten times a second at what the ranks tell in their slots (:mod:`.slot`). Who is at fault is
decided by :mod:`.verdict`.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import Dict, List, NamedTuple, Optional, Sequence, Set

from ofengine.launch import environment, network, slot, verdict
from ofengine.launch.link import Link, Message, Nodes
from ofengine.launch.process import RankProcess, kill_all_but
from ofengine.launch.signals import Signals
from ofengine.processes import supervisor
from ofengine.processes.supervisor import duration

_TICK = 0.1
_HEAD_START = 10.0
"""Seconds that rank 0 is given to reach OneFlow's rendezvous before the others are started. One
that is there before it costs about as much."""
_MEETING = 120.0
"""Seconds that OneFlow's rendezvous may take, or the limit for a hang where that is more."""
_SAME_SIGNAL = 0.5
"""Seconds in which a signal that comes again is the same one, sent to the group as well."""
_LEAVES_THE_MEETING = 2.0
"""Seconds after a signal in which a rank may leave the rendezvous, where no Python runs."""
_ELSEWHERE = 0.5
"""Seconds in which another host may tell that a rank there was the first."""
_PATIENCE, _PATIENCE_WHEN_STOPPING = 0.5, 30.0
"""Seconds after which a rank that has ended, and should not have, is at fault."""
_FAILING_TOGETHER = 0.3
"""Seconds in which other ranks may begin to fail of the same exception ..."""
_LAST_HOOKS = 10.0
"""... and seconds that they have then for their hooks, and after a signal for their exit."""


class Around(NamedTuple):
    """What outlives the ranks."""

    signals: Signals
    link: Optional[Link]
    """To the launchers of other hosts, where there are any."""
    strangers: Sequence[int]
    """Children of this process that were there before."""


class Outcome(NamedTuple):
    """How it ended."""

    code: int
    """The exit code of it all."""
    fault: Optional[verdict.Fault] = None
    host: str = ""
    """Where the rank at fault was."""
    words: str = ""
    """The error that it has told, or its stack, or what it wrote last."""
    restarts: int = 0
    """How many restarts the ranks have asked for."""
    seconds: float = 0.0


class _Away(NamedTuple):
    """A rank of another host that is at its end."""

    since: float
    seen: verdict.Seen
    host: str
    words: str

    def now(self) -> verdict.Seen:
        """What is seen of it."""
        return self.seen._replace(gone=time.monotonic() - self.since)


class Session:
    """The ranks of this host, started once.

    Args:
        command: the program and its arguments.
        where: how many ranks there are, and where.
        around: what outlives them.
        life: how often ranks have been started, this time included.
        tag: what tells a rank which try it is, and of which supervisor.
        limit: seconds after which a rank hangs.
        show_all: show what ranks other than 0 write.
    """

    def __init__(
        self,
        command: Sequence[str],
        where: Nodes,
        around: Around,
        life: int,
        tag: str,
        limit: float,
        show_all: bool,
    ) -> None:
        self._command, self._where, self._around = command, where, around
        self._life, self._limit, self._show_all = life, limit, show_all
        self._environment = {**os.environ, **_threads(where.ranks), supervisor.VARIABLE: tag}
        self._prepare = supervisor.child_preparation(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        self._ranks: List[RankProcess] = []
        self._seen: List[verdict.Seen] = []
        self._begun = self._looked = time.monotonic()
        self._stopped_by: Optional[int] = None
        self._stopping = 0.0
        self._kill = False
        self._may_start = False
        """Rank 0 is where OneFlow's ranks meet."""
        self._meeting = 0.0
        """Seconds for which it has been there; -1 once all have met."""
        self._elsewhere: Optional[Outcome] = None
        """What the launcher of another host has told of the end."""
        self._away: Dict[int, _Away] = {}
        """Ranks of other hosts that are at their end."""
        self._told_of: Set[int] = set()
        """Ranks of this host that others have been told are."""

    def run(self) -> Outcome:
        """Start the ranks, and wait for their end."""
        found: Optional[Outcome] = None
        try:
            if self._where.node_rank == 0:
                self._start(0)
            fault = None
            while fault is None and self._elsewhere is None and not self._is_over():
                fault = self._turn()
            if fault is not None:
                found = self._account_of(fault)
            found = self._elsewhere or found
        finally:
            restarts = max((each.slot[slot.RESTARTS] for each in self._ranks), default=0)
            self._end_all(found is not None or self._kill)
            for each in self._ranks:
                each.finish()
        if found is not None:
            restarts = 0 if self._stopped_by is not None else restarts
            return found._replace(restarts=restarts, seconds=time.monotonic() - self._begun)
        code = max((abs(each.code or 0) for each in self._ranks), default=1)
        if self._stopped_by is not None and (code or not self._ranks or self._kill):
            return Outcome(128 + self._stopped_by)
        return Outcome(code)

    # ------------------------------------------------------------------ one turn

    def _turn(self) -> Optional[verdict.Fault]:
        link = self._around.link
        files = [each.output for each in self._ranks if each.output is not None]
        self._around.signals.wait(_TICK, [*files, *(link.files() if link else [])])
        self._heed_others()
        self._look()
        self._heed_signals()
        if self._kill:
            return None
        self._start_others()
        stopping = self._stopped_by is not None
        return (
            verdict.death(self._seen, stopping)
            or verdict.early(
                [*self._seen, *(each.now() for each in self._away.values())],
                _PATIENCE_WHEN_STOPPING if stopping else _PATIENCE,
            )
            or verdict.hang(self._seen, self._limit)
            or self._missed()
        )

    def _look(self) -> None:
        """See what the ranks do, and count the seconds since the last look."""
        # Not more than a few turns': the host, or this process, may have been asleep.
        now = time.monotonic()
        seconds, self._looked = min(now - self._looked, 10 * _TICK), now
        for each in self._ranks:
            each.read()
        self._seen = [each.look(seconds) for each in self._ranks]
        for seen, rank in zip(self._seen, self._ranks):
            if seen.is_gone and seen.rank not in self._told_of:
                self._told_of.add(seen.rank)
                numbers = [seen.rank, seen.begun, seen.ended, seen.leaving, seen.exit]
                self._tell(gone=numbers, host=socket.gethostname(), words=rank.last_words())
        if self._stopped_by is not None:
            self._stopping += seconds
        if self._where.node_rank == 0 and self._meeting >= 0:
            if network.is_listening(self._where.master_port):
                self._meeting += seconds
            elif self._meeting > 0:
                self._meeting = -1.0
        elif self._where.node_rank > 0:
            self._meeting = -1.0 if self._may_start else self._meeting + seconds

    def _is_over(self) -> bool:
        started = len(self._ranks) == self._where.ranks or self._stopped_by is not None
        return self._kill or (started and all(each.code is not None for each in self._ranks))

    def _missed(self) -> Optional[verdict.Fault]:
        """Not all ranks have come to OneFlow's rendezvous."""
        limit = max(self._limit, _MEETING)
        if self._meeting <= limit:
            return None
        at = f"{self._where.master_addr}:{self._where.master_port}"
        what = f"waited {duration(limit)} for others to come to {at}"
        return verdict.Fault(self._where.node_rank * self._where.ranks, what, 1, "hang")

    # ------------------------------------------------------------------ the start

    def _start(self, local_rank: int) -> None:
        where = self._where
        world = environment.place(local_rank, where.ranks, where.nodes, where.node_rank)
        variables = environment.variables(world, where.master_addr, where.master_port)
        variables = {**self._environment, **variables}
        self._ranks.append(
            RankProcess(self._command, variables, world, self._prepare, self._show_all)
        )

    def _start_others(self) -> None:
        """Start those that are not, once rank 0 is where OneFlow's ranks meet."""
        if self._where.node_rank == 0 and not self._may_start:
            late = time.monotonic() - self._begun > _HEAD_START
            self._may_start = self._meeting != 0 or late
            if self._may_start:
                self._tell(start=True)
        if self._may_start and self._stopped_by is None:
            for local_rank in range(len(self._ranks), self._where.ranks):
                self._start(local_rank)

    # ------------------------------------------------------------------ other hosts

    def _tell(self, **message: object) -> None:
        if self._around.link is not None:
            self._around.link.tell({"life": self._life, **message})

    def _heed_others(self) -> None:
        for message in self._around.link.take(self._life) if self._around.link else []:
            if "came" in message and self._may_start:
                self._tell(start=True)
            self._may_start |= "start" in message
            stop = message.get("stop")
            if stop in supervisor.STOPS and self._stopped_by is None:
                self._stopped_by = int(stop)
                self._send(self._stopped_by)
            self._kill |= "kill" in message and self._stopped_by is not None
            away = _told_of_an_end(message)
            if away is not None:
                self._away[away.seen.rank] = away
            self._elsewhere = self._elsewhere or _told(message, self._where)

    def _account_of(self, fault: verdict.Fault) -> Outcome:
        """What is to be said of ``fault``, and to other hosts, once its rank has said all."""
        self._let_go(fault)
        elsewhere = "another host" in fault.what or fault.code == 128 + signal.SIGABRT
        until = time.monotonic() + _ELSEWHERE
        while self._around.link and elsewhere and self._elsewhere is None:
            if time.monotonic() > until:
                break
            self._around.signals.wait(_TICK, self._around.link.files())
            self._heed_others()
        if self._elsewhere is not None:
            return self._elsewhere
        away = self._away.get(fault.rank)
        words = "".join(each.last_words() for each in self._ranks if each.rank == fault.rank)
        if fault.kind == "crash":
            at = "".join(each.place() for each in self._ranks if each.rank == fault.rank)
            fault = fault._replace(what=fault.what + at)
        host, words = (socket.gethostname(), words) if away is None else (away.host, away.words)
        self._tell(fault=list(fault), host=host, words=words)
        return Outcome(fault.code, fault, host, words)

    # ------------------------------------------------------------------ signals

    def _heed_signals(self) -> None:
        received = self._around.signals.received
        while received:
            number = received.pop(0)
            if number == signal.SIGTSTP:
                self._pause()
            elif number not in supervisor.STOPS:
                self._send(number)
            elif self._stopped_by is None:
                self._stopped_by = number
                self._send(number)
                self._tell(stop=number)
            elif self._stopping > _SAME_SIGNAL:
                self._kill = True
                self._tell(kill=True)
        if self._stopped_by is not None:
            # They are at their end, or were still coming to it: nothing is left to be saved.
            gone = min((each.gone for each in self._seen if each.is_gone), default=0.0)
            at_end = all(each.is_gone for each in self._seen) and gone > _LAST_HOOKS
            met = self._meeting < 0 or self._where.ranks * self._where.nodes == 1
            self._kill |= at_end or (not met and self._stopping > _LEAVES_THE_MEETING)

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
        while fault.kind == "exception" and not self._around.signals.received:
            passed = time.monotonic() - begun
            together = all(each.leaving or each.is_gone for each in self._seen)
            done = all(each.is_gone for each in self._seen)
            if done or passed > (_LAST_HOOKS if together else _FAILING_TOGETHER):
                return
            self._around.signals.wait(_TICK / 4, [])
            self._look()

    def _end_all(self, by_force: bool) -> None:
        """No rank is left, and nothing that they have started where they are ended by force."""
        by_force = by_force or any(each.look(0).code is None for each in self._ranks)
        if by_force:
            for each in self._ranks:
                each.send_to_all_of_it(signal.SIGKILL)
            known = [*self._around.strangers, *(each.process.pid for each in self._ranks)]
            kill_all_but(known)


def _threads(ranks: int) -> Dict[str, str]:
    """Each rank has its share of the processors, unless the user says otherwise."""
    if "OMP_NUM_THREADS" in os.environ or ranks == 1:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks))}


def _told(message: Message, where: Nodes) -> Optional[Outcome]:
    """What another host tells of the end, where it does, and where it is what it should be."""
    if "lost" in message:
        rank = message["lost"] * where.ranks
        fault = verdict.Fault(rank, message["what"], 1, "lost")
        return Outcome(1, fault, f"number {message['lost']}")
    fields, host, words = (message.get(each) for each in ("fault", "host", "words"))
    if not isinstance(fields, list) or [type(each) for each in fields] != [int, str, int, str]:
        return None
    if not isinstance(host, str) or not isinstance(words, str) or not 0 < fields[2] < 256:
        return None
    fault = verdict.Fault(fields[0], _plain(fields[1]), fields[2], fields[3])
    return Outcome(fault.code, fault, _plain(host), _plain(words))


def _told_of_an_end(message: Message) -> Optional[_Away]:
    """The rank of another host that ``message`` says is at its end, if it does."""
    numbers, host, words = (message.get(each) for each in ("gone", "host", "words"))
    if not isinstance(numbers, list) or [type(each) for each in numbers] != [int] * 5:
        return None
    if not isinstance(host, str) or not isinstance(words, str):
        return None
    rank, begun, ended, leaving, code = numbers
    seen = verdict.Seen(
        rank, connected=True, begun=begun, ended=ended, leaving=leaving, over=True,
        exit=min(max(code, 0), 255),
    )  # fmt: skip
    return _Away(time.monotonic(), seen, _plain(host), _plain(words))


def _plain(text: str) -> str:
    """``text`` without what would steer a terminal."""
    return "".join(each for each in text if each.isprintable() or each in "\n\t")
