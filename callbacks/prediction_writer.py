"""PredictionWriter: what predict_step returns, in files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import numpy as np
import oneflow as flow

from ofengine.callback import Callback
from ofengine.disk import claim_version, give_name, temporary_file, why_no_path
from ofengine.errors import ConfigurationError
from ofengine.run.arguments import check_choice
from ofengine.run.view import RunView
from ofengine.task import TaskModule

_Batches = List[Tuple[int, Dict[str, np.ndarray]]]
"""The number and the arrays of each."""
_AT_ONCE = 64
"""So many batches a rank gives at once."""
_ALONE = "predictions"
"""What the array is called where a prediction is a single one."""


class PredictionWriter(Callback):
    """Writes what ``predict_step`` returns to ``.npz`` files, which ``numpy.load`` reads.

    A prediction is a tensor, array, number or text, or nested dicts, lists and tuples of these: a
    file has an array for each, called by its keys and indices, as in ``"scores"`` or ``"boxes.0"``;
    one alone is called ``"predictions"``. Nothing in a file is executed when it is read.

    Each ``predict`` writes to a new folder, ``<output_dir>/version_<n>``, whose path is ``folder``
    then. A file is there whole or not at all, and no file of another run is written over. With
    ``predict(..., return_predictions=False)`` no prediction stays in memory.

    On several ranks the files are those of one process: rank 0 writes those of dataloaders, and
    each rank those of its own batches, which on several hosts lie on the disk of each.

    Args:
        output_dir: the folder of all predictions. Default: ``predictions`` in the Trainer's
            ``default_root_dir``.
        write_interval: "epoch" for one file of each dataloader, ``loader_<i>.npz``, whose arrays
            have the predictions of all batches one after the other; "batch" for one of each batch,
            ``loader_<i>/batch_<number>.npz``, which keeps none in memory.

    Raises:
        ConfigurationError: an argument is wrong; in ``predict``, where a prediction holds something
            else or a file cannot be written.
    """

    def __init__(
        self, output_dir: Union[str, Path, None] = None, write_interval: str = "epoch"
    ) -> None:
        self.write_interval = check_choice(
            "PredictionWriter(write_interval)", write_interval, ("batch", "epoch")
        )
        problem = None if output_dir is None else why_no_path(output_dir)
        if problem is not None:
            raise ConfigurationError(f"PredictionWriter(output_dir=...): the path {problem}.")
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.folder: Optional[Path] = None
        """Where the last ``predict`` has written."""
        self._kept: Dict[int, _Batches] = {}

    def on_predict_start(self, trainer: RunView, task: TaskModule) -> None:
        """Claim a folder, the same for all ranks."""
        self._kept = {}
        root = self.output_dir or Path(trainer.default_root_dir) / "predictions"
        claimed, problem = "", ""
        if trainer.is_global_zero:
            try:
                claimed = str(claim_version(root))
            except OSError as error:
                problem = str(_unwritable(root, error))
        claimed, problem = trainer.gather([claimed, problem])[0]
        if problem:
            raise ConfigurationError(problem)
        self.folder = Path(claimed)

    def on_predict_batch_end(
        self,
        trainer: RunView,
        task: TaskModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the batch's, or keep them for the end."""
        arrays: Dict[str, np.ndarray] = {}
        _collect(outputs, "", arrays)
        if not arrays:
            return
        number = batch_idx * trainer.world_size + trainer.global_rank  # among those of all ranks
        if self.write_interval == "batch":
            self._write(f"loader_{dataloader_idx}/batch_{number:06d}.npz", arrays)
        else:
            self._kept.setdefault(dataloader_idx, []).append((number, arrays))

    def on_predict_epoch_end(self, trainer: RunView, task: TaskModule) -> None:
        """Write what was kept."""
        for number in sorted(set().union(*trainer.gather(list(self._kept)))):
            kept = _of_all(trainer, self._kept.get(number, []))
            if not trainer.is_global_zero:
                continue
            batches = [arrays for _, arrays in kept]
            names = list(batches[0])
            if any(list(each) != names for each in batches):
                raise ConfigurationError(
                    "PredictionWriter: batches have predictions of other names: return the same "
                    'keys for each, or use write_interval="batch".'
                )
            joined = {name: _join(name, [each[name] for each in batches]) for name in names}
            self._write(f"loader_{number}.npz", joined)
        self._kept = {}

    def _write(self, name: str, arrays: Dict[str, np.ndarray]) -> None:
        path = (self.folder or Path()) / name
        try:
            with temporary_file(path.parent) as (file, temporary):
                np.savez(file, **arrays)
                file.flush()
                give_name(temporary, path)
        except OSError as error:
            raise _unwritable(path, error) from error


def _of_all(trainer: RunView, own: _Batches) -> _Batches:
    """The batches of all ranks in their order, on rank 0."""
    kept: _Batches = []
    for start in range(0, max(trainer.gather(len(own))), _AT_ONCE):
        said = trainer.gather(own[start : start + _AT_ONCE])
        if trainer.is_global_zero:
            kept += itertools.chain.from_iterable(said)
    return sorted(kept, key=lambda each: each[0])


def _unwritable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"PredictionWriter cannot write {path}: {error.strerror or error}. Give an output_dir that "
        "can be written to."
    )


def _collect(value: Any, name: str, arrays: Dict[str, np.ndarray]) -> None:
    """Put every array in ``value`` under its name into ``arrays``."""
    if value is None:
        return
    if isinstance(value, dict):
        children = [(str(key), each) for key, each in value.items()]
    elif isinstance(value, (list, tuple)):
        children = [(str(number), each) for number, each in enumerate(value)]
    else:
        array = value.numpy() if isinstance(value, flow.Tensor) else np.asarray(value)
        if array.dtype == object or array.dtype.hasobject:
            raise ConfigurationError(
                f"PredictionWriter: predict_step returned a {type(value).__name__}, which no file "
                "of arrays can hold: return tensors, numbers and texts in dicts, lists and tuples."
            )
        key = name or _ALONE
        if key in arrays:
            raise ConfigurationError(
                f"PredictionWriter: two predictions are called {key!r}: name them otherwise."
            )
        arrays[key] = array
        return
    for key, each in children:
        safe = key.replace("/", "_").replace("\\", "_").replace("\0", "_")
        _collect(each, f"{name}.{safe}" if name else safe, arrays)


def _join(name: str, parts: List[np.ndarray]) -> np.ndarray:
    try:
        return np.concatenate(parts) if parts[0].ndim else np.stack(parts)
    except ValueError as error:
        raise ConfigurationError(
            f"PredictionWriter: the batches' {name!r} cannot be put one after the other ({error}): "
            'use write_interval="batch".'
        ) from error
