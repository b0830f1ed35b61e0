"""A process that makes many fits keeps nothing of those before, and hundreds of names are few."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any, Dict, List

import oneflow as flow
import pytest
from helpers import random_rows
from oneflow import nn

from ofengine import Callback, TaskModule, Trainer
from ofengine.callbacks import EMAWeightAveraging
from ofengine.modes.compiled import Compiled


class Batch(Dict[str, Any]):
    """One that a weak reference can tell of."""


class Net(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop = nn.Linear(4, 8), nn.Dropout(0.5)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 1)
        self.table: Dict[str, float] = {"scale": 2.0}  # looked at before each run of a graph

    def forward(self, batch: Any) -> Any:
        return self.head(self.drop(self.norm(self.body(batch["x"]) * self.table["scale"])))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self(batch).square().mean()
        self.log("again", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self(batch).square().mean())

    def configure_optimizers(self) -> Any:
        return flow.optim.Adam(self.param_groups(), lr=1e-3)


class Fails(Callback):
    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        raise ZeroDivisionError("on purpose")


def refer_to(trainer: Trainer, task: Any, batches: List[Any]) -> Dict[str, Any]:
    """Weak references to what a fit is made of."""
    run = trainer._run
    made = {
        "trainer": trainer, "task": task, "layer": task.body, "run": run, "mode": run.mode,
        "optimizer": trainer.optimizer, "plan": run.plan, "metrics": run.metrics,
        "logger": trainer.logger, "batch": batches[0],
    }  # fmt: skip
    return {name: weakref.ref(each) for name, each in made.items()}


@pytest.mark.parametrize(
    "ends",
    ["well", "with an error", pytest.param("with graphs for accumulation", marks=pytest.mark.slow)],
)
def test_nothing_of_an_earlier_fit_is_kept(
    mode: str, ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: List[Any] = []
    made = Compiled.__init__

    def noting(compiled: Any, graph: Any, *args: Any, **kwargs: Any) -> None:
        made(compiled, graph, *args, **kwargs)
        graphs.append(weakref.ref(graph))

    monkeypatch.setattr(Compiled, "__init__", noting)

    def fit(task: Any) -> Dict[str, Any]:
        batches = [Batch(x=x) for x in random_rows([3, 3, 2], 4)]
        trainer = Trainer(
            mode=mode, device="cpu", max_epochs=1, default_root_dir=tmp_path,
            callbacks=[EMAWeightAveraging(decay=0.9), *([Fails()] if "error" in ends else [])],
            accumulate_grad_batches=2 if "accumulation" in ends else 1,
        )  # fmt: skip
        try:
            trainer.fit(task, batches, batches[:1])
        except ZeroDivisionError:
            assert "error" in ends
        return refer_to(trainer, task, batches)

    fits = [fit(Net()), fit(Net())]
    task = Net()
    again = [fit(task), fit(task)]
    assert all(each() is None for each in graphs), "a graph outlives its fit"
    assert len(graphs) == 0 if mode == "eager" else len(graphs) > 8
    gc.collect()
    assert {name for each in fits for name, ref in each.items() if ref() is not None} == set()
    first, last = again
    assert {name for name, ref in first.items() if ref() is not None} == {"task", "layer"}
    del task
    gc.collect()
    assert {name for name, ref in last.items() if ref() is not None} == set()


class LogsMany(Net):
    def __init__(self, names: int) -> None:
        super().__init__()
        self.names = names

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self(batch).square().mean()
        rows = self(batch).sum(0)
        for number in range(self.names):
            self.log(f"metric{number}", loss * float(number))
            self.log(f"count{number}", (rows > number).sum())
        return loss


@pytest.mark.parametrize("names", [1, 40])
def test_a_compiled_step_puts_out_one_tensor_for_all_that_it_logs(
    names: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: List[int] = []
    made = Compiled.__init__

    class Looks(Callback):
        def on_train_end(self, trainer: Any, task: Any) -> None:
            outputs.extend(len(each()._outputs_tensor_tuple) for each in graphs)

    graphs: List[Any] = []

    def noting(compiled: Any, graph: Any, *args: Any, **kwargs: Any) -> None:
        made(compiled, graph, *args, **kwargs)
        graphs.append(weakref.ref(graph))

    monkeypatch.setattr(Compiled, "__init__", noting)
    trainer = Trainer(
        mode="graph", device="cpu", max_epochs=1, default_root_dir=tmp_path, callbacks=Looks()
    )
    trainer.fit(LogsMany(names), [Batch(x=x) for x in random_rows([3, 3], 4)])
    assert outputs == [3]  # the loss; the numbers of two types


def test_both_modes_log_the_same_rows_in_the_same_order(tmp_path: Path) -> None:
    tables = []
    for mode in ("eager", "graph"):
        task = LogsMany(3)
        for index, parameter in enumerate(task.parameters()):
            flow.nn.init.constant_(parameter, 0.1 * (index + 1))
        trainer = Trainer(
            mode=mode, device="cpu", max_epochs=1, default_root_dir=tmp_path / mode, seed=1,
            log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(task, [Batch(x=x) for x in random_rows([3, 2, 3], 4)])
        tables.append(Path(trainer.log_dir or "", "metrics.csv").read_text())
    assert tables[0] == tables[1]
    names = [f"{kind}{number}" for number in range(3) for kind in ("metric", "count")]
    assert tables[0].splitlines()[0].split(",") == ["epoch", "step", "loss", *names]
