"""What a step takes in and gives out is the same in both modes: batches, logs, outputs.

And what a traced step cannot do is told with the user's own line, never frozen silently.
"""

from __future__ import annotations

import inspect
import warnings
from collections import namedtuple
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import oneflow as flow
import pytest
from helpers import (
    MODES,
    assert_same_weights,
    fill_deterministically,
    image_batches,
    quiet_trainer,
    random_rows,
    weights_of,
)
from oneflow import nn

from ofengine import Callback, GraphModeError, TaskModule, Trainer
from ofengine.errors import OFEngineWarning


class Line(TaskModule):
    """One layer; ``use`` is called in the training step, and may return a loss of its own."""

    def __init__(self, use: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.use = [use]
        fill_deterministically(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.use[0](self, batch)

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1, momentum=0.9)


def loss_of(task: Any, x: Any) -> Any:
    return task.layer(x).pow(2).mean()


def rows(*sizes: int, seed: int = 0) -> List[Any]:
    return random_rows(sizes, 4, seed)


def fit_in_both(
    make: Callable[[], TaskModule], batches: Any, *more: Any, **asked: Any
) -> List[Trainer]:
    """Train in both modes, check that the weights are equal, return the Trainers."""
    trainers = []
    for mode in MODES:
        trainer = quiet_trainer(mode=mode, **{"max_epochs": 2, **asked})
        trainer.fit(make(), batches, *more)
        trainers.append(trainer)
    assert_same_weights(trainers[0].task, trainers[1].task)
    return trainers


# ---------------------------------------------------------------------- batches

Pair = namedtuple("Pair", "inputs weight")
TWO, THREE, ALL = rows(3, 3, 2, seed=1), rows(3, 3, 2, seed=2), [flow.ones(3, 2), flow.ones(2, 2)]

BATCHES: Dict[str, Tuple[List[Any], Callable[[Any, Any], Any]]] = {
    "a tensor": (TWO, loss_of),
    "a tuple": (list(zip(TWO, THREE)), lambda t, b: loss_of(t, b[0]) + loss_of(t, b[1])),
    "a list": ([list(p) for p in zip(TWO, THREE)], lambda t, b: loss_of(t, b[0] * b[1])),
    "a dict": ([{"x": x, "k": None} for x in TWO], lambda t, b: loss_of(t, b["x"])),
    "dicts in another order": (
        [{"x": TWO[0], "w": THREE[0]}, {"w": THREE[1], "x": TWO[1]}],
        lambda t, b: loss_of(t, b["x"] * 2 + b["w"]),
    ),
    "a named tuple": ([Pair(*p) for p in zip(TWO, THREE)], lambda t, b: loss_of(t, b.inputs)),
    "nested": (
        [({"x": [x, (y,)]}, [{}, ()]) for x, y in zip(TWO, THREE)],
        lambda t, b: loss_of(t, b[0]["x"][0] + b[0]["x"][1][0]),
    ),
    "constants that change": (
        [(TWO[0], 1.0, "mean"), (TWO[1], 2.0, "mean"), (TWO[0], 2.0, "sum")],
        lambda t, b: getattr(t.layer(b[0]).pow(2) * b[1], b[2])(),
    ),
    "whole numbers and truth": (
        [(x, flow.tensor([1, 2, 3]), flow.tensor([True, False, True])) for x in TWO[:2]],
        lambda t, b: loss_of(t, b[0] * flow.where(b[2], b[1], b[1] * 2).unsqueeze(1).float()),
    ),
    "a tensor without dimensions": (
        [(TWO[0], flow.tensor(2.0)), (TWO[1], flow.tensor(3.0))],
        lambda t, b: loss_of(t, b[0]) * b[1],
    ),
    "one tensor twice": ([(x, x) for x in TWO], lambda t, b: loss_of(t, b[0] - b[1].mean())),
    "a transposed view": ([rows(4)[0].t() for _ in range(2)], loss_of),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_any_structure(name: str) -> None:
    """A batch arrives in a compiled step as the dataloader made it."""
    batches, use = BATCHES[name]
    fit_in_both(lambda: Line(use), batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_in_both(lambda: Line(use), batches, accumulate_grad_batches=2)


def test_the_structure_a_step_is_given() -> None:
    """The very types: tuples stay tuples, constants keep their types."""
    seen: List[Any] = []

    def use(task: Any, batch: Any) -> Any:
        (x, inner), constants = batch
        seen.append((type(batch), type(inner), type(inner["pair"]), list(inner), constants))
        return loss_of(task, x * inner["pair"].inputs)

    batch = ((TWO[0], {"b": 1, "pair": Pair(THREE[0], 0.5)}), [True, 1, 1.0, "one", None])
    fit_in_both(lambda: Line(use), [batch])
    assert all(entry == seen[0] for entry in seen)
    assert [type(value) for value in seen[-1][-1]] == [bool, int, float, str, type(None)]
    assert seen[0][:3] == (tuple, dict, Pair)


# ---------------------------------------------------------------------- logs


def test_logged_values_are_those_of_a_loop_by_hand(mode: str) -> None:
    """Last values of steps, and epoch means weighted by the batches' sizes."""

    def use(task: Any, batch: Any) -> Any:
        task.log("both", batch.sum(), on_epoch=True)
        task.log("mean", batch.sum(), on_step=False, on_epoch=True)
        task.log("weighted", batch.sum(), on_step=False, on_epoch=True, batch_size=7)
        task.log_dict({"last": batch.max(), "count": (batch > 0).sum()})
        return loss_of(task, batch)

    batches = rows(4, 3, 1)
    trainer = quiet_trainer(mode=mode, max_epochs=2)
    trainer.fit(Line(use), batches)
    sums = [float(batch.numpy().astype("float64").sum()) for batch in batches]
    expected = {
        "both_step": sums[-1],
        "both_epoch": sum(s * n for s, n in zip(sums, (4, 3, 1))) / 8,
        "mean": sum(s * n for s, n in zip(sums, (4, 3, 1))) / 8,
        "weighted": sum(sums) / 3,
        "last": float(batches[-1].numpy().max()),
        "count": float((batches[-1].numpy() > 0).sum()),
    }
    metrics = trainer.callback_metrics
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logs_are_equal_in_both_modes(accumulate: int) -> None:
    """The very same numbers, the loss among them, with and without windows."""

    def use(task: Any, batch: Any) -> Any:
        outputs = task.layer(batch)
        task.log("norm", outputs.pow(2).sum(), on_epoch=True, prog_bar=True)
        task.log("weight", task.layer.weight.abs().mean())
        task.log("again", outputs.mean())
        task.log("again", outputs.max())
        return outputs.pow(2).mean()

    eager, graph = fit_in_both(
        lambda: Line(use), rows(4, 3, 4, 2, 1), accumulate_grad_batches=accumulate
    )
    assert eager.callback_metrics == graph.callback_metrics
    assert {"loss", "norm_step", "norm_epoch", "weight", "again"} <= set(eager.callback_metrics)
    assert eager.global_step == graph.global_step


def test_metrics_of_every_batch_are_seen_by_callbacks_alike() -> None:
    """``callback_metrics`` in ``on_train_batch_end`` follows the batches in both modes."""
    seen: Dict[str, List[Any]] = {"eager": [], "graph": []}

    class Look(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            seen[trainer.mode].append((float(outputs["loss"]), dict(trainer.callback_metrics)))

    def use(task: Any, batch: Any) -> Any:
        task.log("sum", batch.sum())
        return loss_of(task, batch)

    fit_in_both(lambda: Line(use), rows(4, 3, 4), callbacks=[Look()])
    assert seen["eager"] == seen["graph"]
    assert len({loss for loss, _ in seen["eager"]}) == 6


# ---------------------------------------------------------------------- outputs


class Keep(Callback):
    def __init__(self) -> None:
        self.outputs: List[Any] = []

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.outputs.append(plain(outputs))


def plain(value: Any) -> Any:
    """Tensors as nested lists with their shapes, all else as it is."""
    if isinstance(value, flow.Tensor):
        return ("tensor", tuple(value.shape), value.detach().numpy().tolist())
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(inner) for inner in value)
    return value


@pytest.mark.parametrize("accumulate", [1, 2])
def test_outputs_reach_callbacks_alike(accumulate: int) -> None:
    """A step's dict with the loss and extras, nested as they were, is what callbacks get.

    The loss is the batch's own, not divided by the window.
    """

    def use(task: Any, batch: Any) -> Any:
        logits = task.layer(batch)
        loss = logits.pow(2).mean()
        return {
            "logits": logits,
            "loss": loss,
            "again": loss,
            "nested": {"pair": (batch, [logits.argmax(1)]), "none": None, "text": "t", "n": 3},
        }

    keeps = []
    for mode in MODES:
        keeps.append(Keep())
        quiet_trainer(
            mode=mode, max_epochs=1, callbacks=[keeps[-1]], accumulate_grad_batches=accumulate
        ).fit(Line(use), rows(4, 3, 2))
    assert keeps[0].outputs == keeps[1].outputs
    first = keeps[0].outputs[0]
    assert set(first) == {"logits", "loss", "again", "nested"}
    logits = np.array(first["logits"][2])
    assert first["loss"][2] == pytest.approx((logits**2).mean(), rel=1e-5)
    assert first["nested"]["pair"][0] == plain(rows(4)[0])
    assert first["nested"]["n"] == 3


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_of_one_element_in_any_shape(shape: Tuple[int, ...], accumulate: int) -> None:
    """A loss is a tensor of one element; whether it has dimensions does not matter."""
    eager, graph = fit_in_both(
        lambda: Line(lambda task, batch: loss_of(task, batch).reshape(*shape)),
        rows(4, 3, 4),
        accumulate_grad_batches=accumulate,
    )
    plain_loss = fit_in_both(
        lambda: Line(loss_of), rows(4, 3, 4), accumulate_grad_batches=accumulate
    )[0]
    assert_same_weights(eager.task, plain_loss.task)
    assert eager.callback_metrics == graph.callback_metrics == plain_loss.callback_metrics


# ---------------------------------------------------------------------- validation


class Validated(TaskModule):
    """A net whose training and evaluation differ: dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 5)
        )
        fill_deterministically(self.net)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))
        self.log("val_hits", (logits.argmax(1) == batch[1]).float().mean())
        return {"logits": logits}

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]).softmax(-1)

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.05, momentum=0.9)


def evaluate_by_hand(net: nn.Module, batches: List[Any]) -> Dict[str, float]:
    """Loss and accuracy, each batch weighted by its size, on a copy in eval mode."""
    copy = Validated().net
    copy.load_state_dict(net.state_dict())
    copy.eval()
    losses = hits = count = 0.0
    with flow.no_grad():
        for images, labels in batches:
            logits = copy(images)
            size = images.shape[0]
            losses += float(nn.functional.cross_entropy(logits, labels)) * size
            hits += float((logits.argmax(1) == labels).float().mean()) * size
            count += size
    return {"val_loss": losses / count, "val_hits": hits / count}


@pytest.mark.parametrize("modes", [("eager", "eager"), ("graph", "graph"), ("graph", "eager")])
def test_validation_sees_the_weights_and_statistics_of_the_moment(modes: Tuple[str, str]) -> None:
    """After every epoch it is the evaluation of a copy of the net, made at that moment."""
    validation = image_batches([5, 3, 5], seed=9)
    compared: List[float] = []

    class Compare(Callback):
        def on_validation_end(self, trainer: Trainer, task: Validated) -> None:
            if trainer.sanity_checking:
                return
            by_hand = evaluate_by_hand(task.net, validation)
            for name, value in by_hand.items():
                assert trainer.callback_metrics[name] == pytest.approx(value, rel=1e-6), name
            compared.append(by_hand["val_loss"])

        def on_train_epoch_end(self, trainer: Trainer, task: Validated) -> None:
            assert task.net.training
            assert task.net[2].training

    mode, eval_mode = modes
    trainer = quiet_trainer(mode=mode, eval_mode=eval_mode, max_epochs=3, callbacks=[Compare()])
    trainer.fit(Validated(), image_batches([6, 6, 4]), validation)
    assert len(set(compared)) == 3


def test_validation_is_equal_in_both_modes_and_disturbs_nothing() -> None:
    """The same numbers in both modes; weights as without validation, dropout masks included."""
    batches, validation = image_batches([6, 4]), image_batches([5, 3], seed=9)
    eager, graph = fit_in_both(Validated, batches, validation)
    assert eager.callback_metrics == graph.callback_metrics
    without = fit_in_both(Validated, batches)[0]
    assert_same_weights(eager.task, without.task)


def test_test_and_predict_are_equal_in_both_modes() -> None:
    """The other verbs, on batches of two sizes."""
    batches = image_batches([5, 3, 5], seed=9)
    tested, predicted = [], []
    for mode in MODES:
        task = Validated()
        trainer = quiet_trainer(mode=mode, max_epochs=1)
        trainer.fit(task, image_batches([6, 4]))
        tested.append(trainer.test(task, batches))
        predicted.append([p.numpy().tobytes() for p in trainer.predict(task, batches)])
        by_hand = evaluate_by_hand(task.net, batches)
        assert tested[-1][0] == pytest.approx(by_hand, rel=1e-6)
    assert tested[0] == tested[1]
    assert predicted[0] == predicted[1]


# ---------------------------------------------------------------------- methods and inheritance


def test_a_step_may_call_super_and_other_methods() -> None:
    """Inheritance works in a compiled step: super(), forward, helpers and properties."""

    class Base(TaskModule):
        factor = 0.5

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)
            fill_deterministically(self)

        def forward(self, x: Any) -> Any:
            return self.layer(x).tanh()

        @property
        def doubled(self) -> float:
            return 2 * self.factor

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.penalty() + self(batch).pow(2).mean() * self.doubled

        def penalty(self) -> Any:
            return self.layer.weight.pow(2).sum() * 0.1

        def configure_optimizers(self) -> Any:
            return flow.optim.SGD(self.param_groups(), lr=0.1)

    class Derived(Base):
        factor = 2.0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss_of_base", loss)
            return loss + self.layer.bias.abs().sum() * 0.01

        def penalty(self) -> Any:
            return super().penalty() * 3

    eager, graph = fit_in_both(Derived, rows(4, 3, 4))
    assert eager.callback_metrics == graph.callback_metrics
    base = fit_in_both(Base, rows(4, 3, 4))[0]
    assert np.abs(
        weights_of(base.task)["layer.weight"] - weights_of(eager.task)["layer.weight"]
    ).max()


# ---------------------------------------------------------------------- what a trace cannot do


def branch(task: Any, x: Any) -> Any:
    loss = loss_of(task, x)
    if loss > 1:  # the line to be named
        loss = loss * 2
    return loss


def item(task: Any, x: Any) -> Any:
    loss = loss_of(task, x)
    task.worst = max(0.0, loss.item())  # the line to be named
    return loss


def to_float(task: Any, x: Any) -> Any:
    return loss_of(task, x) * float(x.abs().max())  # the line to be named


def to_numpy(task: Any, x: Any) -> Any:
    scale = float(x.numpy().std())  # the line to be named
    return loss_of(task, x) * scale


def mask(task: Any, x: Any) -> Any:
    outputs = task.layer(x)
    return outputs[outputs > 0].sum()  # the line to be named


def text(task: Any, x: Any) -> Any:
    task.note = f"mean {x.mean():.2f}"  # the line to be named
    return loss_of(task, x)


@pytest.mark.parametrize("use", [branch, item, to_float, to_numpy, mask, text])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_reads_a_value_is_refused_with_the_user_s_line(
    use: Callable[[Any, Any], Any], accumulate: int
) -> None:
    """One sentence that names this file and the very line, before any weight has moved."""
    source, first = inspect.getsourcelines(use)
    number = first + next(i for i, line in enumerate(source) if "line to be named" in line)
    task = Line(use)
    before = weights_of(task)
    with pytest.raises(GraphModeError) as caught:
        quiet_trainer(mode="graph", max_epochs=1, accumulate_grad_batches=accumulate).fit(
            task, rows(4, 4)
        )
    message = str(caught.value)
    assert f"{__file__}:{number}:" in message
    assert "training_step" in message
    assert "\n" not in message
    after = weights_of(task)
    assert all((before[name] == after[name]).all() for name in before)


def test_the_same_lines_run_in_eager_mode() -> None:
    """Nothing of that is wrong in itself."""
    for use in (branch, item, to_float, to_numpy, mask, text):
        quiet_trainer(max_epochs=1).fit(Line(use), rows(4, 4))


class UsesIndex(Line):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        warm = min(1.0, batch_idx / 10)  # the line to be named
        return loss_of(self, batch) * warm


def test_batch_idx_in_a_compiled_step_is_refused_with_the_user_s_line() -> None:
    """It would stay 0 for ever."""
    _, first = inspect.getsourcelines(UsesIndex.training_step)
    with pytest.raises(GraphModeError, match="batch_idx") as caught:
        quiet_trainer(mode="graph", max_epochs=1).fit(UsesIndex(loss_of), rows(4))
    assert f"{__file__}:{first + 1}:" in str(caught.value)


class WrongShape(Line):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[:, :3]).mean()  # three columns, where the layer wants four


class PassesIndexOn(WrongShape):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)


# fmt: off
class InOneLine(Line):
    def training_step(self, batch: Any, batch_idx: int) -> Any: return self.layer(batch[:, :3]).mean()  # noqa: E501
# fmt: on


@pytest.mark.parametrize("task_class", [WrongShape, PassesIndexOn, InOneLine])
def test_another_mistake_is_not_taken_for_a_use_of_batch_idx(task_class: Any) -> None:
    """An error of the step's own is told as it is, with its line, though the index is passed on."""
    one_line = task_class is InOneLine
    owner = InOneLine if one_line else WrongShape
    _, first = inspect.getsourcelines(owner.training_step)
    with pytest.raises(GraphModeError) as caught:
        quiet_trainer(mode="graph", max_epochs=1).fit(task_class(loss_of), rows(4))
    told, _, line = str(caught.value).partition(f"{__file__}:{first + (not one_line)}:")
    assert line
    assert "batch_idx" not in told


def test_a_task_goes_on_in_eager_mode_after_a_refusal() -> None:
    """A refused trace leaves the task as it was: it trains eagerly as if nothing had happened."""
    task, other = Line(branch), Line(branch)
    with pytest.raises(GraphModeError):
        quiet_trainer(mode="graph", max_epochs=1).fit(task, rows(4))
    for each in (task, other):
        quiet_trainer(max_epochs=1).fit(each, rows(4, 3))
    assert_same_weights(task, other)


def assign(task: Any, x: Any) -> Any:
    task.seen = task.seen * 0.5 + x.mean().detach()
    return loss_of(task, x) * (1 + task.seen.sum() * 0)


@pytest.mark.parametrize("use", [assign])
def test_a_buffer_that_a_step_changes_is_not_lost_silently(use: Callable[[Any, Any], Any]) -> None:
    """In graph mode it changes as in eager mode, or the user is told that it does not."""
    tasks = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for mode in MODES:
            task = Line(use)
            task.register_buffer("seen", flow.zeros(1))
            tasks.append(task)
            try:
                quiet_trainer(mode=mode, max_epochs=1).fit(task, rows(4, 4))
            except GraphModeError:
                return
    if not any(issubclass(warning.category, OFEngineWarning) for warning in caught):
        assert_same_weights(*tasks)
