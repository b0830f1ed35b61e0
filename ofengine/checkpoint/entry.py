"""Where a resumed run goes on within an epoch."""

from __future__ import annotations

from typing import Any, Dict, Optional

import attrs
import numpy as np
import oneflow as flow

from ofengine.data.steps import Resumption
from ofengine.run.state import Run, State


@attrs.define
class Entry:
    """How a resumed run enters the epoch that it was stopped in."""

    data: Optional[Resumption]
    state: State

    def restore_step_state(self, run: Run) -> None:
        """What the loop has in its hands in the middle of an epoch."""
        run.weighing.load(self.state.get("weights"), next(run.task.parameters()))
        run.training_mode.load_gradients(tensors_of(run, self.state["gradients"]))


def tensors_of(run: Run, arrays: Dict[str, np.ndarray]) -> Dict[str, Any]:
    """``arrays`` as tensors on the device of ``run``."""
    return {name: flow.tensor(array).to(run.settings.device) for name, array in arrays.items()}
