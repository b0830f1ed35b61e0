"""Files on a disk that others use: only one's own are removed, and no name is taken twice."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, List

import pytest

from ofengine import CheckpointError, disk
from ofengine.checkpoint import encode, put, put_first, read, remove_leftovers

CONTENT = encode({}, {"n": 1})
LONG_AGO = (1e9, 1e9)


def nobody_may(_: Path) -> bool:
    return False


# ---------------------------------------------------------------------- leftovers

WRITER = """
import sys
from pathlib import Path
from ofengine.disk import temporary_file
with temporary_file(Path(sys.argv[1])) as (file, path):
    print(path.name, flush=True)
    sys.stdin.readline()
"""


def writing(folder: Path) -> subprocess.Popen[str]:
    """A process that is writing a file in ``folder``."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    child: subprocess.Popen[str] = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)], **pipes
    )
    assert child.stdout is not None
    child.stdout.readline()
    return child


@pytest.mark.parametrize("age", ["new", "old"])
def test_what_a_living_process_writes_stays_and_goes_when_it_is_dead(
    tmp_path: Path, age: str
) -> None:
    with writing(tmp_path) as child:
        (file,) = tmp_path.iterdir()
        if age == "old":  # a clock that was set, or a very slow disk
            os.utime(file, LONG_AGO)
        remove_leftovers(tmp_path)
        assert file.exists()
        child.send_signal(signal.SIGKILL)
        child.wait()
        remove_leftovers(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_what_another_machine_writes_goes_when_it_was_not_written_to_for_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = disk._machine()
    with disk.temporary_file(tmp_path) as (_, path):
        (tmp_path / path.name.replace(own, "0123456789ab")).write_text("")
        monkeypatch.setattr(disk, "_machine", lambda: "ba9876543210")
        remove_leftovers(tmp_path)  # another host on the same network disk
        assert len(list(tmp_path.iterdir())) == 2
        for each in tmp_path.iterdir():
            os.utime(each, LONG_AGO)
        remove_leftovers(tmp_path)
        assert list(tmp_path.iterdir()) == [path]  # it is locked


def test_without_locks_age_alone_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(disk.fcntl, "flock", no_locks)
    with disk.temporary_file(tmp_path) as (_, path):
        remove_leftovers(tmp_path)
        assert path.exists()
        os.utime(path, LONG_AGO)
        remove_leftovers(tmp_path)
        assert not path.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("boot_id", [None, "", "something else"])
def test_where_no_machine_can_be_told_age_alone_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boot_id: Any
) -> None:
    def read_text(_: Path) -> str:
        if boot_id is None:
            raise OSError(errno.ENOENT, "No such file or directory")
        return str(boot_id)

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(disk, "_machine", disk._machine.__wrapped__)
    with disk.temporary_file(tmp_path) as (file, path):
        file.close()  # and with it the lock
        remove_leftovers(tmp_path)
        assert path.exists()
        os.utime(path, LONG_AGO)
        remove_leftovers(tmp_path)
        assert not path.exists()


def test_only_files_of_the_engine_s_own_form_are_leftovers(tmp_path: Path) -> None:
    machine = disk._machine()
    ours = f".ofengine-{machine}-0123456789abcdef.tmp"
    others = [
        "precious.txt", "last.safetensors", f"ofengine-{machine}-0123456789abcdef.tmp", ours + "2",
        f".ofengine-{machine}-0123.tmp", ".ofengine-0123456789abcdef.tmp", ".tmp",
        f".ofengine-{machine}-0123456789abcdef\n.tmp",
    ]  # fmt: skip
    for name in others:
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, LONG_AGO)
    (tmp_path / ours).mkdir()
    os.mkfifo(tmp_path / ours.replace("0123", "1111"))
    (tmp_path / "target").write_text("")
    (tmp_path / ours.replace("0123", "2222")).symlink_to("target")
    before = sorted(tmp_path.iterdir())
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


# ---------------------------------------------------------------------- names


def test_of_many_writers_each_gets_a_name_of_its_own(tmp_path: Path) -> None:
    names = [tmp_path / f"x-v{number}" for number in range(32)]
    contents = [encode({}, {"n": number}) for number in range(32)]
    together, written = threading.Barrier(32), []  # type: ignore[var-annotated]

    def write(content: bytes) -> None:
        together.wait()
        written.append((put_first(names, content, nobody_may), content))

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path for path, _ in written) == sorted(names)
    assert all(path.read_bytes() == content for path, content in written)
    assert len(list(tmp_path.iterdir())) == 32


@pytest.mark.parametrize("links", [True, False])
def test_whatever_is_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:  # FAT, some network disks
        monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "target").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "nowhere").symlink_to("not there")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "socket"))
        names = ["file", "folder", "link", "nowhere", "fifo", "socket", "free"]
        path = put_first([tmp_path / name for name in names], CONTENT, nobody_may)
    assert path == tmp_path / "free"
    assert read(path).state == {"n": 1}
    assert (tmp_path / "file").read_text() == (tmp_path / "target").read_text() == "precious"
    assert not (tmp_path / "not there").exists()
    assert len(list(tmp_path.iterdir())) == 8


def test_without_links_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match="could not be written: Operation not permitted"):
        put_first([tmp_path / "x"], CONTENT, nobody_may)
    assert list(tmp_path.iterdir()) == []


def test_a_link_made_twice_because_its_answer_was_lost_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def asked_again(source: Any, target: Any) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", asked_again)
    assert put_first([tmp_path / "x", tmp_path / "y"], CONTENT, nobody_may) == tmp_path / "x"
    assert [each.name for each in tmp_path.iterdir()] == ["x"]


def test_a_link_that_is_replaced_keeps_what_it_led_to(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "x").symlink_to("target")
    put(tmp_path / "x", CONTENT)
    assert not (tmp_path / "x").is_symlink()
    assert (tmp_path / "target").read_text() == "precious"


WRONG_PATHS = [
    ("a\0b", "has a NUL character"),
    ("\0", "has a NUL character"),
    ("x" * 256, "has a name of 256 bytes, and 255 is the most"),
    ("ü" * 128 + "/x", "has a name of 256 bytes"),
    ("/".join(["x" * 200] * 21), "has 4220 bytes, and 4095 is the most"),
    ("\ud800", "has characters that no path can have"),
]


@pytest.mark.parametrize(("path", "reason"), WRONG_PATHS)
def test_a_path_that_is_none_is_one_sentence(path: str, reason: str) -> None:
    errors: List[str] = []
    for function in (read, lambda path: put(path, CONTENT)):
        with pytest.raises(CheckpointError) as error:
            function(path)
        errors.append(str(error.value))
    for text, verb in zip(errors, ("read", "written")):
        assert f"could not be {verb}: the path {reason}" in text
        assert text.isprintable()
        assert len(text) < 400


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    assert read(put(tmp_path / ("x" * 255), CONTENT)).state == {"n": 1}


def test_one_that_cleans_up_takes_nothing_from_one_that_writes(tmp_path: Path) -> None:
    over = threading.Event()

    def clean() -> None:
        while not over.is_set():
            remove_leftovers(tmp_path)

    threads = [threading.Thread(target=clean) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(200):
            put(tmp_path / str(number), CONTENT)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert len(list(tmp_path.iterdir())) == 200
