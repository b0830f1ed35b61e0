"""``loss.backward()`` left in ``training_step``: one sentence in both modes."""

from __future__ import annotations

from typing import Any

import oneflow as flow
import pytest
from helpers import Bare, Line, quiet_trainer

from ofengine import ConfigurationError, GraphModeError

DATA = [flow.ones(2, 2)] * 2


class OwnBackward(Line):
    """As a loop without a Trainer has it."""

    retain = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = (self.layer(batch) ** 2).mean()
        loss.backward(retain_graph=self.retain)
        return loss


class OwnUpdate(OwnBackward):
    """With the optimizer's part as well."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def test_it_is_told_that_the_trainer_calls_backward(mode: str) -> None:
    said = r"the Trainer calls backward, so leave (it|loss\.backward\(\)) out"
    error = ConfigurationError if mode == "eager" else GraphModeError
    with pytest.raises(error, match=said) as caught:
        quiet_trainer(mode=mode, max_epochs=1).fit(OwnBackward(), DATA)
    assert "\n" not in str(caught.value)


def test_a_graph_says_so_of_a_graph_that_is_retained_and_of_an_own_update() -> None:
    task = OwnBackward()
    task.retain = True
    with pytest.raises(GraphModeError, match=r"calls backward\(\) itself: the Trainer calls back"):
        quiet_trainer(mode="graph", max_epochs=1).fit(task, DATA)
    with pytest.raises(GraphModeError, match=r"trainer.optimizer cannot be used inside a compiled"):
        quiet_trainer(mode="graph", max_epochs=1).fit(OwnUpdate(), DATA)


def test_what_is_kept_from_one_batch_for_the_next_is_told_to_be_detached() -> None:
    class Recurrent(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.state = flow.zeros(1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.state = (self.layer(batch).mean() + self.state) ** 2
            return self.state

    with pytest.raises(ConfigurationError, match=r"detach\(\) what is kept from one batch"):
        quiet_trainer(max_epochs=1).fit(Recurrent(), DATA)
