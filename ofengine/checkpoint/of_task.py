"""What a task keeps in a checkpoint by its own hooks, and how it is handed back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Union

from ofengine.checkpoint.file import Checkpoint, read
from ofengine.checkpoint.weights import check_weights, copy_weights, pytorch_weights
from ofengine.errors import CheckpointError, OFEngineError, said_by


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
    _hand_back(task, checkpoint.state, str(checkpoint.path))
    check_weights(task, checkpoint.weights, str(checkpoint.path))
    copy_weights(task, checkpoint.weights)


def _hand_back(task: Any, state: Optional[Mapping[str, Any]], where: str) -> None:
    """Call the hook first: it may make the layers that the weights are for."""
    if state is None:
        return
    kept: Dict[str, Any] = state.get("task", {})
    try:
        task.on_load_checkpoint(kept)
    except OFEngineError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{where} was not loaded: {type(task).__name__}.on_load_checkpoint raised "
            f"{said_by(error)}."
        ) from error
