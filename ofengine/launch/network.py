"""Ports and addresses of this host, as ``/proc/net`` has them."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from pathlib import Path
from typing import List

_LISTENING = "0A"


def free_port() -> int:
    """A port of this host that nobody uses."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether ``port`` could be listened at."""
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def is_listening(port: int) -> bool:
    """Whether a process of this host listens at ``port``. Nobody is connected to for that."""
    for name in ("tcp", "tcp6"):
        for line in _lines(f"/proc/net/{name}")[1:]:
            fields = line.split()
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                return True
    return False


def public_addresses() -> List[str]:
    """The addresses of this host that are reached from the internet."""
    version_4, at = set(), ""
    for line in _lines("/proc/net/fib_trie"):
        found = re.search(r"\|-- (\S+)", line)
        at = found.group(1) if found else at
        if "/32 host LOCAL" in line:
            version_4.add(at)
    version_6 = {line.split()[0] for line in _lines("/proc/net/if_inet6")}
    both = [
        *map(ipaddress.ip_address, sorted(version_4)),
        *(ipaddress.ip_address(bytes.fromhex(each)) for each in sorted(version_6)),
    ]
    return [str(each) for each in both if each.is_global]


def _lines(path: str) -> List[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return []
