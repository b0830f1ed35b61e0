"""The folder of a run's log: which one is this run's, after it was stopped, moved or copied too."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, ClassVar, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from ofengine.disk import claim_version, why_no_path
from ofengine.errors import ConfigurationError, warn
from ofengine.loggers.base import Logger


class FolderLogger(Logger):
    """A logger that writes a file in ``<save_dir>/<name>/version_<n>``.

    The folder is made when ``log_dir`` is asked for or the first metric comes, whichever is
    first: a run claims a version by making its folder, so that no two runs share one. Several
    loggers of one Trainer with the same ``save_dir`` and ``name`` share their run's folder.

    Args:
        save_dir: the folder of all logs.
        name: a folder in it; "" or None for none.
        version: a number for ``version_<number>``, or the folder's own name. Default: the
            number after the highest there is.
        flush_logs_every_n_steps: how often what was logged is written, in optimizer steps. All is
            written at ``save()`` and at the end of the run.

    Raises:
        ConfigurationError: an argument is wrong, or ``version`` is another run's; when
            ``log_dir`` is asked for, where the folder cannot be made.
    """

    file_name: ClassVar[str]
    """What the file is called."""

    def __init__(
        self,
        save_dir: Union[str, Path],
        name: Optional[str] = "ofengine_logs",
        version: Union[int, str, None] = None,
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        own, every = type(self).__name__, flush_logs_every_n_steps
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigurationError(
                f"{own}(flush_logs_every_n_steps={every!r}): give a whole number of optimizer "
                "steps, from 1 on."
            )
        if version is not None and (isinstance(version, bool) or version == ""):
            raise ConfigurationError(
                f"{own}(version={version!r}): give a number, a folder's name, or None."
            )
        for argument, value in (("save_dir", save_dir), ("name", name), ("version", version)):
            problem = why_no_path(str(value))
            if problem is not None:
                raise ConfigurationError(f"{own}({argument}=...): the path {problem}.")
        self.save_dir = Path(save_dir)
        self.name = name or ""
        self.version = version
        self._every = every
        self._next_flush = every
        self._folder: Optional[Path] = None
        self._beside: Tuple[FolderLogger, ...] = ()
        self._resumed = False
        self._warned = False

    @property
    def log_dir(self) -> str:
        """The folder of this run; the first look makes it. The same from then on."""
        try:
            return str(self._claim())
        except OSError as error:
            raise ConfigurationError(
                f"{type(self).__name__} cannot make a folder in {self.save_dir}: "
                f"{error.strerror or error}. Give a save_dir (Trainer: default_root_dir) that can "
                "be written to, or Trainer(logger=False)."
            ) from error

    @property
    def path(self) -> str:
        """The file in ``log_dir``."""
        return str(Path(self.log_dir) / self.file_name)

    def run_dirs(self) -> List[Path]:
        """The folders of this and of earlier runs with this ``save_dir`` and ``name``."""
        root = self.save_dir / self.name
        if self.version is not None:
            return [self._own_folder()]
        return [each for each in root.iterdir() if each.is_dir()] if root.is_dir() else []

    # ------------------------------------------------------------------ claiming it

    def _claim(self) -> Path:
        """Make this run's folder, once. Raises OSError where that fails."""
        if self._folder is None:
            if self.version is None:
                self._folder = self._shared() or self._next_version()
            else:
                taken = self._own_folder() / self.file_name
                if os.path.lexists(taken) and not self._resumed:
                    raise ConfigurationError(
                        f"{type(self).__name__}(version={self.version!r}): {taken} is there "
                        "already, from another run: give another version, or remove it."
                    )
                self._own_folder().mkdir(parents=True, exist_ok=True)
                self._folder = self._own_folder()
        return self._folder

    def _shared(self) -> Optional[Path]:
        """The run's folder as another of its loggers knows it, where no such file is in it yet."""
        found = (each._folder for each in self._beside if each._folder is not None)
        free = (each for each in found if not os.path.lexists(each / self.file_name))
        return next(free, None)

    def _own_folder(self) -> Path:
        own = f"version_{self.version}" if isinstance(self.version, int) else str(self.version)
        return self.save_dir / self.name / own

    def _next_version(self) -> Path:
        """A folder of this run's alone, behind all that there are."""
        root = self.save_dir / self.name
        root.mkdir(parents=True, exist_ok=True)
        taken = [re.fullmatch(r"version_(\d+)", entry.name) for entry in root.iterdir()]
        highest = max([int(match.group(1)) for match in taken if match], default=-1)
        return claim_version(root, highest + 1)

    def _give_back(self) -> None:
        """Take the folder away again, into which nothing ever came."""
        if self._folder is not None:
            try:
                self._folder.rmdir()
            except OSError:
                return  # checkpoints are in it, or it is gone
            self._folder = None

    # ------------------------------------------------------------------ the run before

    def _places(self, kept: str) -> Iterator[Tuple[Path, bool]]:
        """Where the file may be, whose folder was ``kept``, and if that is by the checkpoint."""
        if self.resumed_from is not None:
            for folder in list(self.resumed_from.parents)[:4]:  # "checkpoints", one in it
                yield folder, True
        if self.version is not None:
            yield self._own_folder(), False
        elif kept:
            yield self.save_dir / self.name / kept, False

    def _go_on_in(self, source: Optional[Path], kept: str) -> None:
        """Go on in the folder ``source``, or where no file is yet, as far as it is this logger's.

        A folder elsewhere, such as that of a copied run, stays as it is.
        """
        folder = source if source is not None else next(self._empty_places(kept), None)
        self._folder = None if folder is None else self._own_name(folder)
        self._resumed = self._folder is not None

    def _empty_places(self, kept: str) -> Iterator[Path]:
        """Folders of the run, by their place, in which there is no file yet."""
        for folder, _ in self._places(kept):
            is_ours = folder.is_dir() and self._own_name(folder) is not None
            if is_ours and not os.path.lexists(folder / self.file_name):
                yield folder

    def _own_name(self, folder: Path) -> Optional[Path]:
        """The name of ``folder`` where it is one that this logger may write to, else None."""
        own = self.save_dir / self.name
        if self.version is not None:
            return self._own_folder() if _is_same(folder, self._own_folder()) else None
        return own / folder.name if _is_same(folder.parent, own) else None

    def _tell_unwritable(self, error: OSError, what: str) -> None:
        """Warn, once, that the file cannot be written; ``what`` begins how it is kept."""
        if not self._warned:
            self._warned = True
            warn(
                f"{type(self).__name__} cannot write to {self._folder or self.save_dir}: "
                f"{error.strerror or error}. Training goes on; {what} kept in memory and written "
                "as soon as that is possible."
            )


def share_folders(loggers: Sequence[Logger]) -> None:
    """Let loggers of one Trainer with the same ``save_dir`` and ``name`` share one folder."""
    groups: Dict[Any, List[FolderLogger]] = {}
    for each in loggers:
        if isinstance(each, FolderLogger) and each.version is None:
            groups.setdefault((each.save_dir, each.name, each.file_name), []).append(each)
    alone = [group[0] for group in groups.values()]  # two of one kind would share a file
    for each in alone:
        same = (each.save_dir, each.name)
        each._beside = tuple(o for o in alone if o is not each and (o.save_dir, o.name) == same)


def plain_name(folder: str) -> str:
    """The name of a folder that a checkpoint kept, without a way to it; "" where it is none."""
    name = Path(folder).name  # earlier versions kept the way to it
    return "" if name == ".." else name


def size_of(path: Path) -> Optional[int]:
    """The bytes in the file ``path``, or None where there is none."""
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:
        return None


def _is_same(folder: Path, other: Path) -> bool:
    """True where both are one folder, whatever the way to it."""
    try:
        return folder.samefile(other)
    except OSError:
        return False


def number_of(name: str, value: Any) -> float:
    """``value`` of the metric ``name`` as a number.

    Raises :class:`ConfigurationError` where it is none.
    """
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"log_metrics got {name!r} as a {type(value).__name__}: give a number."
        ) from None
