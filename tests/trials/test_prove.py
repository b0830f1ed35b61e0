"""The proof tells equal from different to the bit, says where it comes from, leaves no trace."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import numpy as np
import oneflow as flow
import pytest
from helpers import (
    OfUnknownLength,
    bits,
    fill_deterministically,
    image_batches,
    quiet_trainer,
)
from helpers.resuming import some_slow
from oneflow import nn
from oneflow.utils.data import DataLoader, TensorDataset

from ofengine import Callback, ConfigurationError, DataError, TaskModule
from ofengine.callbacks import LRDecayCallback
from ofengine.cli import main
from ofengine.trials.proof import Report, Row


class Net(TaskModule):
    """A batch norm and a dropout between two layers; a subclass cheats."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.drop, self.last = nn.Dropout(0.25), nn.Linear(6, 5)
        self.seen = 0
        fill_deterministically(self, spread=0.3)

    def forward(self, x: Any) -> Any:
        return self.last(self.drop(self.norm(self.first(x)).relu()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("twice", loss * 2)
        return loss

    def param_groups(self) -> Any:
        head = list(self.last.parameters())
        rest = [*self.first.parameters(), *self.norm.parameters()]
        return [{"params": rest, "lr_scale": 0.5, "lr_decay_scale": 0.9}, {"params": head}]

    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.param_groups(), lr=0.1, momentum=0.9)
        cosine = flow.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return {"optimizer": optimizer, "lr_scheduler": cosine}

    def train_dataloader(self) -> Any:
        return image_batches([4, 4, 4], (4,))


class Scaling(nn.Linear):
    """Computes otherwise in a graph, by a power of two, so that all of it is seen."""

    def forward(self, x: Any) -> Any:
        out = super().forward(x)
        return out * 2 if out.is_lazy else out


class ModuleCheats(Net):
    """One of its modules is another in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.last = Scaling(6, 5)
        fill_deterministically(self, spread=0.3)


class LossCheats(Net):
    """The step itself is another in a graph."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * 2 if loss.is_lazy else loss


class LogCheats(Net):
    """Only what is logged is another in a graph."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("odd", loss * 2 if loss.is_lazy else loss)
        return loss


class Forgets(Net):
    """Its loss depends on a number that no checkpoint holds."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (1 + self.seen)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 2:
            self.seen = 1


class Unseeded(Net):
    """Draws from what no seed reaches."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        with flow.no_grad():
            self.first.weight.add_(int.from_bytes(os.urandom(2), "little") * 1e-7)


class ReadsValues(Net):
    """No graph can be made of it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if float(loss) > -1 else loss * 2


def proved(task: Net, loader: Any = None, steps: int = 6, **arguments: Any) -> Report:
    return quiet_trainer(max_epochs=1, **arguments).prove(task, loader, steps=steps)


def rows_of(report: Report) -> Dict[str, Row]:
    assert all(len(line) <= 80 for line in str(report).splitlines())
    return {row.name: row for row in report.rows}


def test_a_task_that_is_the_same_everywhere() -> None:
    """Dropout, shuffling and no seed; schedule, scales and decay; batches of two sizes."""
    samples = TensorDataset(flow.randn(22, 4), flow.tensor(np.arange(22) % 5))
    loader = DataLoader(samples, batch_size=4, shuffle=True)
    report = proved(Net(), loader, steps=8, callbacks=[LRDecayCallback(2)])
    assert report.equal, report
    assert [(row.against, row.steps) for row in report.rows] == [
        ("eager", 8), ("eager", 4), ("graph", 4), ("eager", 4), ("graph", 4),
    ]  # fmt: skip
    assert str(report).endswith("Every bit is the same.")


def test_a_module_that_computes_otherwise_is_named() -> None:
    row = rows_of(proved(ModuleCheats()))["graph"]
    assert row.first == {"data": None, "loss": 1, "weights": 1, "metrics": 1, "rates": None}
    assert row.difference is not None
    assert row.difference.step == 1
    assert "The first output that differs is that of last (Scaling)." in str(row.difference)


def test_the_parameter_and_its_distance_are_right() -> None:
    """One step of plain SGD over a doubled loss moves each weight twice as far."""

    class Plain(LossCheats):
        def configure_optimizers(self) -> Any:
            return flow.optim.SGD(self.param_groups(), lr=0.1)

    task = Plain()
    task.drop.p = 0.0
    before = {name: p.numpy().copy() for name, p in task.named_parameters()}
    row = rows_of(proved(task, steps=2))["graph"]
    by_hand = Plain()
    by_hand.drop.p = 0.0
    loss = nn.functional.cross_entropy(by_hand(task.train_dataloader()[0][0]), batch_labels(task))
    loss.backward()
    moved = {
        name: 0.1 * (1.0 if name.startswith("last") else 0.5) * np.abs(p.grad.numpy()).max()
        for name, p in by_hand.named_parameters()
    }
    worst = max(moved, key=lambda name: moved[name])
    assert row.difference is not None
    assert row.difference.parameter == worst
    np.testing.assert_allclose(row.difference.distance, moved[worst], rtol=1e-4)
    assert "training_step itself computes another loss" in row.difference.origin
    assert before.keys() == moved.keys()


def batch_labels(task: Net) -> Any:
    return task.train_dataloader()[0][1]


class UpdateCheats(Net):
    """Only its gradients are others in a graph."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        total = self.first.weight.sum()
        return loss + (total - total.detach()) if loss.is_lazy else loss


@pytest.mark.parametrize("settings", some_slow([{}, {"min_steps": 6}, {"min_epochs": 1}], {}))
def test_an_update_that_is_another_is_told_whatever_has_to_be_trained(settings: Any) -> None:
    difference = rows_of(proved(UpdateCheats(), **settings))["graph"].difference
    assert difference is not None
    assert (difference.step, difference.parameter) == (1, "first.weight")
    assert "computes another loss" not in difference.origin
    assert "it comes from the backward pass" in difference.origin


@pytest.mark.slow
def test_layers_that_compute_faster_are_no_difference() -> None:
    class Fast(LossCheats):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU())

    difference = rows_of(proved(Fast(), steps=2, cpu_speedups=True))["graph"].difference
    assert difference is not None
    assert "training_step itself computes another loss" in difference.origin


def test_a_metric_that_is_logged_otherwise_is_named() -> None:
    row = rows_of(proved(LogCheats()))["graph"]
    assert row.first == {"data": None, "loss": None, "weights": None, "metrics": 1, "rates": None}
    assert row.difference is not None
    assert row.difference.parameter is None
    assert row.difference.origin.endswith("logged otherwise: odd.")


@pytest.mark.slow
def test_what_a_checkpoint_does_not_hold_is_named() -> None:
    rows = rows_of(proved(Forgets()))
    assert rows["graph"].equal
    for name in ("eager, resumed", "graph, resumed", "eager, then graph", "graph, then eager"):
        difference = rows[name].difference
        assert difference is not None
        assert difference.step == 4
        assert "self.seen (0, not 1)" in difference.origin


@pytest.mark.slow
def test_a_task_that_does_not_repeat_itself_is_told_so() -> None:
    report = proved(Unseeded())
    assert not report.equal
    assert all(row.difference is not None for row in report.rows)
    difference = rows_of(report)["graph"].difference
    assert difference is not None
    assert "what no seed reaches" in difference.origin


def test_what_graph_mode_refuses_is_a_row() -> None:
    rows = rows_of(proved(ReadsValues()))
    assert rows["graph"].error.startswith("GraphModeError: training_step reads a tensor's value")
    assert rows["eager, resumed"].equal
    assert not any(row.equal for name, row in rows.items() if name != "eager, resumed")


@pytest.mark.slow
def test_all_is_put_back(mode: str) -> None:
    """Weights, gradients, attributes, generators and the trainer itself; a fit is what it was."""

    def trained(prove: bool) -> Any:
        random.seed(3)
        np.random.seed(3)
        flow.manual_seed(3)
        task = Forgets()
        samples = TensorDataset(flow.randn(22, 4), flow.tensor(np.arange(22) % 5))
        loader = DataLoader(samples, 4, shuffle=True, generator=flow.Generator())
        trainer = quiet_trainer(max_epochs=2, mode=mode, seed=5)
        if prove:
            before, attributes = bits(task), sorted(vars(task))
            kinds = [type(module) for module in task.modules()]
            assert not trainer.prove(task, loader, steps=5).equal
            assert bits(task) == before
            assert sorted(vars(task)) == attributes
            assert [type(module) for module in task.modules()] == kinds
            assert task.seen == 0
            assert trainer.global_step == 0
        drawn = random.random(), np.random.rand(), flow.randn(2).numpy().tobytes()
        trainer.fit(task, loader)
        return drawn, bits(task)

    assert trained(prove=True) == trained(prove=False)


def test_an_optimizer_that_is_made_once_is_put_back() -> None:
    task = Net()
    optimizer = flow.optim.Adam(task.param_groups(), lr=0.01)
    task.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    report = proved(task)
    assert report.equal, report
    assert not optimizer.state_dict()["state"] or all(
        not np.any(each.numpy())
        for states in optimizer.state_dict()["state"].values()
        if isinstance(states, dict)
        for each in states.values()
        if isinstance(each, flow.Tensor)
    )


def test_callbacks_that_take_no_part_are_told() -> None:
    class Own(Callback):
        """One of a user's."""

    report = proved(Net(), callbacks=[Own(), LRDecayCallback(2)])
    assert report.left_out == ["Own"]
    assert "took no part: Own." in str(report)


@pytest.mark.slow
def test_data_of_unknown_length() -> None:
    assert proved(Net(), OfUnknownLength(image_batches([4, 4, 3], (4,)))).equal


@pytest.mark.parametrize("steps", [1, 0, True, 2.0, "many"])
def test_wrong_steps_are_refused(steps: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"prove\(steps=.*a whole number from 2 on"):
        proved(Net(), steps=steps)


def test_data_that_is_used_up_is_refused() -> None:
    with pytest.raises(DataError, match="gone through only once"):
        proved(Net(), iter(image_batches([4], (4,))))


SCRIPT = """
import oneflow as flow
from oneflow import nn
from ofengine import TaskModule


class Task(TaskModule):
    def __init__(self, cheats: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.cheats = cheats

    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch) ** 2).mean()
        return loss * 2 if self.cheats and loss.is_lazy else loss

    def train_dataloader(self):
        return [flow.ones(2, 2) * i for i in range(1, 5)]

    def configure_optimizers(self):
        return flow.optim.SGD(self.param_groups(), lr=0.01)
"""


@pytest.mark.parametrize("cheats", [False, True])
def test_the_command_line(cheats: bool, tmp_path: Path, capsys: Any) -> None:
    """The exit status says whether all is equal."""
    file = tmp_path / "task.py"
    file.write_text(SCRIPT)
    status = main(["prove", f"{file}:Task", "--steps", "4", "--device", "cpu",
                   "--arg", f"cheats={cheats}"])  # fmt: skip
    printed = capsys.readouterr().out
    assert status == int(cheats)
    assert ("Every bit is the same." in printed) is not cheats


def test_the_command_line_says_what_is_wrong(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "task.py"
    file.write_text(SCRIPT)
    assert main(["prove", f"{file}:Task", "--steps", "1", "--device", "cpu"]) == 1
    assert "ofengine prove: prove(steps=1): give a whole number" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("cheats", [False, True])
def test_the_command_line_starts_ranks(cheats: bool, tmp_path: Path) -> None:
    file = tmp_path / "task.py"
    script = SCRIPT.replace("loss.is_lazy", "self.trainer.world_size > 1")
    optimizer = "flow.optim.SGD(self.param_groups(), lr=0.01)"
    scheduled = "[o], [{'scheduler': lambda step: 0.5**step, 'interval': 'step'}]"
    assert optimizer in script  # rates that move: of a resumed round a rank may have no batch
    file.write_text(script.replace(f"return {optimizer}", f"o = {optimizer}; return {scheduled}"))
    command = [sys.executable, "-m", "ofengine", "prove", f"{file}:Task", "--steps", "4"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [*command, "--device", "cpu", "--devices", "2", "--arg", f"cheats={cheats}"],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == int(cheats), ended.stderr
    assert ended.stdout.count("one process, then 2 ranks  one process") == 1
    assert ("Every bit is the same." in ended.stdout) is not cheats
