"""OneFlow aborts a process that compiles too many graphs: the engine stops before that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oneflow as flow
import pytest
from helpers import assert_same_weights, fill_deterministically, quiet_trainer, run_python
from oneflow import nn

from ofengine import Callback, GraphModeError, TaskModule
from ofengine._oneflow import graphs as _graphs
from ofengine.callbacks import ModelCheckpoint


class Tiny(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        fill_deterministically(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1, momentum=0.9)


class SetsRates(Callback):
    """Another rate for every step, so that graph mode compiles for every step."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.set_lr("all", 0.1 / (1 + trainer.global_step))


def fit(folder: Path, **arguments: Any) -> TaskModule:
    callbacks = [SetsRates(), ModelCheckpoint(folder, every_n_epochs=9, save_on_exception=True)]
    task = Tiny()
    trainer = quiet_trainer(mode="graph", max_epochs=1, callbacks=callbacks)
    trainer.fit(task, [flow.ones(4, 3) * n for n in range(1, 7)], **arguments)
    return task


def test_too_many_graphs_are_an_error_and_the_run_can_go_on_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(tmp_path / "whole")
    with monkeypatch.context() as context:
        context.setattr(_graphs, "MOST_GRAPHS", _graphs.graphs_compiled() + 3)
        with pytest.raises(GraphModeError, match="go on in a new one, from a checkpoint"):
            fit(tmp_path / "run")
    resumed = fit(tmp_path / "run", ckpt_path="last")
    assert_same_weights(resumed, whole)


def test_graphs_of_others_count_and_traces_do_not() -> None:
    _count_of_a_fit()  # up to date: other tests have compiled since
    fit_count = _count_of_a_fit()
    layer = nn.Linear(3, 2)

    class Own(nn.Graph):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def build(self, x: Any) -> Any:
            return self.layer(x)

    for _ in range(2):
        Own()(flow.ones(1, 3))
    assert _count_of_a_fit() == fit_count + 2
    assert _count_of_a_fit() == fit_count


def _count_of_a_fit() -> int:
    before = _graphs.graphs_compiled()
    quiet_trainer(mode="graph", max_epochs=1).fit(Dropping(), [flow.ones(4, 3)])
    return _graphs.graphs_compiled() - before


class Dropping(Tiny):
    """Has a dropout layer, whose masks a compiled step is given."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(self.dropout(batch)).square().mean()


SCRIPT = """
import sys
import oneflow as flow
from oneflow import nn

from ofengine._oneflow.launch_race import mend_launch_race

mend_launch_race()  # or the many short graphs may wait for each other for ever


class Own(nn.Graph):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.add_optimizer(flow.optim.SGD(layer.parameters(), lr=0.1))

    def build(self, x):
        loss = self.layer(x).sum()
        loss.backward()
        return loss


for number in range(1, int(sys.argv[1]) + 1):
    Own(nn.Linear(3, 2))(flow.ones(1, 3)).numpy()
    print(number, flush=True)
"""


@pytest.mark.slow
def test_the_limit_is_where_the_engine_believes_it_to_be() -> None:
    done = run_python("-c", SCRIPT, 1_400, timeout=500)
    assert done.returncode != 0
    assert "stream_index <= kMaxStreamIndex" in done.stderr, done.stderr[-2000:]
    assert _graphs.MOST_GRAPHS + 20 <= int(done.stdout.split()[-1]) < 1_400
