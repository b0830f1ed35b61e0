"""Mistakes in a compiled step, or in a graph of one's own, end in one clear sentence."""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any, Callable, List

import numpy as np
import oneflow as flow
import pytest
from helpers import (
    Line,
    batches,
    line_of,
    quiet_trainer,
    refused,
    run_python,
)
from oneflow import nn

from ofengine import (
    Callback,
    ConfigurationError,
    DataError,
    GraphModeError,
    OFEngineError,
    OFEngineWarning,
    TaskModule,
)
from ofengine.run.constants import CONSTANTS
from ofengine.run.view import RunView

# ---------------------------------------------------------------------- a graph of one's own


class OwnGraph(nn.Graph):
    """The cookbook's way to write a graph."""

    def __init__(self, task: TaskModule, optimizer: Any) -> None:
        super().__init__()
        self.layer = task.layer
        if optimizer is not None:
            self.add_optimizer(optimizer)

    def build(self, batch: Any) -> Any:
        loss = self.layer(batch).mean()
        loss.backward()
        return loss


def with_graph(make: Callable[[Any], Any]) -> TaskModule:
    task: TaskModule = type("Own", (Line,), {"build_graph": lambda self: make(self)})()
    return task


@pytest.mark.parametrize("returned", [None, 5, OwnGraph])
def test_build_graph_that_returns_no_graph(returned: Any) -> None:
    task = with_graph(lambda task: returned)
    refused(task, ConfigurationError, "build_graph", "nn.Graph", mode="graph")


def test_build_graph_without_the_optimizer() -> None:
    task = with_graph(lambda task: OwnGraph(task, None))
    refused(task, ConfigurationError, "OwnGraph", r"add_optimizer\(", mode="graph")


def test_build_graph_with_another_optimizer() -> None:
    task = with_graph(lambda task: OwnGraph(task, flow.optim.SGD(task.parameters(), lr=0.1)))
    refused(task, ConfigurationError, "OwnGraph", r"add_optimizer\(", mode="graph")


def test_a_graph_of_one_s_own_without_backward() -> None:
    class Forgot(OwnGraph):
        def build(self, batch: Any) -> Any:
            return self.layer(batch).mean()

    task = with_graph(lambda task: Forgot(task, task.optimizer))
    refused(task, OFEngineError, "Forgot", "backward", mode="graph")


@pytest.mark.parametrize("returned", [None, {}, ()])
def test_a_graph_of_one_s_own_without_a_loss(returned: Any) -> None:
    class Forgot(OwnGraph):
        def build(self, batch: Any) -> Any:
            self.layer(batch).mean().backward()
            return returned

    task = with_graph(lambda task: Forgot(task, task.optimizer))
    refused(task, OFEngineError, "loss", mode="graph")


def test_a_graph_of_one_s_own_that_returns_a_vector() -> None:
    class Vector(OwnGraph):
        def build(self, batch: Any) -> Any:
            self.layer(batch).mean().backward()
            return batch

    task = with_graph(lambda task: Vector(task, task.optimizer))
    refused(task, OFEngineError, r"loss", r"\(2, 2\)", mode="graph")


def test_one_graph_object_for_two_shapes_of_batch() -> None:
    made: List[Any] = []

    def once(task: Any) -> Any:
        if not made:
            made.append(OwnGraph(task, task.optimizer))
        return made[0]

    refused(
        with_graph(once), ConfigurationError, "build_graph", r"new|anew|each",
        mode="graph", train=[flow.ones(2, 2), flow.ones(1, 2)], trained=1,
    )  # fmt: skip


def test_accumulation_with_a_graph_of_one_s_own() -> None:
    refused(
        with_graph(lambda task: OwnGraph(task, task.optimizer)),
        ConfigurationError, "accumulate_grad_batches=2", "build_graph",
        mode="graph", accumulate_grad_batches=2,
    )  # fmt: skip


def test_clipping_with_a_graph_of_one_s_own() -> None:
    refused(
        with_graph(lambda task: OwnGraph(task, task.optimizer)),
        ConfigurationError, "gradient_clip_val", "OwnGraph|build_graph",
        mode="graph", gradient_clip_val=1.0,
    )  # fmt: skip


# ---------------------------------------------------------------------- what a trace cannot do


def in_a_step(use: Callable[[Any, Any, int], Any]) -> TaskModule:
    """A task whose training step does ``use(task, batch, batch_idx)`` on the side."""

    class Uses(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            use(self, batch, batch_idx)
            return self.layer(batch).mean()

    return Uses()


READS: List[Callable[[Any, Any, int], Any]] = [
    lambda task, batch, index: batch.mean().item(),
    lambda task, batch, index: batch.numpy(),
    lambda task, batch, index: float(batch.mean()),
    lambda task, batch, index: int(batch.mean()),
    lambda task, batch, index: 1 if batch.sum() > 0 else 2,
    lambda task, batch, index: f"{batch.sum()}",
    lambda task, batch, index: batch.tolist(),
    lambda task, batch, index: batch[batch > 0],
    lambda task, batch, index: batch.nonzero(),
]


@pytest.mark.parametrize("read", READS)
def test_reading_a_tensor_in_a_compiled_step_names_the_line(
    read: Callable[[Any, Any, int], Any],
) -> None:
    refused(
        in_a_step(read), GraphModeError,
        r"training_step", re.escape(line_of(read)), r'mode="eager"', mode="graph",
    )  # fmt: skip


USES_OF_THE_INDEX: List[Callable[[Any, Any, int], Any]] = [
    lambda task, batch, index: index == 0,
    lambda task, batch, index: index % 2,
    lambda task, batch, index: not index,
    lambda task, batch, index: f"{index}",
    lambda task, batch, index: "%d" % index,  # noqa: UP031
    lambda task, batch, index: batch * index,
    lambda task, batch, index: index * batch,
    lambda task, batch, index: flow.pow(batch, index),
    lambda task, batch, index: batch[index],
    lambda task, batch, index: [1, 2][index],
    lambda task, batch, index: {0: 1}[index],
    lambda task, batch, index: range(index),
    lambda task, batch, index: max(index, 1),
    lambda task, batch, index: abs(index),
    lambda task, batch, index: 2**index,
    lambda task, batch, index: 1 << index,
    lambda task, batch, index: flow.tensor(index),
    lambda task, batch, index: task.log("index", index),
]


@pytest.mark.parametrize("use", USES_OF_THE_INDEX)
def test_no_use_of_batch_idx_in_a_compiled_step_is_frozen_silently(
    use: Callable[[Any, Any, int], Any],
) -> None:
    refused(in_a_step(use), GraphModeError, r"batch_idx", re.escape(line_of(use)), mode="graph")


def test_adding_batch_idx_to_a_tensor_in_a_compiled_step_neither_freezes_it_nor_crashes(
    tmp_path: Path,
) -> None:
    # OneFlow crashes where something that is neither tensor nor number is added to a tensor.
    script = tmp_path / "adds.py"
    script.write_text(
        """
from helpers import quiet_trainer
import oneflow as flow
from oneflow import nn
from ofengine import Callback, GraphModeError, TaskModule

class Adds(TaskModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        return {"loss": self.layer(batch).mean(), "sum": (batch + batch_idx).mean()}

class Prints(Callback):
    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        print(float(outputs["sum"]), flush=True)

try:
    quiet_trainer(mode="graph", max_epochs=1, callbacks=Prints()).fit(Adds(), [flow.ones(1, 2)] * 3)
except GraphModeError as error:
    print("refused:", error)
"""
    )
    result = run_python(script, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    if lines != ["1.0", "2.0", "3.0"]:
        (line,) = lines
        assert line.startswith("refused: batch_idx")


@pytest.mark.parametrize(
    "use",
    [
        lambda task, batch, index: task.current_epoch,
        lambda task, batch, index: task.global_step,
        lambda task, batch, index: task.trainer.current_epoch,
        lambda task, batch, index: task.trainer.global_step,
        lambda task, batch, index: task.trainer.progress.global_step,
        lambda task, batch, index: task.trainer.is_last_batch,
        lambda task, batch, index: task.trainer.callback_metrics,
        lambda task, batch, index: task.trainer.metrics.values,
        lambda task, batch, index: task.trainer.optimizer.param_groups[0]["lr"],
        lambda task, batch, index: task.optimizers().param_groups[0]["lr"],
        lambda task, batch, index: task.trainer.callbacks,
        lambda task, batch, index: setattr(task.trainer, "should_stop", True),
    ],
)
def test_progress_read_in_a_compiled_step_is_not_frozen_silently(
    use: Callable[[Any, Any, int], Any],
) -> None:
    refused(
        in_a_step(use),
        GraphModeError,
        r"^(trainer|self)\.\w+(\.values)? cannot be used inside a compiled step",
        re.escape(line_of(use)),
        mode="graph",
    )


def caught(use: Callable[[], Any]) -> None:
    try:
        use()
    except Exception:
        return


@pytest.mark.parametrize(
    "use, says",
    [
        (lambda task, batch, index: str(batch.mean()), "is made a text"),
        (lambda task, batch, index: "%s" % batch.mean(), "is made a text"),  # noqa: UP031
        (lambda task, batch, index: [repr(task.layer.weight)], "is made a text"),
        (lambda task, batch, index: caught(lambda: task.global_step), "global_step"),
        (lambda task, batch, index: caught(lambda: index + 1), "batch_idx"),
    ],
)
def test_what_a_trace_refuses_is_refused_as_a_text_and_where_the_step_catches_it(
    use: Callable[[Any, Any, int], Any], says: str
) -> None:
    refused(in_a_step(use), GraphModeError, says, mode="graph")


@pytest.mark.parametrize(
    "use, says",
    [
        (lambda task, batch, index: flow.unique(batch[:, 0]), "cannot trace .* unique"),
        (lambda task, batch, index: nn.functional.one_hot(batch[:, 0].long()), "without num_cl"),
        (
            lambda task, batch, index: flow.autograd.grad(
                task.layer(batch).mean(), [task.layer.weight], create_graph=True
            ),
            "cannot trace .*autograd.grad",
        ),
    ],
)
def test_what_oneflow_cannot_trace_is_told_in_words(use: Any, says: str) -> None:
    refused(in_a_step(use), GraphModeError, says, r"Trainer\(mode=.eager.\)", mode="graph")


def test_a_task_of_float64_is_told_in_words() -> None:
    refused(
        Line().double(),
        GraphModeError,
        r"layer.weight, layer.bias of Line is float64, .* float\(\)",
        mode="graph",
        train=[each.double() for each in batches()],
    )


@pytest.mark.parametrize(
    "change",
    [lambda batch: batch.pop("y"), lambda batch: batch.update(x=batch["x"] * 2), lambda batch: {}],
)
def test_a_step_that_changes_the_entries_of_its_batch_is_told_so(change: Any) -> None:
    class Changes(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.layer(batch["x"]).mean()
            change(batch)
            return loss

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        data = [{"x": each, "y": each} for each in batches(1)]
        quiet_trainer(mode="graph", max_epochs=1).fit(Changes(), data)
    texts = [str(each.message) for each in told if issubclass(each.category, OFEngineWarning)]
    if change({"x": 1, "y": 1}) == {}:
        assert not texts
    else:
        assert len(texts) == 1 and "changes the entries of its batch" in texts[0]


def test_what_stays_the_same_of_a_trainer_may_be_read_in_a_compiled_step() -> None:
    def reads(task: Any, batch: Any, index: Any) -> None:
        values = {name: getattr(task.trainer, name) for name in CONSTANTS}
        assert values["num_training_batches"] == 2 and values["settings"].max_epochs == 1

    quiet_trainer(mode="graph", max_epochs=1).fit(in_a_step(reads), batches(2))
    for name in CONSTANTS:
        assert isinstance(getattr(RunView, name), property) or name == "print"


def test_batch_idx_may_be_passed_on_unused_and_used_in_eager_mode(mode: str) -> None:
    class Passes(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return Line.training_step(self, batch, batch_idx)

    quiet_trainer(mode=mode, max_epochs=1).fit(Passes(), batches())
    for use in USES_OF_THE_INDEX:
        quiet_trainer(mode="eager", max_epochs=1).fit(in_a_step(use), batches(1))


@pytest.mark.parametrize(
    "use",
    [
        lambda task, batch, index: 1 / 0,
        lambda task, batch, index: int("mine"),
        lambda task, batch, index: task.no_such_thing,
        lambda task, batch, index: task.layer(batch[:, :1]),
    ],
)
def test_a_plain_bug_in_a_compiled_step_is_shown_with_its_line(
    use: Callable[[Any, Any, int], Any],
) -> None:
    task = in_a_step(use)
    with pytest.raises(Exception) as eager:
        quiet_trainer(max_epochs=1).fit(task, batches())
    refused(task, GraphModeError, re.escape(line_of(use)), type(eager.value).__name__, mode="graph")


def test_reading_a_tensor_in_validation_suggests_eager_validation_alone() -> None:
    class Reads(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("mean", batch.mean().item())

    refused(
        Reads(), GraphModeError,
        r"validation_step", r"test_graph_mistakes\.py:\d+", r'eval_mode="eager"',
        mode="graph", validation=batches(),
    )  # fmt: skip


def test_a_validation_step_that_returns_what_no_graph_can_return() -> None:
    class Returns(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return {"thing": object()}

    text = refused(
        Returns(), OFEngineError, "validation_step", "return", mode="graph", validation=batches()
    )
    assert "a batch holds" not in text  # it is not the batch


def test_the_sanity_check_finds_a_mistake_in_validation_before_training(mode: str) -> None:
    class Wrong(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("metric", batch)

    refused(Wrong(), ConfigurationError, "metric", mode=mode, validation=batches())


def test_a_numpy_array_in_a_batch_of_a_graph() -> None:
    array = np.ones((2, 2), dtype="float32")
    for batch in (array, (flow.ones(2, 2), array), {"x": [array]}, array[0, 0]):
        refused(Line(), DataError, "numpy", r"from_numpy|tensor", mode="graph", train=[batch])


@pytest.mark.parametrize("thing", [object(), {1, 2}, b"bytes"])
def test_another_thing_in_a_batch_of_a_graph(thing: Any) -> None:
    refused(
        Line(),
        DataError,
        type(thing).__name__,
        "tensor",
        mode="graph",
        train=[(thing, flow.ones(2))],
    )


def test_a_batch_whose_strings_change_does_not_compile_for_each_batch_in_silence() -> None:
    class Named(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch[0]).mean()

    data = [(flow.ones(2, 2), [f"image{index}.png"]) for index in range(12)]
    compiled: List[int] = []

    class Compiles(Callback):
        def on_before_graph_compile(self, *_: Any) -> None:
            compiled.append(1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = quiet_trainer(mode="graph", max_epochs=1, callbacks=Compiles())
        trainer.fit(Named(), data)
    warned = [str(each.message) for each in caught if "compil" in str(each.message)]
    assert len(compiled) < 12 or warned, f"{len(compiled)} compilations, and not a word about it"
