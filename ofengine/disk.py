"""Files on a disk that others use too: nobody else's is lost, and only regular files are opened."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import itertools
import os
import re
import secrets
import stat
import time
from pathlib import Path
from typing import BinaryIO, Iterator, Optional, Tuple, Union

_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""In bytes, on Linux."""
_TEMPORARY = re.compile(r"\.ofengine-([0-9a-f]{12})-[0-9a-f]{16}\.tmp")
"""The name of a file that is being written: which machine writes it, and a random number."""
_TEMPORARY_BEFORE = re.compile(r"\..+\.(?:safetensors|csv)\.(\d+)\.tmp", re.DOTALL)
"""The same in earlier versions, with a process id."""
_A_DAY = 24 * 60 * 60
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)
"""What file systems without hard links say."""


def why_no_path(path: Union[str, Path]) -> Optional[str]:
    """What keeps ``path`` from being one, as the end of a sentence; None where nothing does."""
    text = str(path)
    if "\0" in text:
        return "has a NUL character, which no path can have"
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        return "has characters that no path can have"
    longest = max(map(len, encoded.split(b"/")))
    if longest > _LONGEST_NAME:
        return f"has a name of {longest} bytes, and {_LONGEST_NAME} is the most"
    if len(encoded) > _LONGEST_PATH:
        return f"has {len(encoded)} bytes, and {_LONGEST_PATH} is the most"
    return None


def name_of(start: str, end: str) -> str:
    """A file's name: as much of ``start`` as there is room for before ``end``, and that."""
    while len(os.fsencode(start + end)) > _LONGEST_NAME:
        start = start[:-1]
    return start + end


# ---------------------------------------------------------------------- reading


def open_regular(path: Union[str, Path]) -> BinaryIO:
    """Open a file to be read. Raises OSError for all that is no regular file; waits for none."""
    _check_regular(os.stat(path))  # before it is opened, which some devices act on
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _check_regular(os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")


# ---------------------------------------------------------------------- writing


@contextlib.contextmanager
def temporary_file(folder: Path) -> Iterator[Tuple[BinaryIO, Path]]:
    """A new file in ``folder``, which is made, under a name that nothing else has.

    It is locked while it is open, which tells that its process lives. At the end that name is
    gone; what the file is to be called must be said before, by :func:`give_name` or ``os.replace``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, path = _create(folder)
    try:
        with file:
            yield file, path
    finally:
        with contextlib.suppress(OSError):  # it has another name by now
            path.unlink()


def _create(folder: Path) -> Tuple[BinaryIO, Path]:
    # Never a file, or what a link leads to, that somebody else has put there.
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        path = folder / f".ofengine-{_machine()}-{secrets.token_hex(8)}.tmp"
        try:
            file = os.fdopen(os.open(path, flags, 0o666), "w+b")
        except FileExistsError:
            continue
        try:
            if not take_lock(file.fileno()):
                raise FileNotFoundError(path)  # or will be gone in a moment
            os.lstat(path)
        except FileNotFoundError:  # taken for a leftover in the moment before it was locked
            file.close()
        except BaseException:
            file.close()
            raise
        else:
            return file, path


def take_lock(descriptor: int) -> bool:
    """Lock a file of one's own; False where somebody else has. True where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def give_name(temporary: Path, path: Path) -> None:
    """Call the file ``temporary`` ``path``, too. Raises FileExistsError where anything is there.

    That holds against others who do the same at the same time, and for links that lead nowhere.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        # NFS may ask twice where an answer is lost.
        if not os.path.samestat(os.lstat(temporary), os.lstat(path)):
            raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(path, flags, 0o666))  # ours from now on
        try:
            os.replace(temporary, path)
        except BaseException:
            os.unlink(path)
            raise


def sync_folder(folder: Path) -> None:
    """Have the new names in ``folder`` on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------- what was left


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that are no more left half-written in ``folder``.

    A process locks what it writes, and its lock goes with it; so containers, which do not know
    each other's processes, know this of one another. What another machine has written (a shared
    folder), or an earlier version, is removed once it was not written to for a day.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        now, before = _TEMPORARY.fullmatch(name), _TEMPORARY_BEFORE.fullmatch(name)
        if now or (before and not Path("/proc", before[1]).exists()):
            is_of_here = bool(now and now[1] == _machine() != _UNKNOWN)
            with contextlib.suppress(OSError):  # gone already, or not ours to remove
                _remove_unless_written(folder / name, is_of_here)


def _remove_unless_written(path: Path, is_of_here: bool) -> None:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    try:
        status = os.fstat(descriptor)
        _check_regular(status)
        is_old = time.time() - status.st_mtime > _A_DAY
        if not is_old and not is_of_here:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError) or not is_old:
                return
        os.unlink(path)
    finally:
        os.close(descriptor)


_UNKNOWN = "0" * 12


@functools.lru_cache(maxsize=None)
def _machine() -> str:
    """What tells this machine, since it was started, from all others; containers share it."""
    try:
        found = Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:12]
    except OSError:
        return _UNKNOWN
    return found if re.fullmatch(r"[0-9a-f]{12}", found) else _UNKNOWN


def append_whole(path: Path, data: bytes, flags: int = 0) -> None:
    """Write ``data`` behind all that is in ``path``, or, where that raises OSError, none of it.

    ``flags`` of open(2) come on top of those for appending; without ``O_CREAT`` the file is there.
    """
    flags |= os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0) as file:
        end, left = file.seek(0, os.SEEK_END), memoryview(data)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


def claim_version(root: Path, first: int = 0) -> Path:
    """Make ``root/version_<n>``, n the first from ``first`` on that nobody has: the run's alone."""
    root.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(first):
        folder = root / f"version_{number}"
        with contextlib.suppress(FileExistsError):  # also where another run was faster
            folder.mkdir()
            break
    return folder
