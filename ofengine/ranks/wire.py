"""Short messages between the ranks, from host to host: they wait for no device.

OneFlow's collectives take their turn behind what a device still has to compute. What ranks tell
each other is known to Python long before: over connections of its own it arrives within some tens
of microseconds, while the devices go on.

All ranks exchange at once. In round k each sends what it has of the ranks from itself on to the
rank 2**k before it, so that all have everything after log2(ranks) rounds, as Bruck's all-gather
does.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import struct
import time
from typing import Callable, Dict, List, Optional, Tuple

import numpy as np

from ofengine.errors import RankError
from ofengine.launch import heartbeat
from ofengine.launch.environment import World

_LENGTH = struct.Struct("!Q")
_HELLO = struct.Struct("!16sII")
"""The secret of all ranks, whose end this is, of which round."""
_ADDRESS = struct.Struct("!4sI16s")
_SECONDS = 120.0
"""For the others to connect: what they do before is over when all have told their addresses."""
_AT_ONCE = 1 << 20

Gather = Callable[[np.ndarray], np.ndarray]


class Wire:
    """This rank's connections.

    Args:
        world: which rank it is, of how many.
        gather: a slow way of exchanging arrays of bytes, by which ranks learn of each other: each
            rank's own, one row for each.

    Raises:
        RankError: another rank cannot be reached.
    """

    def __init__(self, world: World, gather: Gather) -> None:
        self._rank, self._size = world.rank, world.world_size
        listener = socket.create_server((_own_address(world), 0), backlog=max(self._size, 128))
        with listener:
            host, port = listener.getsockname()
            own = _ADDRESS.pack(socket.inet_aton(host), port, secrets.token_bytes(16))
            rows = [each.tobytes() for each in gather(np.frombuffer(own, np.uint8))]
            secret = _ADDRESS.unpack(rows[0])[2]
            self._hops: List[Tuple[socket.socket, socket.socket]] = []
            """Of each round, to whom this rank sends and from whom it receives."""
            distances = [1 << k for k in range((self._size - 1).bit_length())]
            to = []
            for number, distance in enumerate(distances):
                address = rows[(self._rank - distance) % self._size]
                to.append(_connect(address, _HELLO.pack(secret, self._rank, number)))
            expected = {
                _HELLO.pack(secret, (self._rank + distance) % self._size, number): number
                for number, distance in enumerate(distances)
            }
            came = _accept(listener, expected)
        self._hops = [(each, came[number]) for number, each in enumerate(to)]

    def exchange(self, own: bytes, meanwhile: Optional[Callable[[], None]] = None) -> List[bytes]:
        """What each rank gives, in the order of ranks; all call it.

        ``meanwhile`` is called while others are on their way.

        Raises:
            RankError: another rank is gone.
        """
        size, rank = self._size, self._rank
        if not self._hops and size > 1:
            raise RankError("the ranks of this run have lost each other: start them again.")
        of_those_after = [own]
        try:
            with heartbeat.exchange:
                for to, come_from in self._hops:
                    given = of_those_after[: size - len(of_those_after)]
                    of_those_after += _unpacked(_swap(to, _packed(given), come_from, meanwhile))
                    meanwhile = None
            if meanwhile is not None:
                meanwhile()
        except OSError:
            self._break()
            if heartbeat.connected:
                _wait_for_the_end()
            raise RankError("another rank of this run is gone.") from None
        except BaseException:  # a signal's: what comes next could not be told from the rest of this
            self._break()
            raise
        return [of_those_after[(other - rank) % size] for other in range(size)]

    def _break(self) -> None:
        for pair in self._hops:
            for each in pair:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)  # worker processes may have copies open
                each.close()
        self._hops = []


_wires: Dict[Tuple[int, World], Wire] = {}


def wire_of(world: World, gather: Gather) -> Wire:
    """The connections of this process, made when all ranks first ask for them."""
    key = os.getpid(), world
    if key not in _wires:
        _wires[key] = Wire(world, gather)
    return _wires[key]


def _own_address(world: World) -> str:
    """Where the others reach this host; that of no network where all ranks are on it."""
    if world.nodes == 1:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        return str(probe.getsockname()[0])


def _connect(address: bytes, hello: bytes) -> socket.socket:
    host, port, _ = _ADDRESS.unpack(address)
    at = socket.inet_ntoa(host), port
    try:
        connection = socket.create_connection(at, timeout=_SECONDS)
    except OSError as error:
        raise RankError(
            f"this rank cannot reach another at {at[0]}:{at[1]} ({error}): ranks of several hosts "
            "connect to any port of each other, and MASTER_ADDR has to be an address that all "
            "hosts reach, not localhost."
        ) from None
    _prepare(connection)
    connection.sendall(hello)
    return connection


def _accept(listener: socket.socket, expected: Dict[bytes, int]) -> Dict[int, socket.socket]:
    """The connections that bring what is ``expected``, by its number; strangers are turned away."""
    came: Dict[int, socket.socket] = {}
    until = time.monotonic() + _SECONDS
    while len(came) < len(expected):
        listener.settimeout(max(until - time.monotonic(), 0.001))
        try:
            connection = listener.accept()[0]
        except OSError:
            raise RankError(
                f"other ranks did not connect to this one within {_SECONDS:g} seconds: ranks of "
                "several hosts connect to any port of each other."
            ) from None
        connection.settimeout(5.0)
        hello = b""
        with contextlib.suppress(OSError):
            hello = _receive(connection, _HELLO.size)
        number = expected.get(hello)
        if number is None or number in came:
            connection.close()
            continue
        _prepare(connection)
        came[number] = connection
    return came


def _prepare(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _packed(messages: List[bytes]) -> bytes:
    parts = []
    for each in messages:
        parts += [_LENGTH.pack(len(each)), each]
    return b"".join(parts)


def _unpacked(data: bytes) -> List[bytes]:
    messages, at = [], 0
    while at < len(data):
        start = at + _LENGTH.size
        at = start + _LENGTH.unpack_from(data, at)[0]
        messages.append(data[start:at])
    return messages


def _swap(
    to: socket.socket,
    own: bytes,
    come_from: socket.socket,
    meanwhile: Optional[Callable[[], None]],
) -> bytes:
    """Send ``own``, and receive what the other has sent: both at once, for it does the same."""
    unsent = memoryview(_LENGTH.pack(len(own)) + own)
    received, needed = bytearray(), _LENGTH.size
    while unsent or len(received) < needed:
        if unsent:
            with contextlib.suppress(BlockingIOError):
                unsent = unsent[to.send(unsent, socket.MSG_DONTWAIT) :]
        if meanwhile is not None:
            meanwhile()
            meanwhile = None
        if len(received) < needed:
            flags = socket.MSG_DONTWAIT if unsent else 0
            with contextlib.suppress(BlockingIOError):
                received += _part(come_from, needed - len(received), flags)
            if len(received) == needed == _LENGTH.size:
                needed += _LENGTH.unpack(received)[0]
        if unsent:
            ready = select.poll()
            ready.register(to, select.POLLOUT)
            if len(received) < needed:
                ready.register(come_from, select.POLLIN)
            ready.poll()
    return bytes(received[_LENGTH.size :])


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        received += _part(connection, size - len(received))
    return received


def _part(connection: socket.socket, most: int, flags: int = 0) -> bytes:
    part = connection.recv(min(most, _AT_ONCE), flags)
    if not part:
        raise ConnectionResetError
    return part


def _wait_for_the_end() -> None:
    """The launcher knows who was first to be gone, tells of it, and ends this rank."""
    with heartbeat.exchange:
        while True:
            time.sleep(1.0)
