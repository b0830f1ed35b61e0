"""Which layers compute faster; they stay what they are, in both modes and across a checkpoint."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import oneflow as flow
import pytest
from flowvision.models import convnext
from helpers import MODES, bits, fill_deterministically, quiet_trainer
from oneflow import nn

from ofengine import Callback, ConfigurationError, TaskModule, Trainer, cpu_speedups


class OwnNorm(nn.LayerNorm):
    """A user's own, which may compute something else."""


class Net(TaskModule):
    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 5, padding=2, groups=6)
        self.pointwise = nn.Conv2d(6, 6, 1)
        self.norm = nn.LayerNorm(6)
        self.act = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.SiLU())
        self.head = nn.Linear(6, 3)
        fill_deterministically(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        x = self.pointwise(self.depthwise(self.stem(x))).flatten(2).transpose(1, 2)
        return nn.functional.cross_entropy(self.head(self.act(self.norm(x)).mean(1)), y)

    def configure_optimizers(self) -> Any:
        return flow.optim.AdamW(self.parameters(), lr=1e-2)


def images(count: int = 4) -> Any:
    flow.manual_seed(3)
    return [(flow.randn(2, 3, 14, 14), flow.randint(0, 3, (2,))) for _ in range(count)]


def fitted(mode: str, **arguments: Any) -> Net:
    task = Net()
    quiet_trainer(mode=mode, max_epochs=2, seed=1, **arguments).fit(task, images())
    return task


def test_layers_keep_all_but_their_class_and_get_it_back() -> None:
    task = Net()
    names, shown = [*task.state_dict()], repr(task)
    classes = [type(each) for each in task.modules()]
    with cpu_speedups(task) as speedups:
        assert speedups.layers == {"Conv2d": 1, "LayerNorm": 1, "GELU": 1, "SiLU": 1}
        assert [*task.state_dict()] == names
        assert repr(task) == shown
        assert isinstance(task.norm, nn.LayerNorm)
        assert type(task.stem) is nn.Conv2d
        assert type(pickle.loads(pickle.dumps(task.act[0]))) is type(task.act[0])
        assert cpu_speedups(task).layers == {}  # they are so already
    assert [type(each) for each in task.modules()] == classes


@pytest.mark.parametrize(
    "layer",
    [
        OwnNorm(4),
        nn.LayerNorm(4, elementwise_affine=False),
        nn.GELU("tanh"),
        nn.LSTM(3, 4, bidirectional=True),
        nn.LSTM(3, 4, proj_size=2),
        nn.Conv2d(4, 4, 1, stride=2),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Conv2d(4, 8, 5, padding=2, groups=4),
        nn.Conv2d(4, 4, 5, groups=4),
        nn.Conv2d(4, 4, 6, padding=3, groups=4),
        nn.Conv2d(4, 4, 5, padding=4, dilation=2, groups=4),
    ],
    ids=repr,
)
def test_other_layers_stay_as_they_are(layer: nn.Module) -> None:
    before = type(layer)
    assert cpu_speedups(layer).layers == {}
    assert type(layer) is before


def test_other_numbers_than_float32_are_computed_by_oneflow() -> None:
    layer = nn.LayerNorm(4).double()
    x = flow.randn(2, 4).double()
    own = layer(x).numpy()
    cpu_speedups(layer)
    assert (layer(x).numpy() == own).all()


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"takes an oneflow\.nn\.Module.*is a dict"):
        cpu_speedups({})  # type: ignore[arg-type]


def test_both_modes_train_to_the_same_bits_and_the_task_is_as_it_was() -> None:
    eager, graph = (fitted(mode, cpu_speedups=True) for mode in MODES)
    assert bits(eager) == bits(graph)
    assert type(eager.norm) is nn.LayerNorm
    own = fitted("eager")
    assert bits(own) != bits(eager)  # it was really computed otherwise
    assert_near(own, eager)


def assert_near(own: nn.Module, faster: nn.Module) -> None:
    """Trained with the other operators, the weights are nearly the same."""
    for name, weights in own.state_dict().items():
        assert abs(weights.numpy() - faster.state_dict()[name].numpy()).max() < 1e-3, name


class Sentences(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 5)
        self.lstm = nn.LSTM(5, 6, num_layers=2, batch_first=True)
        self.head = nn.Linear(6, 9)
        fill_deterministically(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        found, (_, cells) = self.lstm(self.words(batch))
        scores = self.head(found[:, :-1]).reshape(-1, 9)
        return nn.functional.cross_entropy(scores, batch[:, 1:].reshape(-1)) + cells.mean()

    def configure_optimizers(self) -> Any:
        return flow.optim.AdamW(self.parameters(), lr=1e-2)


def test_an_lstm_trains_alike_in_both_modes() -> None:
    flow.manual_seed(4)
    batches = [flow.randint(0, 9, (3, 7)) for _ in range(4)]
    tasks = []
    for mode, faster in ((MODES[0], True), (MODES[1], True), ("eager", False)):
        tasks.append(Sentences())
        trainer = quiet_trainer(mode=mode, max_epochs=2, seed=1, cpu_speedups=faster)
        trainer.fit(tasks[-1], batches)
    assert bits(tasks[0]) == bits(tasks[1])
    assert_near(tasks[2], tasks[0])


class ConvNeXt(Net):
    """Over channels first and last, by the norms that flowvision's network has."""

    def __init__(self) -> None:
        super().__init__()
        self.over_channels = convnext.LayerNorm(6, data_format="channels_first")
        self.norm = convnext.LayerNorm(6)
        fill_deterministically(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        x = self.norm(self.over_channels(self.stem(x)).permute(0, 2, 3, 1))
        return nn.functional.cross_entropy(self.head(x.flatten(1, 2).mean(1)), y)


def test_the_norms_of_convnext_train_alike_in_both_modes_and_are_pickled() -> None:
    tasks = []
    for mode in MODES:
        tasks.append(ConvNeXt())
        quiet_trainer(mode=mode, max_epochs=2, seed=1, cpu_speedups=True).fit(tasks[-1], images())
    assert bits(tasks[0]) == bits(tasks[1])
    own = ConvNeXt()
    quiet_trainer(max_epochs=2, seed=1).fit(own, images())
    assert_near(own, tasks[0])
    with cpu_speedups(own) as speedups:
        assert speedups.layers["LayerNorm"] == 2
        assert type(pickle.loads(pickle.dumps(own.norm))) is type(own.norm)
        assert isinstance(own.norm, convnext.LayerNorm)
    assert type(own.norm) is convnext.LayerNorm


def test_in_a_graph_of_one_s_own_they_compute_as_in_eager_mode() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 5, padding=2, groups=6)),
        *(nn.MaxPool2d(7), nn.Flatten(), nn.LayerNorm(24), nn.GELU(), nn.SiLU(), nn.Linear(24, 1)),
    )
    fill_deterministically(model)
    cpu_speedups(model)

    class Graph(nn.Graph):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def build(self, x: Any) -> Any:
            return self.model(x)

    (x, _), *_ = images()
    assert Graph()(x).numpy().tobytes() == model(x).numpy().tobytes()


class Fails(Callback):
    def on_train_batch_end(self, *arguments: Any) -> None:
        raise ValueError("for a test")


def test_after_an_error_the_task_is_as_it_was() -> None:
    task = Net()
    with pytest.raises(ValueError, match="for a test"):
        quiet_trainer(max_epochs=1, cpu_speedups=True, callbacks=[Fails()]).fit(task, images())
    assert type(task.norm) is nn.LayerNorm


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(mode: str, tmp_path: Path) -> None:
    whole = fitted(mode, cpu_speedups=True)
    first: Trainer = quiet_trainer(mode=mode, max_epochs=1, seed=1, cpu_speedups=True)
    first.fit(Net(), images())
    path = first.save_checkpoint(tmp_path / "saved.safetensors")
    task = Net()
    trainer = quiet_trainer(mode=mode, max_epochs=2, seed=1, cpu_speedups=True)
    trainer.fit(task, images(), ckpt_path=path)
    assert bits(task) == bits(whole)


def test_a_run_that_goes_on_without_is_told_so(tmp_path: Path, caplog: Any) -> None:
    first = quiet_trainer(max_epochs=1, cpu_speedups=True)
    first.fit(Net(), images())
    path = first.save_checkpoint(tmp_path / "saved.safetensors")
    with caplog.at_level(logging.WARNING, logger="ofengine"):
        quiet_trainer(max_epochs=2).fit(Net(), images(), ckpt_path=path)
    assert [line for line in caplog.messages if "cpu_speedups" in line] == [
        "resume: cpu_speedups is off now, and was on: last bits can differ from those of a run "
        "that never stopped."
    ]


class Plain(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.parameters(), lr=0.1)


def test_it_says_which_layers_or_that_there_is_none(caplog: Any) -> None:
    with caplog.at_level(logging.INFO, logger="ofengine"):
        fitted("eager", cpu_speedups=True)
        quiet_trainer(max_epochs=1, cpu_speedups=True).fit(Plain(), [flow.ones(2, 2)])
    assert [line for line in caplog.messages if "cpu_speedups" in line] == [
        "cpu_speedups: 1 Conv2d, 1 LayerNorm, 1 GELU, 1 SiLU of Net compute by faster operators.",
        "cpu_speedups: no layer of Plain has faster operators.",
    ]
