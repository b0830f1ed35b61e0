"""A log that only grows, and how a resumed run goes on in it."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Union

import numpy as np

from ofengine.disk import (
    append_whole,
    give_name,
    open_regular,
    remove_leftovers,
    temporary_file,
)
from ofengine.errors import CheckpointError, warn
from ofengine.loggers._folder import FolderLogger, plain_name, size_of

_CHUNK = 2**20


class _Kept(NamedTuple):
    """What a checkpoint keeps of a log, checked."""

    folder: str
    size: int
    digest: str
    pending: bytes
    next_flush: int
    more: Dict[str, str]

    @classmethod
    def of(cls, state: Mapping[str, Any], owner: str) -> _Kept:
        pending = state.get("pending")
        good = all(isinstance(state.get(each), str) for each in ("folder", "digest"))
        more = state.get("more")
        good = (
            good and isinstance(more, dict) and all(isinstance(each, str) for each in more.values())
        )
        for each in ("size", "next_flush"):
            good = good and type(state.get(each)) is int and 0 <= state[each] < 2**62
        good = good and isinstance(pending, np.ndarray) and pending.dtype == np.uint8
        if not good or pending is None or more is None:
            raise CheckpointError(f"the checkpoint's state of a {owner} is not one.")
        return cls(
            plain_name(state["folder"]), state["size"], state["digest"], pending.tobytes(),
            state["next_flush"], dict(more),
        )  # fmt: skip


class AppendLogger(FolderLogger):
    """A logger whose file only grows.

    A resumed run goes on in the file that it wrote, wherever its folder is now: beside the
    checkpoint, or in ``save_dir``. It knows the file by what is in it, and takes out what came
    after the checkpoint, as it will come again. Any other file stays as it is, and the run begins
    one in a folder of its own, with a copy of what it had logged.

    Where the file cannot be written during a run, the logger warns once, keeps what is logged in
    memory and tries again at the next flush.
    """

    def __init__(
        self,
        save_dir: Union[str, Path],
        name: Optional[str] = "ofengine_logs",
        version: Union[int, str, None] = None,
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version, flush_logs_every_n_steps)
        self._pending: List[bytes] = []
        self._size = 0
        """So many bytes of the file are this run's."""
        self._digest = hashlib.blake2b(digest_size=16)
        """Of these."""
        self._before: Optional[Tuple[Optional[Path], int]] = None
        """The file that a resumed run has still to begin with, and so many bytes of it."""
        self._more: Dict[str, str] = {}
        """What a subclass has a checkpoint keep."""

    def put(self, data: bytes) -> None:
        """Add ``data`` behind all that was logged."""
        if self._size == 0 and not self._pending and self._before is None:
            self._pending.append(self.beginning())
        self._pending.append(data)

    def beginning(self) -> bytes:
        """What a file begins with."""
        return b""

    def save_due(self, step: int) -> None:
        """Write what was logged, where it has waited long enough."""
        if step >= self._next_flush:
            self._write()
            self._next_flush = step + self._every

    def save(self) -> None:
        """Write all that is not in the file yet."""
        self._write()

    def finalize(self, status: str) -> None:
        """Write what is left; take the folder away again where nothing ever came into it."""
        self._write()
        if self._size == 0 and not self._pending:
            self._give_back()

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> Dict[str, Any]:
        """Where the file is, how much of it is this run's, and what could not be written."""
        self._write()
        if self._size == 0 and not self._pending:
            return {}
        pending = np.frombuffer(b"".join(self._pending), dtype=np.uint8)
        return {
            "folder": "" if self._folder is None else self._folder.name,
            "size": self._size,
            "digest": self._digest.hexdigest(),
            "pending": pending,
            "next_flush": self._next_flush,
            "more": dict(self._more),
        }

    def check_state_dict(self, state: Dict[str, Any]) -> None:
        """Raise :class:`CheckpointError` where ``state`` is none of such a logger."""
        _Kept.of(state, type(self).__name__)

    def load_state_dict(self, state: Dict[str, Any], continue_files: bool) -> None:
        """Go on behind what the checkpoint knows; nothing is touched until something is logged."""
        kept = _Kept.of(state, type(self).__name__)
        source, digest = None, hashlib.blake2b(digest_size=16)
        for folder, _ in self._places(kept.folder) if kept.size else ():
            found = _digest_of(folder / self.file_name, kept.size)
            if found is not None and found.hexdigest() == kept.digest:
                source, digest = folder, found
                break
        if continue_files:
            self._go_on_in(source, kept.folder)
        if source is None and kept.size:
            warn(
                f"what the run had logged before is in no {self.file_name} beside the checkpoint "
                f"or in the folders of this {type(self).__name__}: its log begins with what comes "
                "now."
            )
        self._size = 0 if source is None else kept.size
        self._digest = digest
        self._pending = [kept.pending] if kept.pending else []
        self._before = None if source is None else (source / self.file_name, kept.size)
        self._next_flush = kept.next_flush
        self._more = kept.more

    # ------------------------------------------------------------------ the file

    def _write(self) -> None:
        if not self._pending:
            return
        try:
            path = self._claim() / self.file_name
            if self._before is not None:
                self._begin_with(path, *self._before)
                self._before = None
            self._append(path, b"".join(self._pending))
        except OSError as error:
            self._tell_unwritable(error, "what is logged is")

    def _begin_with(self, path: Path, source: Optional[Path], size: int) -> None:
        """Let ``path`` hold the first bytes of ``source``, which may be the same file."""
        remove_leftovers(path.parent)
        if source is None or (size_of(path) == size and self._resumed):
            return
        # Not cut in place: another folder may have a hard link to it.
        with temporary_file(path.parent) as (file, temporary), open_regular(source) as old:
            while file.tell() < size:
                part = old.read(min(_CHUNK, size - file.tell()))
                if not part:
                    raise OSError(f"{source} has become shorter")
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            if self._resumed:
                shutil.copymode(source, temporary)
                os.replace(temporary, path)
            else:
                give_name(temporary, path)

    def _append(self, path: Path, data: bytes) -> None:
        flags = 0
        if self._size == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_CREAT | (0 if self._resumed else os.O_EXCL)
        append_whole(path, data, flags)
        self._digest.update(data)
        self._size += len(data)
        self._pending = []


def _digest_of(path: Path, size: int) -> Any:
    """The digest of the first ``size`` bytes of the file; None where there are not so many."""
    digest, left = hashlib.blake2b(digest_size=16), size
    try:
        with open_regular(path) as file:
            while left:
                part = file.read(min(_CHUNK, left))
                if not part:
                    return None
                digest.update(part)
                left -= len(part)
    except OSError:
        return None
    return digest
