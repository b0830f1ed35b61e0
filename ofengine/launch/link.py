"""What the launchers of several hosts tell each other: begin, stop, and whose fault the end is.

OneFlow notices within some seconds that a rank on another host is gone, where it notices at all;
over this link it is a matter of milliseconds, and all hosts name the same rank. The launcher of
node 0 listens at the port after ``master_port``, and passes on what one tells to all others. What
is told is data: nothing of it is executed.
"""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any, Dict, List, NamedTuple

Message = Dict[str, Any]

_LONGEST = 1_000_000
_SECONDS = 2.0
_OWN = {"came", "lost"}
"""What only this launcher itself can tell."""


class Nodes(NamedTuple):
    """How many ranks there are, and where."""

    ranks: int
    """On this host."""
    nodes: int
    node_rank: int
    master_addr: str
    master_port: int


class _Peer:
    """Another launcher."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.is_done = False
        self._unread = b""
        connection.setblocking(False)
        # A host that is gone says nothing: after a minute without an answer it counts as gone.
        for level, option, value in (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        ):
            connection.setsockopt(level, option, value)

    def send(self, message: Message) -> None:
        """Tell it ``message``, where it is there."""
        with contextlib.suppress(OSError):
            self.socket.settimeout(_SECONDS)
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        self.socket.setblocking(False)

    def receive(self) -> List[Message]:
        """What it has told since.

        Raises:
            ConnectionError: it is gone, or talks nonsense.
        """
        try:
            part = self.socket.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as error:
            raise ConnectionError from error
        *lines, self._unread = (self._unread + part).split(b"\n")
        if not part or len(self._unread) > _LONGEST:
            raise ConnectionError
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError as error:
            raise ConnectionError from error
        if not all(isinstance(each, dict) for each in messages):
            raise ConnectionError
        return [each for each in messages if not _OWN & each.keys()]


class Link:
    """The launcher's connections to those of other hosts.

    Args:
        where: which node this is; node 0 listens.
    """

    def __init__(self, where: Nodes) -> None:
        self._where = where
        self._peers: Dict[int, _Peer] = {}
        self._strangers: List[_Peer] = []
        """Those that have not said yet which node they are."""
        self._told: List[Message] = []
        self._server = None
        if where.node_rank == 0:
            self._server = socket.socket()
            self._server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._server.bind(("", where.master_port + 1))
            self._server.listen()
            self._server.setblocking(False)

    def files(self) -> List[int]:
        """What becomes readable when there is something to be done."""
        peers = [*self._peers.values(), *self._strangers]
        files = [each.socket.fileno() for each in peers if not each.is_done]
        return files if self._server is None else [self._server.fileno(), *files]

    def tell(self, message: Message) -> None:
        """Tell all other launchers."""
        for peer in self._peers.values():
            peer.send(message)

    def take(self, life: int) -> List[Message]:
        """What others have told since, in the ``life``-th life of the ranks."""
        self._connect()
        for stranger in self._strangers[:]:
            self._welcome(stranger, life)
        for node, peer in list(self._peers.items()):
            try:
                messages = [] if peer.is_done else peer.receive()
            except ConnectionError:
                peer.is_done = True
                what = "is lost: its launcher, its host or the network is gone"
                messages = [{"life": life, "lost": node, "what": what}]
            for message in messages:
                peer.is_done |= bool(message.get("done"))
                for other, each in self._peers.items():
                    if other != node and not message.get("done"):
                        each.send(message)
            self._told.extend(messages)
        now = [each for each in self._told if each.get("life") == life]
        self._told = [each for each in self._told if _number(each.get("life")) > life]
        return now

    def close(self) -> None:
        """Tell the others that this node is at its end, and let go of them."""
        self.tell({"done": True})
        for peer in [*self._peers.values(), *self._strangers]:
            peer.socket.close()
        if self._server is not None:
            self._server.close()

    def _connect(self) -> None:
        if self._server is not None:
            with contextlib.suppress(OSError):
                self._strangers.append(_Peer(self._server.accept()[0]))
        elif not self._peers:
            at = self._where.master_addr, self._where.master_port + 1
            with contextlib.suppress(OSError):
                self._peers[0] = _Peer(socket.create_connection(at, timeout=0.5))
                self._peers[0].send({"node": self._where.node_rank})

    def _welcome(self, stranger: _Peer, life: int) -> None:
        """Take one that says which node it is for what it says."""
        try:
            messages = stranger.receive()
        except ConnectionError:
            self._strangers.remove(stranger)
            stranger.socket.close()
            return
        if not messages:
            return
        self._strangers.remove(stranger)
        node = _number(messages[0].get("node"))
        if 0 < node < self._where.nodes and node not in self._peers:
            self._peers[node] = stranger
            self._told.extend([{"life": life, "came": node}, *messages[1:]])
        else:
            stranger.socket.close()


def _number(value: Any) -> int:
    return value if isinstance(value, int) else -1
