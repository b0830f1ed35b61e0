"""How one ModelCheckpoint's files get onto the disk: at once, or while training goes on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from ofengine.callbacks._checkpoint_files import CheckpointFiles
from ofengine.checkpoint import encode, read
from ofengine.checkpoint.background import BackgroundWriter
from ofengine.checkpoint.weights import check_weights, copy_weights
from ofengine.errors import warn
from ofengine.run.view import Content, RunView
from ofengine.task import TaskModule

log = logging.getLogger("ofengine")


class Saver:
    """Writes one file after the other, and removes those that they replace.

    Args:
        in_background: in a thread; at most one file is being written at a time.
    """

    def __init__(self, in_background: bool) -> None:
        self._writer: Optional[BackgroundWriter] = BackgroundWriter() if in_background else None
        self._renamed: List[Tuple[str, str]] = []

    def save(
        self, files: CheckpointFiles, wanted: Path, path: str, out: str, content: Content
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


def restore(trainer: RunView, task: TaskModule, path: str) -> None:
    """Load the weights of ``path`` into ``task``, unless they are not finite."""
    weights = read(path).weights
    broken = trainer.not_finite((weights, None, {}))  # a file of an earlier version
    if broken is not None:
        warn(f"the best weights, in {path}, are not loaded: {broken}.")
        return
    check_weights(task, weights, path)
    trainer.settle()
    own = {**dict(task.named_buffers()), **dict(task.named_parameters())}
    trainer.set_weights_aside({n: each.detach().clone() for n, each in own.items()}, for_good=True)
    copy_weights(task, weights)
    log.info("the best weights are back, from %s.", path)


class NotFinite(Exception):
    """What is to be saved is not finite; the text says what."""


def content_to_keep(trainer: RunView) -> Content:
    """The content of a checkpoint of now. Raises :class:`NotFinite` where it should not be kept."""
    content = trainer.checkpoint_content()
    broken = trainer.not_finite(content)
    if broken is not None:
        raise NotFinite(broken)
    return content


def warn_of_refusal(trainer: RunView, broken: str, kept: List[str]) -> None:
    """Say that the moment at hand is not saved, and which of the files ``kept`` is the newest."""
    stays = f", and {kept[-1]} stays" if kept else ""
    warn(
        f"ModelCheckpoint saves nothing of epoch {trainer.current_epoch}, step "
        f"{trainer.global_step}{stays}: {broken}. So it goes with every such moment."
    )


def tell_of_last(trainer: RunView, path: str, is_saved: Optional[bool], kept: List[str]) -> None:
    """Say where a run that ends before its time goes on; ``kept`` are its files.

    ``is_saved`` is None where the moment at hand is not one that can be saved.
    """
    stays = f"{kept[-1] if kept else 'no file'} stays"
    at = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
    if is_saved:
        text = f"saved {path} ({at})"
    elif is_saved is not None:
        text = f"saved nothing of what is not finite; {stays}"
    elif trainer.batches_seen and not trainer.resumes_within_epoch:
        text = f"saved nothing of {at}, of which something was not done; {stays}"
    else:
        return  # nothing was trained, or nothing since the file that the run goes on from
    log.info('%s: fit(..., ckpt_path="last") goes on from there.', text)
