"""What a task keeps in a checkpoint by its own hooks, and how it is handed back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Union

from ofengine.checkpoint.file import Checkpoint, read
from ofengine.checkpoint.weights import check_weights, copy_weights, pytorch_weights
from ofengine.errors import CheckpointError, ConfigurationError, OFEngineError, said_by
from ofengine.run.lightning_methods import CHECKPOINT_KEYS


class OfTask(Dict[str, Any]):
    """The dict that the hooks of a task are handed: what the task puts into it, and no more.

    Raises :class:`ConfigurationError` where they ask for what Lightning's has besides.
    """

    def __missing__(self, key: str) -> Any:
        """``self[key]`` of what is not there."""
        self._tell(key)
        raise KeyError(key)

    def __delitem__(self, key: str) -> None:
        """As of a dict."""
        self._tell(key)
        super().__delitem__(key)

    def get(self, key: str, *default: Any) -> Any:
        """As of a dict."""
        self._tell(key)
        return super().get(key, *default)

    def pop(self, key: str, *default: Any) -> Any:
        """As of a dict."""
        self._tell(key)
        return super().pop(key, *default)

    def _tell(self, key: Any) -> None:
        if key in CHECKPOINT_KEYS and key not in self:
            raise ConfigurationError(
                f'checkpoint["{key}"] is Lightning\'s, and a task has only what its own '
                f"on_save_checkpoint puts there: {CHECKPOINT_KEYS[key]}."
            )


def kept_by(task: Any) -> Dict[str, Any]:
    """What ``on_save_checkpoint`` of ``task`` wants to be kept."""
    kept = OfTask()
    task.on_save_checkpoint(kept)
    return dict(kept)


def hand_back(task: Any, kept: Mapping[str, Any]) -> None:
    """Call ``on_load_checkpoint`` of ``task`` with what it ``kept``."""
    task.on_load_checkpoint(OfTask(kept))


def load_checkpoint(task: Any, path: Union[str, Path]) -> None:
    """The file at ``path`` into ``task``: what its hook kept, then the weights, all or none.

    A file of weights alone, PyTorch's too, has nothing for the hook, which is not called. Raises
    :class:`CheckpointError` where the file is missing, damaged or of another model.
    """
    arrays = pytorch_weights(path)
    if arrays is None:
        take_checkpoint(task, read(path))
    else:
        check_weights(task, arrays, str(path))
        copy_weights(task, arrays)


def take_checkpoint(task: Any, checkpoint: Checkpoint) -> None:
    """As :func:`load_checkpoint`, of a file that was read."""
    _take_own(task, checkpoint.state, str(checkpoint.path))
    check_weights(task, checkpoint.weights, str(checkpoint.path))
    copy_weights(task, checkpoint.weights)


def _take_own(task: Any, state: Optional[Mapping[str, Any]], where: str) -> None:
    """Call the hook first: it may make the layers that the weights are for."""
    if state is None:
        return
    try:
        hand_back(task, state.get("task", {}))
    except OFEngineError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{where} was not loaded: {type(task).__name__}.on_load_checkpoint raised "
            f"{said_by(error)}."
        ) from error
