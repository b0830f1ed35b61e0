"""How one ModelCheckpoint's files get onto the disk: at once, or while training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from ofengine.callbacks._checkpoint_files import CheckpointFiles
from ofengine.checkpoint import encode
from ofengine.checkpoint.background import BackgroundWriter


class Saver:
    """Writes one file after the other, and removes those that they replace.

    Args:
        in_background: in a thread; at most one file is being written at a time.
    """

    def __init__(self, in_background: bool) -> None:
        self._writer: Optional[BackgroundWriter] = BackgroundWriter() if in_background else None
        self._renamed: List[Tuple[str, str]] = []

    def save(
        self, files: CheckpointFiles, wanted: Path, path: str, out: str, content: Tuple[Any, ...]
    ) -> None:
        """Write ``content`` to ``path``, which was chosen for ``wanted``, then remove ``out``.

        ``content`` is what ``trainer.checkpoint_content()`` gave. Raises :class:`CheckpointError`
        where it cannot be written, at the next call where that is in the background.
        """
        weights, state, metadata = content
        metadata = {**metadata, "callback": files.key}

        def work() -> None:
            written = files.write(wanted, encode(weights, state, metadata), (path, out))
            self._renamed.append((path, written))
            files.remove(out)

        if self._writer is None:
            work()
        else:
            self._writer.submit(work)

    def finish(self) -> Dict[str, str]:
        """Wait for what is being written; return what files are called that are not as chosen.

        That is so where another run's file has appeared there meanwhile.
        """
        if self._writer is not None:
            self._writer.wait()
        renamed = {path: written for path, written in self._renamed if path != written}
        self._renamed.clear()
        return renamed

    def close(self) -> None:
        """Wait, and end the thread."""
        if self._writer is not None:
            self._writer.close()
