"""Ranks on several hosts, which are launchers of one host here: all end where one does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import List, Tuple

import pytest
from launching import end_all, is_alive, pids, program, start, wait_for, wait_for_files

from ofengine.launch import network
from ofengine.launch.link import Link, Nodes

WAITING = """
counts = {}

def receive(number, frame):
    counts[number] = counts.get(number, 0) + 1

signal.signal(signal.SIGTERM, receive)
write("ready")
first_there = world.local_world_size
with heartbeat.verb:
    if rank == first_there and sys.argv[1] == "raise":
        raise ValueError("on the other host")
    if rank == first_there and sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == first_there and sys.argv[1] == "exit":
        import atexit
        heartbeat.atexit.unregister(heartbeat._over)
        atexit.register(forever)  # as OneFlow's, which waits for the others
        atexit.register(heartbeat._over)
        sys.exit(3)
    while not counts:
        heartbeat.beat()
        time.sleep(0.02)
    time.sleep(0.5)
    write("got", counts[signal.SIGTERM])
    raise SystemExit(143)
"""


def both(
    folder: Path, *arguments: object, ranks: int = 2
) -> Tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """Launchers of two nodes with two ranks each."""
    port = next(p for p in iter(network.free_port, 0) if p < 65535 and network.is_free(p + 1))
    script = program(folder, WAITING)
    of_all = ["--nproc", ranks, "--nnodes", 2, "--master-port", port]
    second = start(folder, *of_all, "--node-rank", 1, script, *arguments)
    return start(folder, *of_all, script, *arguments), second


@pytest.mark.parametrize(
    ("how", "ranks", "code", "said"),
    [
        ("raise", 2, 1, "ended with the error above"),
        pytest.param("kill", 2, 137, "SIGKILL", marks=pytest.mark.slow),
        ("exit", 1, 3, "was at its end by sys.exit(3) while rank 0 was still at work"),
    ],
)
def test_both_hosts_end_and_name_the_same_rank(
    tmp_path: Path, how: str, ranks: int, code: int, said: str
) -> None:
    processes = both(tmp_path, how, ranks=ranks)
    for done in end_all(processes, tmp_path):
        assert done.returncode == code
        last = done.stderr.splitlines()[-1]
        assert f"rank {ranks} of {2 * ranks}, on host {os.uname().nodename}," in last
        assert said in last
        assert done.stderr.count("ValueError: on the other host") == (how == "raise")
        assert done.stderr.count("SystemExit: 3") == (how == "exit")


@pytest.mark.parametrize("to", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_launcher_stops_all_ranks_once(tmp_path: Path, to: int) -> None:
    processes = both(tmp_path, "wait")
    wait_for_files(tmp_path, [f"ready-{rank}" for rank in range(4)])
    processes[to].send_signal(signal.SIGTERM)
    done = [each.communicate(timeout=60) for each in processes]
    assert [each.returncode for each in processes] == [143, 143]
    assert done[0] == ("", "")
    assert done[1][1].splitlines() == [
        "ofengine: node 1 looks for rank 0 at 127.0.0.1, which is this host; master_addr is the "
        "address of node 0."
    ]
    assert [(tmp_path / f"got-{rank}").read_text() for rank in range(4)] == ["1"] * 4


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_where_a_launcher_is_lost_the_other_host_ends(tmp_path: Path, killed: int) -> None:
    processes = both(tmp_path, "wait")
    wait_for_files(tmp_path, [f"ready-{rank}" for rank in range(4)])
    processes[killed].kill()
    processes[killed].communicate()
    _, err = processes[1 - killed].communicate(timeout=60)
    assert processes[1 - killed].returncode == 1
    assert f"rank {2 * killed} of 4, on host number {killed}, is lost: its launcher" in err
    wait_for(lambda: not any(map(is_alive, pids(tmp_path))))


# ---------------------------------------------------------------------- the link


@pytest.fixture
def links() -> List[Link]:
    port = next(p for p in iter(network.free_port, 0) if p < 65535 and network.is_free(p + 1))
    return [Link(Nodes(1, 3, node, "127.0.0.1", port)) for node in range(3)]


def heard(link: Link, life: int = 1) -> List[object]:
    found: List[object] = []

    def some() -> bool:
        found.extend(each for each in link.take(life) if "came" not in each)
        return bool(found)

    wait_for(some)
    return found


def test_node_0_passes_on_what_one_tells(links: List[Link]) -> None:
    first, second, third = links
    wait_for(lambda: [each.take(1) for each in links] and len(first._peers) == 2)
    second.tell({"life": 1, "stop": 15})
    assert heard(first) == [{"life": 1, "stop": 15}]
    assert heard(third) == [{"life": 1, "stop": 15}]
    # What belongs to a later life of the ranks is kept until then.
    third.tell({"life": 2, "stop": 2})
    third.tell({"life": 1, "stop": 3})
    assert heard(first) == [{"life": 1, "stop": 3}]
    assert heard(first, life=2) == [{"life": 2, "stop": 2}]
    for each in links:
        each.close()


def test_strangers_can_say_what_they_like(links: List[Link]) -> None:
    first = links[0]
    at = "127.0.0.1", first._where.master_port + 1
    for nonsense in (b"", b"GET / HTTP/1.0\r\n\r\n", b"[1]\n", b'{"node": 7}\n', b'{"node": "1"}\n',
                     b'{"lost": 1}\n{"came": 1}\n', b"\xff\xfe\n"):  # fmt: skip
        with socket.create_connection(at) as stranger:
            stranger.sendall(nonsense)
            for _ in range(5):
                assert first.take(1) == []
    assert first._peers == {}
    for each in links:
        each.close()
