"""How often a run compiles: one graph for each kind of step and shape of batch, traced once."""

from __future__ import annotations

import logging
from typing import Any, Callable, List

import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn

from ofengine import TaskModule

log = logging.getLogger("traces")
Traced = Callable[[], List[str]]
FULL, LAST = flow.ones(4, 2), flow.ones(3, 2)


class Drawing(TaskModule):
    """Draws, counts, logs and has batch norm; tells each time that its Python runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 1)
        )
        self.register_buffer("steps", flow.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        log.info("training_step")
        self.steps.add_(1)
        loss = self.layers(batch).pow(2).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        log.info("validation_step")
        self.log("val_loss", self.layers(batch).pow(2).mean())


@pytest.fixture()
def compiled(monkeypatch: pytest.MonkeyPatch) -> List[int]:
    """A 1 for each graph that OneFlow compiles, whoever asks for it."""
    compile_graph = nn.Graph.finish_complie_and_init_runtime
    seen: List[int] = []

    def counting(graph: nn.Graph) -> None:
        seen.append(1)
        compile_graph(graph)

    monkeypatch.setattr(nn.Graph, "finish_complie_and_init_runtime", counting)
    return seen


@pytest.fixture()
def traced(caplog: pytest.LogCaptureFixture) -> Traced:
    """Gives the steps whose Python ran so far, in order."""
    caplog.set_level(logging.INFO, logger=log.name)
    return lambda: [each.message for each in caplog.records if each.name == log.name]


def test_each_kind_of_batch_is_traced_and_compiled_once(
    compiled: List[int], traced: Traced
) -> None:
    """Two epochs with a smaller last batch, validated with a smaller last one after each."""
    task = Drawing()
    trainer = quiet_trainer(mode="graph", max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(task, [FULL, FULL, LAST], [FULL, FULL, LAST])
    assert sorted(traced()) == ["training_step"] * 2 + ["validation_step"] * 2
    assert len(compiled) == 4


def test_a_second_fit_compiles_one_graph_at_most(compiled: List[int], traced: Traced) -> None:
    """So do a validation and a test between fits, each of its own."""
    task = Drawing()
    trainer = quiet_trainer(mode="graph", max_epochs=1)
    trainer.fit(task, [FULL, FULL])
    counts = [len(compiled)]
    trainer.validate(task, [FULL, FULL])
    counts.append(len(compiled))
    quiet_trainer(mode="graph", max_epochs=1).fit(task, [FULL, FULL])
    counts.append(len(compiled))
    assert [b - a for a, b in zip([0, *counts], counts)] == [1, 1, 1]
    assert traced() == ["training_step", "validation_step", "training_step"]


def test_an_accumulated_window_compiles_its_gradients_and_its_update_once(
    compiled: List[int], traced: Traced
) -> None:
    """Windows of two and, at the end of the epoch, of one batch."""
    task = Drawing()
    trainer = quiet_trainer(mode="graph", max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(task, [FULL] * 5)
    assert traced() == ["training_step"]
    assert len(compiled) == 2
