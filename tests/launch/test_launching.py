"""How ranks are started: what they are told, what is refused, how a script starts itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest
from launching import DEADLINE, PRELUDE, end, launch, program, start

from ofengine.errors import ConfigurationError
from ofengine.launch import network, session, start_ranks

TELL = """
write("told", repr((world, sys.argv[1:], os.environ["MASTER_PORT"], os.getsid(0) == os.getpid())))
print("hello from", rank)
"""


def told(folder: Path, rank: int) -> str:
    return (folder / f"told-{rank}").read_text()


def test_each_rank_is_told_which_it_is(tmp_path: Path) -> None:
    script = program(tmp_path, TELL)
    done = launch(tmp_path, "--nproc", 3, script, "--nproc", "7", "-m", "--", "ü")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello from 0\n", "")
    for rank in range(3):
        world = f"World(rank={rank}, world_size=3, local_rank={rank}, local_world_size=3, "
        assert told(tmp_path, rank).startswith(f"({world}node_rank=0, nodes=1), ['--nproc', '7', ")
        assert told(tmp_path, rank).endswith(", True)")
        assert "'-m', '--', 'ü'" in told(tmp_path, rank)


def test_a_module_can_be_launched(tmp_path: Path) -> None:
    program(tmp_path, TELL)
    done = launch(tmp_path, "--nproc", 2, "-m", "program", "x", cwd=tmp_path)
    assert done.stdout == "hello from 0\n", done.stderr
    assert "['x']" in told(tmp_path, 1)


def test_with_show_all_every_line_says_whose_it_is(tmp_path: Path) -> None:
    done = launch(tmp_path, "--nproc", 2, "--show-all", program(tmp_path, TELL))
    assert (done.stdout, done.stderr) == ("hello from 0\n", "[rank 1] hello from 1\n")


def test_the_second_node_may_come_first(tmp_path: Path) -> None:
    port = network.free_port()
    script = program(tmp_path, TELL)
    both = ["--nproc", 2, "--nnodes", 2, "--master-port", port]
    second = start(tmp_path, *both, "--node-rank", 1, "--master-addr", "127.0.0.1", script)
    first = start(tmp_path, *both, script)
    assert first.communicate(timeout=DEADLINE) == ("hello from 0\n", "")
    other = end(second, tmp_path)
    assert (first.returncode, other.returncode, other.stdout) == (0, 0, "")
    for rank in range(4):
        world = f"World(rank={rank}, world_size=4, local_rank={rank % 2}, local_world_size=2, "
        assert told(tmp_path, rank).startswith(f"({world}node_rank={rank // 2}, nodes=2)")


def test_ranks_share_the_processors(tmp_path: Path) -> None:
    script = program(tmp_path, "write('threads', os.environ['OMP_NUM_THREADS'])")
    launch(tmp_path, "--nproc", 2, script, env={"OMP_NUM_THREADS": "3"})
    assert (tmp_path / "threads-1").read_text() == "3"
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert session._threads(2) in ({"OMP_NUM_THREADS": str(share)}, {})


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ranks": 0}, r"ranks=0: give a number from 1 on\."),
        ({"nodes": 0}, r"nodes=0: give a number from 1 on\."),
        ({"nodes": 2, "node_rank": 2}, r"node_rank=2: with 2 nodes give a number from 0 to 1\."),
        ({"master_port": 70000}, r"master_port=70000: give a number from 1 to 65535\."),
        ({"hang_timeout": -1.0}, r"hang_timeout=-1.0: give seconds from 0 on\."),
    ],
)
def test_a_wrong_argument_is_told(arguments: dict, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        start_ranks(["true"], **{"ranks": 2, **arguments})


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"master_port={port}: another process"):
            start_ranks(["true"], 2, master_port=port)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    done = launch(tmp_path, "--nproc", 2, "nothing.py")
    assert done.returncode == 1
    assert done.stderr == "ofengine launch: there is no file nothing.py; with -m it is a module.\n"


# ---------------------------------------------------------------------- a script by itself

ITSELF = """
import os, sys
from ofengine.launch import environment, launch_self

world = environment.read()
if world is None:
    print("plain", os.getpid(), flush=True)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", WORLD_SIZE="1", RANK="-1",
                      LOCAL_RANK="0")  # as OneFlow does
    os.chdir("/")
    try:
        launch_self(2)
    finally:
        print("this is never run")
"""
REST = """
write("told", repr((sys.argv[1:], sys.flags.optimize, os.getcwd(), os.getppid())))
print("rank", rank, "of", world.world_size, flush=True)
sys.exit(3 if sys.argv[1:] == ["fail"] else 0)
"""


def plainly(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    environment.update(FOLDER=str(folder), PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("how", ["script", pytest.param("module", marks=pytest.mark.slow)])
def test_a_script_that_was_started_plainly_becomes_its_launcher(tmp_path: Path, how: str) -> None:
    script = program(tmp_path, REST, prelude=ITSELF + PRELUDE + "meet()\n")
    command = ["-m", "program"] if how == "module" else [script.name]
    done = plainly(tmp_path, "-O", *command, "--lr", "", "ü b")
    plain, *rest = done.stdout.splitlines()
    assert (done.returncode, rest, done.stderr) == (0, ["rank 0 of 2"], "")
    pid = plain.rpartition(" ")[2]
    for rank in (0, 1):
        assert told(tmp_path, rank) == repr((["--lr", "", "ü b"], 1, str(tmp_path), int(pid)))


def test_its_exit_code_is_that_of_the_first_rank_that_failed(tmp_path: Path) -> None:
    script = program(tmp_path, REST, prelude=ITSELF + PRELUDE + "meet()\n")
    assert plainly(tmp_path, script, "fail").returncode == 3


def test_a_command_that_cannot_be_run_again_is_refused() -> None:
    text = "from ofengine.launch import launch_self\nlaunch_self(2)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert "2 ranks cannot be started from here: a program from the command line" in done.stderr
    assert "start the ranks with `ofengine launch`" in done.stderr


# ---------------------------------------------------------------------- addresses

FIB_TRIE = """\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 127.0.0.0/8 2 0 2
           |-- 127.0.0.1
              /32 host LOCAL
     |-- {address}
        /32 host LOCAL
     |-- 8.8.8.255
        /32 link BROADCAST
"""


@pytest.mark.parametrize(
    ("address", "version_6", "public"),
    [
        ("10.0.0.7", "fd000000000000000000000000000002", []),
        ("192.168.1.7", "fe8000000000000000fc00fffe000001", []),
        ("8.8.4.4", "00000000000000000000000000000001", ["8.8.4.4"]),
        ("172.16.0.1", "20014860486000000000000000008888", ["2001:4860:4860::8888"]),
    ],
)
def test_public_addresses_are_known(
    monkeypatch: pytest.MonkeyPatch, address: str, version_6: str, public: List[str]
) -> None:
    files = {
        "/proc/net/fib_trie": FIB_TRIE.format(address=address).splitlines(),
        "/proc/net/if_inet6": [f"{version_6} 01 80 10 80 eth0"],
    }
    monkeypatch.setattr(network, "_lines", lambda path: files[path])
    assert network.public_addresses() == public


def test_a_public_address_is_told_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(network, "public_addresses", lambda: ["8.8.4.4"])
    assert start_ranks(["true"], 1) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert "8.8.4.4 among them" in line
    assert "without authentication" in line


def test_who_listens_is_known_without_a_connection() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert not network.is_listening(port)
        server.listen()
        assert network.is_listening(port)
        assert not network.is_free(port)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not network.is_listening(port)
