"""Where one rank ends as it should not, all end, and stderr tells of the first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import is_alive, launch, program, start, wait_for, wait_for_files

AT_WORK = """
def die(how):
    if how == "raise":
        raise ValueError("no more")
    if how == "sys.exit(3)":
        sys.exit(3)
    if how == "sys.exit(0)":
        sys.exit(0)
    if how == "os._exit(0)":
        os._exit(0)
    if how == "os._exit(5)":
        os._exit(5)
    if how == "abort":
        os.abort()
    if how == "memory":
        bytearray(1 << 62)
    if how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))

from ofengine.processes.crash_report import CrashReport

with heartbeat.verb, CrashReport() as report:
    for step in range(3):
        heartbeat.beat()
        report.place.batch[0] = step
    report.place.note("of train_dataloader", "[2, 2]", 4)
    if rank == 1:
        die(sys.argv[1])
    with heartbeat.exchange:
        forever()
"""


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("raise", 1, "ended with the error above"),
        slow("memory", 1, "ended with the error above"),
        ("sys.exit(3)", 3, "was at its end by sys.exit(3) while rank 0 was still at work"),
        slow("sys.exit(0)", 1, "was at its end while rank 0 was still at work"),
        slow("os._exit(5)", 5, "ended with exit code 5"),
        ("os._exit(0)", 1, "ended amid its work, with exit code 0"),
        ("abort", 134, "died of SIGABRT (an abort)"),
        ("SIGKILL", 137, "died of SIGKILL (killed from outside, often for want of memory)"),
        slow("SIGSEGV", 139, "died of SIGSEGV (a segmentation fault)"),
        slow("SIGTERM", 143, "died of SIGTERM"),
    ],
)
def test_all_ranks_end_with_the_first_which_is_named(
    tmp_path: Path, how: str, code: int, said: str
) -> None:
    script = program(tmp_path, "import faulthandler; faulthandler.disable()\n" + AT_WORK)
    if how == "sys.exit(3)":  # at OneFlow's exit, a rank waits for the others
        script.write_text(
            "import atexit\natexit.register(lambda: forever())\n" + script.read_text()
        )
    done = launch(tmp_path, "--nproc", 2, script, how)
    assert done.returncode == code, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ofengine: after ")
    if how in ("abort", "SIGKILL", "SIGSEGV"):
        said += " at batch 2 of train_dataloader: [2, 2]; the device may be behind"
    assert f" rank 1 of 2, on host {os.uname().nodename}, {said}. All ranks here" in last
    assert done.stderr.count("Traceback") == (how in ("raise", "memory") or "sys.exit" in how)


def test_an_exception_that_all_ranks_have_is_shown_once(tmp_path: Path) -> None:
    done = launch(tmp_path, "--nproc", 3, program(tmp_path, "raise ValueError('on all')\n"))
    assert done.returncode == 1
    assert done.stderr.count("ValueError: on all") == 1
    assert done.stdout == ""


def test_ranks_that_fail_together_finish_their_last_hooks(tmp_path: Path) -> None:
    text = """
try:
    with heartbeat.verb:
        try:
            raise ValueError("on both")
        except ValueError:
            heartbeat.leaving()
            if rank == 0:
                time.sleep(1.0)
                write("saved")
            raise
finally:
    write("left")
"""
    done = launch(tmp_path, "--nproc", 2, program(tmp_path, text))
    assert done.returncode == 1
    assert done.stderr.count("ValueError: on both") == 1
    assert {each.name for each in tmp_path.glob("[sl]*-?")} == {"saved-0", "left-0", "left-1"}


def test_what_a_rank_wrote_last_is_shown_where_it_left_no_error(tmp_path: Path) -> None:
    text = """
if rank == 1:
    for number in range(1000):
        print("line", number)
    sys.stderr.write("the last one")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)
print("line of rank", rank, flush=True)
forever()
"""
    done = launch(tmp_path, "--nproc", 3, program(tmp_path, text))
    shown = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
    assert shown[-2:] == ["[rank 1] line 999", "[rank 1] the last one"]
    assert 10 < len(shown) < 100
    assert all(line.startswith("[rank 1] ") for line in shown)
    assert "line of rank 0\n".startswith(done.stdout)  # it may be killed while it prints


def test_nothing_that_a_rank_has_started_is_left(tmp_path: Path) -> None:
    text = """
child = subprocess.Popen(["sleep", "1000"])
apart = subprocess.Popen(["setsid", "sleep", "1000"])  # not in the rank's group
orphan = subprocess.Popen(["sh", "-c", "setsid sleep 1000 & echo $!"], stdout=subprocess.PIPE)
number = int(orphan.stdout.readline())
write("children", f"{child.pid} {apart.pid} {number}")
while len([each for each in os.listdir(folder) if each.startswith("children-")]) < 2:
    time.sleep(0.01)
time.sleep(0.1)
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
forever()
"""
    launch(tmp_path, "--nproc", 2, program(tmp_path, text))
    children = [
        int(pid) for path in tmp_path.glob("children-*") for pid in path.read_text().split()
    ]
    assert len(children) == 6
    assert [pid for pid in children if is_alive(pid)] == []


def test_a_rank_that_ends_normally_leaves_what_it_has_started(tmp_path: Path) -> None:
    text = """
if rank == 1:
    write("child", subprocess.Popen(["sleep", "1000"]).pid)
"""
    done = launch(tmp_path, "--nproc", 2, program(tmp_path, text))
    assert (done.returncode, done.stderr) == (0, "")
    child = int((tmp_path / "child-1").read_text())
    assert is_alive(child)
    os.kill(child, signal.SIGKILL)


def test_with_the_launcher_killed_its_ranks_are_gone(tmp_path: Path) -> None:
    process = start(tmp_path, "--nproc", 2, program(tmp_path, "write('ready')\nforever()\n"))
    wait_for_files(tmp_path, ["ready-0", "ready-1"])
    ranks = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)]
    assert all(map(is_alive, ranks))
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(is_alive, ranks)))


def test_a_rank_whose_launcher_died_before_it_was_tied_to_it_ends_at_once() -> None:
    program = """
import os, time
from ofengine.processes.supervisor import child_preparation

prepare = child_preparation(set())
read, write = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        prepare()  # its parent is not the launcher, as where that died in the meantime
        os.write(write, b"went on")
        os._exit(0)
    os._exit(os.wait()[1] >> 8)
os.close(write)
print(os.wait()[1] >> 8, os.read(read, 100))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1 b''\n", "")


def test_a_rank_that_has_left_while_another_needs_it_later_is_told(tmp_path: Path) -> None:
    text = """
if rank == 0:
    while not os.path.exists(os.path.join(folder, "ended-1")):
        time.sleep(0.01)
    with heartbeat.verb:
        forever()
write("ended")
"""
    done = launch(tmp_path, "--nproc", 2, program(tmp_path, text))
    assert done.returncode == 1
    assert "rank 1 of 2" in done.stderr
    assert "was at its end while rank 0 was still at work" in done.stderr


def test_a_rank_may_work_on_alone_after_what_all_do(tmp_path: Path) -> None:
    text = """
with heartbeat.verb:
    heartbeat.beat()
if rank == 0:
    while not os.path.exists(os.path.join(folder, "ended-1")):
        time.sleep(0.01)
    time.sleep(1.5)
    write("ended")
    print("saved")
write("ended")
"""
    done = launch(tmp_path, "--nproc", 2, "--hang-timeout", 0.5, program(tmp_path, text))
    assert (done.returncode, done.stdout, done.stderr) == (0, "saved\n", "")
