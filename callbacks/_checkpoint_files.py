"""The files of one ModelCheckpoint: which are its own, what they are called, when they go."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import stat
from pathlib import Path, PurePosixPath
from typing import Container, Dict, Iterable, Iterator, Optional, Set

from ofengine.checkpoint import EXTENSION, metadata_of, put_first
from ofengine.errors import CheckpointError

_MOST_PARTS = 4
"""So many of the last parts of a path, in a state of an earlier version, can be sub-folders."""


class CheckpointFiles:
    """What one callback keeps in its folder. No other file is ever replaced or removed.

    A file is the callback's own where it lies in the folder, not behind a link that leads out of
    it, is a regular file, and says in its header that this run and this callback have written it.

    Args:
        folder: the callback's folder, absolute.
        key: what tells the callback from all others of the run; a resumed run keeps it.
        run_id: what tells the run from all others.
    """

    def __init__(self, folder: Path, key: str = "", run_id: str = "") -> None:
        self.folder = folder
        self.key = key or secrets.token_hex(8)
        self.run_id = run_id
        self.kept: Dict[str, None] = {}
        """The paths of the files that were written and are to stay, in that order."""
        self.adopted: Set[str] = set()
        """Files of an earlier version, which do not say who wrote them: the checkpoint does."""
        self.spared: Optional[Path] = None
        """The checkpoint that is resumed from, where it has a name that the user gave it."""

    # ------------------------------------------------------------------ whose it is

    def is_own(self, path: Path) -> bool:
        """True for a file that this callback may replace or remove."""
        if path.suffix != EXTENSION or path == self.spared or not self.holds(path):
            return False
        try:
            is_file = stat.S_ISREG(os.lstat(path).st_mode)
        except (OSError, ValueError):
            return False
        said = metadata_of(path) if is_file else {}
        writer = said.get("callback", self.key if str(path) in self.adopted else None)
        return said.get("run") == self.run_id and writer == self.key

    def holds(self, path: Path) -> bool:
        """True where ``path`` lies in the folder, by its name and in truth."""
        return self.folder in path.parents and (
            self.folder.resolve() in (path.parent / "x").resolve().parents
        )

    # ------------------------------------------------------------------ what it is called

    def choose(self, wanted: Path, out: str) -> str:
        """The path that :meth:`write` would give a file now."""
        return next(
            str(path)
            for path in _numbered(wanted)
            if not os.path.lexists(path) or self._may_replace(path, (out,))
        )

    def write(self, wanted: Path, content: bytes, free: Container[str]) -> str:
        """Write a file to ``wanted``, or ``wanted-v1``, ... where others are; return the path.

        Of the callback's own files those may be replaced that are ``free``, and those that this
        run wrote before it was killed and resumed from an earlier moment. What is there is looked
        at in the moment when the file gets its name.

        Raises :class:`CheckpointError` where it cannot be written.
        """
        if not self.holds(wanted):
            raise CheckpointError(
                f"{wanted} could not be written: {wanted.parent} is a link that leads out of "
                f"{self.folder}. Give the folder that it leads to as dirpath."
            )
        return str(put_first(_numbered(wanted), content, lambda p: self._may_replace(p, free)))

    def _may_replace(self, path: Path, free: Container[str]) -> bool:
        return (str(path) in free or str(path) not in self.kept) and self.is_own(path)

    def remove(self, path: str) -> None:
        """Remove a file of this callback that is no longer wanted; leave any other."""
        if path and path not in self.kept and self.is_own(Path(path)):
            with contextlib.suppress(OSError):  # gone already, or somebody holds it: no reason
                os.remove(path)  # to end the training

    def drop(self, paths: Iterable[str]) -> None:
        """Remove files that were to stay, and are to stay no longer."""
        for path in paths:
            self.kept.pop(path, None)
            self.remove(path)

    # ------------------------------------------------------------------ names in a checkpoint

    def name_of(self, path: str) -> str:
        """What a checkpoint calls ``path``: the way to it from the folder; "" for none."""
        return Path(os.path.relpath(path, self.folder)).as_posix() if path else ""

    def find(self, name: str, resumed_from: Optional[Path]) -> str:
        """The file of this run that a checkpoint calls ``name``; "" where there is none.

        It is looked for by its name in the folder, and beside the checkpoint that is resumed
        from; at last where the checkpoint says, to be read only.
        """
        for path in self._places(name, resumed_from):
            if path.suffix == EXTENSION and metadata_of(path).get("run") == self.run_id:
                return str(path)
        return ""

    def _places(self, name: str, resumed_from: Optional[Path]) -> Iterator[Path]:
        parts = [part for part in PurePosixPath(name).parts if part != "/"]
        if not parts:
            return
        beside = [] if resumed_from is None else list(resumed_from.parents)[:3]
        for folder in (self.folder, *beside):
            for count in range(min(len(parts), _MOST_PARTS), 0, -1):
                if ".." not in parts[-count:]:
                    yield folder.joinpath(*parts[-count:])
        yield Path(os.path.normpath(self.folder / name))

    def is_called(self, path: Path, name: str) -> bool:
        """True for a file that a checkpoint calls ``name``, whatever number was added to it."""
        stem, own = name[: -len(EXTENSION)], self.name_of(str(path))
        return bool(re.fullmatch(rf"{re.escape(stem)}(-v\d+)?{re.escape(EXTENSION)}", own))

    def place_of(self, name: str) -> str:
        """Where the file that a checkpoint calls ``name`` would be in the folder; "" for none."""
        parts = PurePosixPath(name).parts
        if "/" in parts or ".." in parts:  # an earlier version's, or of another folder
            parts = parts[-1:] if parts[-1] not in ("/", "..") else ()
        return str(self.folder.joinpath(*parts)) if name else ""

    def has_later(self, patterns: Iterable[str], step: int) -> bool:
        """True where the callback wrote files after ``step`` already, before it was killed."""
        paths = [path for pattern in patterns for path in self.folder.glob(pattern)]
        return any(step_in(path) > step for path in paths if self.is_own(path))


def step_in(path: Path) -> int:
    """The optimizer steps that a file says the run had done; -1 where it says none."""
    said = str(metadata_of(path).get("global_step", ""))
    return int(said) if re.fullmatch(r"[0-9]{1,18}", said) else -1


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    stem = path.name[: -len(EXTENSION)]
    for version in itertools.count(1):
        yield path.with_name(f"{stem}-v{version}{EXTENSION}")
