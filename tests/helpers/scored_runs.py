"""Short runs whose validation gives the scores that a test wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import oneflow as flow

from ofengine import Trainer

from .tasks import Scored
from .trainers import quiet_trainer

BATCHES = [flow.ones(3, 2)] * 2
"""An epoch of two steps."""
PRECIOUS = "precious"


class ScoredTask(Scored):
    """Logs ``scores[epoch]`` as ``val`` and its negative as ``neg`` at each validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.scores is not None:
            self.log("val", self.scores[self.current_epoch])
            self.log("neg", -self.scores[self.current_epoch])


def fit(
    callbacks: Any,
    epochs: int = 3,
    scores: Optional[Sequence[float]] = None,
    path: Any = None,
    **arguments: Any,
) -> Trainer:
    trainer = quiet_trainer(
        max_epochs=epochs, callbacks=callbacks, num_sanity_val_steps=0, **arguments
    )
    trainer.fit(ScoredTask(scores), BATCHES, None if scores is None else BATCHES, ckpt_path=path)
    return trainer


def tree(folder: Path) -> Dict[str, bytes]:
    """The content of each file below ``folder``, by its name from there."""
    files = [each for each in folder.rglob("*") if each.is_file() and not each.is_symlink()]
    return {str(each.relative_to(folder)): each.read_bytes() for each in files}
