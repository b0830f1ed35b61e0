"""Decoded images in one file, that is mapped into memory: written once, whole or not at all.

A file is made under a temporary name and gets its own when all of it is on the disk. Of several
processes that need it one writes, and the others wait for a lock that ends with its holder.

    16 bytes   ``_MAGIC``
    8 bytes    how many images there are
    8 bytes    for each image: its height and width
               the images, one behind the other: uint8, (height, width, 3)
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import time
from collections import deque
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Callable, Deque, Iterable, Iterator, List, Optional, Tuple

import numpy as np
from tqdm.auto import tqdm

from ofengine.disk import (
    open_regular,
    remove_leftovers,
    sync_folder,
    take_lock,
    temporary_file,
)
from ofengine.errors import DataError, said_by
from ofengine.launch import heartbeat

_MAGIC = b"ofengine images1"
_LOCK = ".ofengine-images.lock"
_MOST_THREADS = 8
_WAITS_SILENTLY = 2.0
"""Seconds."""


class ImageCache:
    """The images of a file that :func:`cached` has made, read as they are asked for.

    Raises:
        ValueError: the file is none of ``count`` images.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        with open_regular(path) as file:
            begin = 24 + 8 * count
            head = file.read(begin)
            if head[:24] != _MAGIC + count.to_bytes(8, "little") or len(head) != begin:
                raise ValueError("its head is another")
            sizes = np.frombuffer(head, "<i4", offset=24).reshape(count, 2).astype(np.int64)
            ends = np.cumsum(3 * sizes[:, 0] * sizes[:, 1])
            if os.fstat(file.fileno()).st_size != begin + int(ends[-1]):
                raise ValueError("its length is another")
            self._bytes = np.asarray(np.memmap(file, np.uint8, "r", begin))
        self._sizes, self._ends = sizes, ends

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> Any:
        height, width = self._sizes[index]
        end = self._ends[index]
        return self._bytes[end - 3 * height * width : end].reshape(height, width, 3)

    def __reduce__(self) -> Any:
        return ImageCache, (self.path, len(self))  # mapped anew where it is sent to

    def sizes(self) -> List[Tuple[int, int]]:
        """The different sizes there are: (height, width)."""
        return [(int(height), int(width)) for height, width in np.unique(self._sizes, axis=0)]

    def array(self) -> Any:
        """All images, where they are of one size: (images, height, width, 3)."""
        return self._bytes.reshape(len(self), *self.sizes()[0], 3)


def cached(
    path: Path,
    sources: List[str],
    size_of: Callable[[str], Tuple[int, int]],
    image_of: Callable[[str], Any],
    what: str,
    begin: Callable[[], Callable[[], None]],
) -> ImageCache:
    """The images of ``sources``, out of the file ``path``, which is made where it is not there.

    Args:
        path: of the file.
        sources: of each image the file it comes from.
        size_of: gives of a source (height, width) of its image.
        image_of: gives of a source its image, (height, width, 3). Threads call it, and
            ``size_of``; an exception of theirs is the source's.
        what: how the images are called, in "decoding <what>".
        begin: called before images are decoded; what it returns is called afterwards, and may
            raise.

    Raises:
        DataError: an image cannot be read, or the file cannot be written.
    """
    found = _found(path, len(sources))
    if found is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent, what):
            found = _found(path, len(sources))
            if found is not None:  # another process has made it meanwhile
                return found
            remove_leftovers(path.parent)
            check = begin()
            with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
                sizes = list(_each(pool, size_of, sources, f"sizes of {what}"))
                images = _each(pool, image_of, sources, f"decoding {what}")
                _write(path, np.array(sizes, dtype="<i4"), zip(sources, images), check)
        return ImageCache(path, len(sources))
    except OSError as error:
        raise DataError(
            f"CachedImageFolder cannot keep its images in {path.parent} ({said_by(error)}): give "
            "another cache_dir."
        ) from error


def _found(path: Path, count: int) -> Optional[ImageCache]:
    """What is there already; None for nothing, and for what is no whole file."""
    try:
        return ImageCache(path, count)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise DataError(
            f"CachedImageFolder cannot read {path} ({said_by(error)}): remove it, or give another "
            "cache_dir."
        ) from error


def _write(
    path: Path, sizes: Any, images: Iterable[Tuple[str, Any]], check: Callable[[], None]
) -> None:
    head = _MAGIC + len(sizes).to_bytes(8, "little") + sizes.tobytes()
    needed = len(head) + int(np.sum(3 * sizes[:, 0].astype(np.int64) * sizes[:, 1]))
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise DataError(
            f"CachedImageFolder needs {_gib(needed)} in {path.parent}, and {_gib(free)} are free "
            "there: make room, give another cache_dir, or begin the transform with a smaller "
            "Resize."
        )
    with temporary_file(path.parent) as (file, temporary):
        _reserve(file, needed)
        file.write(head)
        for size, (source, image) in zip(sizes.tolist(), images):
            if image.shape != (*size, 3) or image.dtype != np.uint8:
                raise DataError(
                    f"the image {source} is {image.shape} of {image.dtype} when decoded, and not "
                    f"{(*size, 3)} of uint8 as its head says: repair it, or remove it."
                )
            file.write(np.ascontiguousarray(image).data)
        file.flush()
        os.fsync(file.fileno())
        check()
        os.replace(temporary, path)
    sync_folder(path.parent)


def _gib(number: int) -> str:
    return f"{number / 2**30:.2f} GiB"


def _reserve(file: BinaryIO, length: int) -> None:
    """Raise OSError now where there is no room, if the file system can tell."""
    try:
        os.posix_fallocate(file.fileno(), 0, length)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise


class _Bar(tqdm):
    monitor_interval = 0  # no thread that watches the bar


def _each(
    pool: Executor, function: Callable[[str], Any], sources: List[str], what: str
) -> Iterator[Any]:
    """What ``function`` gives of each, in their order, a few of them ahead."""
    ahead: Deque[Tuple[str, Future[Any]]] = deque()
    most = 2 * _MOST_THREADS
    with _Bar(total=len(sources), desc=what, unit="image", disable=None) as bar:
        for source in [*sources, *[None] * most]:
            if len(ahead) >= most or (ahead and source is None):
                first, future = ahead.popleft()
                try:
                    found = future.result()
                except Exception as error:
                    raise DataError(
                        f"the image {first} cannot be read ({said_by(error)}): repair it, or "
                        "remove it."
                    ) from error
                bar.update()
                heartbeat.beat()
                yield found
            if source is not None:
                ahead.append((source, pool.submit(function, source)))


@contextlib.contextmanager
def _locked(folder: Path, what: str) -> Iterator[None]:
    """Alone among the processes that make a file in ``folder``; the lock ends with its holder."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(folder / _LOCK, flags, 0o666)
    tells_at: Optional[float] = time.monotonic() + _WAITS_SILENTLY
    try:
        while not take_lock(descriptor):
            heartbeat.beat()
            time.sleep(0.05)
            if tells_at is not None and time.monotonic() > tells_at:
                tells_at = None
                print(f"waiting for another process, which is decoding {what}", file=sys.stderr)
        yield
    finally:
        os.close(descriptor)
