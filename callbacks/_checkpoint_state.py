"""What a checkpoint keeps of a ModelCheckpoint, checked, and the files that it speaks of, found."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

import attrs

from ofengine.callbacks._checkpoint_files import CheckpointFiles, step_in
from ofengine.callbacks._scores import oldest_first
from ofengine.checkpoint import metadata_of
from ofengine.checkpoint.checks import (
    by_name,
    check_fits,
    flag,
    listed,
    maybe,
    number,
    record,
    text,
    whole,
)
from ofengine.errors import warn

_NEEDED = {
    "best_model_path": text,
    "best_model_score": maybe(number()),
    "best_k_models": by_name(number()),
    "last_model_path": text,
    "looked_at": whole(-1),
    "last_saved_at": whole(-1),
    "wait_for_epoch_end": flag,
    "written": listed(text),
    "to_remove": text,
}
_LATER = {"validated": flag, "key": text, "itself": text}
"""What earlier versions did not keep."""


def check_state(state: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` where ``state`` is none of a ModelCheckpoint.

    What a subclass keeps besides is the subclass's to check.
    """
    own = {key: state[key] for key in (*_NEEDED, *_LATER) if key in state}
    where = "the checkpoint's state of a ModelCheckpoint"
    check_fits(own, record(_NEEDED, _LATER), where)


@attrs.define
class Kept:
    """The files that a run had kept before it was resumed, by their paths of now.

    Attributes:
        best: of these the best, without a metric the newest; "" for none.
        scored: those kept for their metric, with it; without one, for their optimizer step.
        last: the one of ``save_last``; "" for none.
        to_remove: the one whose removal was interrupted; "" for none.
    """

    best: str
    scored: Dict[str, float]
    last: str
    to_remove: str

    @classmethod
    def of(
        cls,
        state: Mapping[str, Any],
        files: CheckpointFiles,
        resumed_from: Optional[Path],
        patterns: Iterable[str],
        step: int,
    ) -> Kept:
        """Find the files of a checked ``state``; ``files`` learns which of them are to stay.

        Args:
            state: from a checkpoint.
            files: of the callback, with the run's id.
            resumed_from: the checkpoint.
            patterns: where files of the callback may lie below its folder.
            step: the optimizer steps that the run had done.

        Warns where some of ``scored`` are not there.
        """
        scores, itself = state["best_k_models"], state.get("itself")
        single = [state[name] for name in ("best_model_path", "last_model_path", "to_remove")]
        paths = {name: files.find(name, resumed_from) for name in {*state["written"], *scores}}
        paths.update((name, files.find(name, resumed_from)) for name in single if name not in paths)
        if itself and resumed_from is not None and not _is_same(paths.get(itself), resumed_from):
            paths[itself] = str(resumed_from)  # whatever it is called now
            files.spared = None if files.is_called(resumed_from, itself) else resumed_from
        inside = [path for path in paths.values() if path and files.holds(Path(path))]
        files.adopted = {path for path in inside if "callback" not in metadata_of(path)}
        names = dict.fromkeys([*state["written"], *scores, state["last_model_path"]])
        written = [paths[name] for name in names if name and paths[name] in inside]
        files.kept = dict.fromkeys(written)
        lost = [name for name in scores if not paths[name]]
        if lost and files.has_later(patterns, step):
            # They went for files of a later moment, before the run was killed: as they will again.
            paths.update((name, files.place_of(name)) for name in lost)
            lost = []
        if lost:
            warn(
                f"{len(lost)} of the files that a ModelCheckpoint of the run had kept are neither "
                f"in {files.folder} nor beside the checkpoint, as {lost[0]!r}: they do not count "
                "any more."
            )
        best, last, to_remove = (paths[name] if name else "" for name in single)
        return cls(
            best=best,
            scored={paths[name]: float(score) for name, score in scores.items() if paths[name]},
            last=last,
            to_remove=to_remove if to_remove not in files.kept else "",
        )


def newest_of(kept: Kept, most: int) -> Tuple[Dict[str, float], List[str]]:
    """Without a metric: the newest ``most`` files with their steps, and those that are to go.

    The run may have kept another number of files before: one alone counts among those that are kept
    now; where all were kept, they stay.
    """
    steps = dict(kept.scored)
    if kept.best and most > 1:
        steps.setdefault(kept.best, float(step_in(Path(kept.best))))
    if most < 1:
        return {}, []
    by_age = oldest_first(steps)
    stay, go = by_age[-most:], [each for each in by_age[:-most] if each != kept.best]
    return {each: steps[each] for each in stay if most > 1}, go


def _is_same(path: Optional[str], other: Path) -> bool:
    """True where both are one file, whatever the way to it."""
    try:
        return bool(path) and other.samefile(str(path))
    except OSError:
        return False
