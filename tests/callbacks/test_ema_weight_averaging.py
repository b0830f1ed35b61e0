"""EMAWeightAveraging: the average is the formula's, and training never sees it."""

from __future__ import annotations

import logging
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import oneflow as flow
import pytest
from helpers import (
    Resume,
    assert_same_arrays,
    assert_same_weights,
    fill_deterministically,
    image_batches,
    quiet_trainer,
    weights_of,
)
from oneflow import nn

from ofengine import Callback, CheckpointError, ConfigurationError, TaskModule
from ofengine.callbacks import EMAWeightAveraging, GradualUnfreezing, ModelCheckpoint
from ofengine.checkpoint import load_weights
from ofengine.rates import layer_decay

Arrays = Dict[str, np.ndarray]


class Small(TaskModule):
    """Two linear layers around a batch norm; a parameter of no layer, and a frozen one."""

    def __init__(self, seed: int = 0, optimizer: str = "sgd") -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)
        self.frozen = nn.Parameter(flow.ones(2), requires_grad=False)
        self.scale = nn.Parameter(flow.ones(2, 6))
        self.loss_fn = nn.CrossEntropyLoss()
        self.optimizer_name = optimizer
        fill_deterministically(self, seed, spread=0.4)
        self.evaluated: List[Arrays] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return self.loss_fn(self.head(self.norm(self.stem(x)) * self.scale.sum(0)), y)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, _ = batch
        self.log("val_x", self.head(self.stem(x)).sum())

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> Any:
        if self.optimizer_name == "adamw":
            return flow.optim.AdamW(self.param_groups(), lr=1e-2)
        return flow.optim.SGD(self.param_groups(), lr=0.1, momentum=0.9)


def batches(count: int = 4, seed: int = 0) -> List[Any]:
    return image_batches([8] * count, (4,), classes=3, seed=seed)


class Weights(Callback):
    """The task's weights after each optimizer step."""

    def __init__(self) -> None:
        self.steps: List[Arrays] = []

    def on_train_batch_end(self, trainer: Any, task: Any, *args: Any) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append(weights_of(task))


def fit(
    ema: Any, task: Optional[Small] = None, also: Sequence[Callback] = (), **arguments: Any
) -> Any:
    arguments = {"max_epochs": 2, "num_sanity_val_steps": 0, **arguments}
    validation = arguments.pop("validation", None)
    trainer = quiet_trainer(callbacks=[*([ema] if ema else []), *also], **arguments)
    trainer.fit(task or Small(), batches(), validation)
    return trainer


def numbers(tensors: Dict[str, Any]) -> Arrays:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def averaged_by_hand(steps: Sequence[Arrays], names: Sequence[str], decay: float) -> Arrays:
    """The formula in numpy, over the weights after each step that counts."""
    average = {name: steps[0][name] for name in names}
    keep, take = np.float32(decay), np.float32(1.0 - decay)
    for weights in steps[1:]:
        average = {name: average[name] * keep + weights[name] * take for name in names}
    return average


TRAINABLE = [name for name, p in Small().named_parameters() if p.requires_grad]
RUNNING = ["norm.running_mean", "norm.running_var"]


# ---------------------------------------------------------------------- the average


@pytest.mark.parametrize(
    ("arguments", "which"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"every_n_steps": 3}, [0, 3, 6]),
        ({"start_step": 5}, [5, 6, 7]),
        ({"every_n_steps": 2, "start_step": 1}, [1, 3, 5, 7]),
        ({"start_step": 8}, []),
    ],
)
def test_it_is_that_of_a_loop_by_hand(
    mode: str, arguments: Dict[str, Any], which: List[int]
) -> None:
    ema, seen = EMAWeightAveraging(decay=0.75, **arguments), Weights()
    fit(ema, also=[seen], mode=mode)
    assert len(seen.steps) == 8
    assert ema.count == len(which)
    if not which:
        assert ema.averaged == {}
        return
    expected = averaged_by_hand([seen.steps[i] for i in which], TRAINABLE, 0.75)
    assert_same_arrays(numbers(ema.averaged), expected)


def test_the_closed_form(mode: str) -> None:
    ema, seen = EMAWeightAveraging(decay=0.9), Weights()
    fit(ema, also=[seen], mode=mode)
    n = len(seen.steps)
    shares = [0.9 ** (n - 1)] + [0.1 * 0.9 ** (n - 1 - i) for i in range(1, n)]
    assert sum(shares) == pytest.approx(1.0)
    for name, tensor in ema.averaged.items():
        exact = sum(w * step[name].astype("float64") for w, step in zip(shares, seen.steps))
        np.testing.assert_allclose(tensor.numpy(), exact, rtol=0, atol=1e-6)


def test_without_decay_it_is_the_weights(mode: str) -> None:
    ema, task = EMAWeightAveraging(decay=0.0), Small()
    fit(ema, task, mode=mode)
    weights = weights_of(task)
    assert_same_arrays(numbers(ema.averaged), {name: weights[name] for name in TRAINABLE})


def test_buffers_are_averaged_when_asked(mode: str) -> None:
    ema, seen = EMAWeightAveraging(decay=0.75, include_buffers=True), Weights()
    fit(ema, also=[seen], mode=mode)
    assert_same_arrays(
        numbers(ema.averaged), averaged_by_hand(seen.steps, [*TRAINABLE, *RUNNING], 0.75)
    )


def test_a_buffer_that_is_assigned_anew_is_followed() -> None:
    class Assigns(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", flow.zeros(2))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen = self.seen + 1.0
            return super().training_step(batch, batch_idx)

    ema, seen = EMAWeightAveraging(decay=0.5, include_buffers=True), Weights()
    fit(ema, Assigns(), also=[seen])
    expected = averaged_by_hand(seen.steps, ["seen"], 0.5)
    assert_same_arrays({"seen": ema.averaged["seen"].numpy()}, expected)
    assert expected["seen"][0] > 6


def test_accumulated_batches_do_not_count(mode: str) -> None:
    ema, seen = EMAWeightAveraging(decay=0.75), Weights()
    fit(ema, also=[seen], mode=mode, accumulate_grad_batches=3)
    assert ema.count == len(seen.steps) == 4
    assert_same_arrays(numbers(ema.averaged), averaged_by_hand(seen.steps, TRAINABLE, 0.75))


@pytest.mark.parametrize("first", ["ema", "unfreezing"])
def test_what_is_unfrozen_later_joins_with_its_first_step(mode: str, first: str) -> None:
    class Stages(Small):
        def __init__(self) -> None:
            super().__init__()
            self.scale.requires_grad_(False)

        def param_groups(self) -> Any:
            return layer_decay(self, 1.0, stages=["stem", "norm", "head"])

    ema, seen = EMAWeightAveraging(decay=0.75), Weights()
    unfreezing = GradualUnfreezing({0: ["head", "layer_1"], 1: ["stem"]})
    order = [ema, unfreezing] if first == "ema" else [unfreezing, ema]
    fit(order[0], Stages(), also=[order[1], seen], mode=mode)
    early = [name for name in TRAINABLE if name.split(".")[0] in ("head", "norm")]
    late = ["stem.weight", "stem.bias"]
    expected = averaged_by_hand(seen.steps, early, 0.75)
    expected.update(averaged_by_hand(seen.steps[4:], late, 0.75))
    ours = numbers(ema.averaged)
    assert_same_arrays(ours, {name: expected[name] for name in ours})
    assert set(ours) == set(expected)


def test_so_does_what_is_unfrozen_within_an_epoch(mode: str) -> None:
    class All(Small):
        def param_groups(self) -> Any:
            return [{"params": [*self.parameters()]}]

    class Unfreezes(Callback):
        def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, i: int) -> None:
            if (trainer.current_epoch, i) == (0, 2):
                task.scale.requires_grad_(True)

    task = All()
    task.scale.requires_grad_(False)
    ema, seen = EMAWeightAveraging(decay=0.75), Weights()
    fit(ema, task, also=[Unfreezes(), seen], mode=mode)
    expected = averaged_by_hand(seen.steps, [name for name in TRAINABLE if name != "scale"], 0.75)
    expected.update(averaged_by_hand(seen.steps[2:], ["scale"], 0.75))
    ours = numbers(ema.averaged)
    assert_same_arrays(ours, {name: expected[name] for name in ours})
    assert set(ours) == set(expected)


def test_both_modes_have_the_same_averages() -> None:
    found = []
    for mode in ("eager", "graph"):
        ema = EMAWeightAveraging(decay=0.9, include_buffers=True)
        fit(ema, mode=mode, accumulate_grad_batches=2)
        found.append(numbers(ema.averaged))
    assert_same_arrays(*found)


def test_training_is_not_changed_by_it(mode: str) -> None:
    alone, watched = Small(optimizer="adamw"), Small(optimizer="adamw")
    fit(None, alone, mode=mode, validation=batches(1))
    ema = EMAWeightAveraging(decay=0.9, include_buffers=True)
    fit(ema, watched, mode=mode, validation=batches(1), val_check_interval=1)
    assert_same_weights(watched, alone)


def test_each_fit_starts_anew() -> None:
    ema, again = EMAWeightAveraging(decay=0.9), EMAWeightAveraging(decay=0.9)
    fit(ema)
    fit(ema, Small(seed=1))
    fit(again, Small(seed=1))
    assert ema.count == again.count == 8
    assert_same_arrays(numbers(ema.averaged), numbers(again.averaged))


# ---------------------------------------------------------------------- evaluation


class Evaluated(Callback):
    """What each validation, test or prediction ran with, and what was there around it."""

    def __init__(self, ema: EMAWeightAveraging) -> None:
        self.ema = ema
        self.training: List[Arrays] = []
        self.averages: List[Arrays] = []
        self.used: List[Arrays] = []
        self.after: List[Arrays] = []

    def on_train_batch_end(self, trainer: Any, task: Any, *args: Any) -> None:
        trainer.settle()  # in graph mode, num_batches_tracked is added up later
        self.training.append(weights_of(task))
        self.averages.append(numbers(self.ema.averaged))

    def on_validation_batch_start(self, trainer: Any, task: Any, *args: Any) -> None:
        self.used.append(weights_of(task))

    def on_validation_end(self, trainer: Any, task: Any) -> None:
        self.after.append(weights_of(task))

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_end = on_predict_end = on_validation_end


@pytest.mark.parametrize("include_buffers", [False, True])
def test_validation_runs_with_the_averages_and_training_with_its_weights(
    mode: str, include_buffers: bool
) -> None:
    ema = EMAWeightAveraging(decay=0.75, include_buffers=include_buffers)
    seen = Evaluated(ema)
    fit(ema, also=[seen], mode=mode, validation=batches(1), val_check_interval=1)
    assert len(seen.used) == 8
    for training, average, used, after in zip(seen.training, seen.averages, seen.used, seen.after):
        assert_same_arrays(used, {**training, **average})
        assert_same_arrays(after, training)
    assert (seen.used[-1]["stem.weight"] != seen.training[-1]["stem.weight"]).any()


def test_what_validation_computes_is_the_averages_work(mode: str) -> None:
    ema, task, data = EMAWeightAveraging(decay=0.75), Small(), batches(1, seed=5)
    trainer = fit(ema, task, mode=mode, validation=data, val_check_interval=2)
    other = Small(seed=3)
    ema.copy_to(other)
    with flow.no_grad():
        expected = float(other.head(other.stem(data[0][0])).sum().numpy())
        plain = float(task.head(task.stem(data[0][0])).sum().numpy())
    assert trainer.callback_metrics["val_x"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert abs(expected - plain) > 1e-3


def test_the_sanity_check_of_a_new_run_has_the_weights_as_they_are() -> None:
    ema, task = EMAWeightAveraging(), Small()
    before = weights_of(task)
    seen = Evaluated(ema)
    fit(ema, task, also=[seen], validation=batches(1), num_sanity_val_steps=1)
    assert_same_arrays(seen.used[0], before)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_after_the_fit_evaluation_runs_with_the_averages(mode: str, verb: str) -> None:
    ema, task = EMAWeightAveraging(decay=0.75), Small()
    seen = Evaluated(ema)
    trainer = fit(ema, task, also=[seen], mode=mode)
    weights = weights_of(task)
    getattr(trainer, verb)(task, batches(1))
    assert_same_arrays(seen.used[0], {**weights, **numbers(ema.averaged)})
    assert_same_arrays(weights_of(task), weights)


def test_weights_that_were_loaded_after_the_fit_are_used_as_they_are(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ema, task, seen = EMAWeightAveraging(decay=0.75), Small(), Weights()
    trainer = fit(ema, task, also=[ModelCheckpoint(tmp_path, "a", every_n_train_steps=3), seen])
    used = Evaluated(ema)
    trainer.callbacks.append(used)
    caplog.set_level(logging.INFO, logger="ofengine")
    trainer.test(task, batches(1), ckpt_path=tmp_path / "a.safetensors")
    assert_same_arrays(used.used[0], seen.steps[5])
    assert "test uses the task's weights as they are" in caplog.text


def test_another_task_is_left_alone() -> None:
    ema = EMAWeightAveraging(decay=0.75)
    trainer = fit(ema)
    other, seen = nn_task(), Evaluated(ema)
    trainer.callbacks.append(seen)
    before = weights_of(other)
    trainer.test(other, [flow.ones(2, 2)])
    assert_same_arrays(seen.used[0], before)


def nn_task() -> TaskModule:
    class Other(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.layer(batch)

    return Other()


def test_evaluate_false_leaves_the_weights_alone(mode: str) -> None:
    ema = EMAWeightAveraging(decay=0.75, evaluate=False)
    seen = Evaluated(ema)
    fit(ema, also=[seen], mode=mode, validation=batches(1), val_check_interval=1)
    for training, used in zip(seen.training, seen.used):
        assert_same_arrays(used, training)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_validation_leaves_the_training_weights(mode: str, error: Any) -> None:
    class Breaks(Callback):
        def __init__(self) -> None:
            self.seen: List[Arrays] = []

        def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 6:
                raise error("in the middle")

        def on_exception(self, trainer: Any, task: Any, exception: Any) -> None:
            self.seen.append(weights_of(task))

    ema, task, breaks = EMAWeightAveraging(decay=0.75), Small(), Breaks()
    seen = Evaluated(ema)
    with pytest.raises(error, match="in the middle"):
        fit(
            ema,
            task,
            also=[seen, breaks],
            mode=mode,
            validation=batches(1),
            val_check_interval=1,
        )
    assert (seen.used[-1]["stem.weight"] != seen.training[-1]["stem.weight"]).any()
    assert_same_arrays(weights_of(task), seen.training[-1])
    assert_same_arrays(breaks.seen[0], seen.training[-1])


def test_a_checkpoint_holds_the_training_weights(mode: str, tmp_path: Any) -> None:
    ema, task = EMAWeightAveraging(decay=0.75), Small()
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_x", save_top_k=-1, save_last=True)
    fit(ema, task, also=[checkpoint], mode=mode, validation=batches(1))
    saved = Small(seed=9)
    load_weights(saved, checkpoint.last_model_path)
    assert_same_weights(saved, task)


# ---------------------------------------------------------------------- copy_to, state


def test_copy_to_writes_the_averages_and_nothing_else(mode: str) -> None:
    ema, task = EMAWeightAveraging(decay=0.75), Small()
    fit(ema, task, mode=mode)
    before = weights_of(task)
    ema.copy_to(task)
    assert_same_arrays(weights_of(task), {**before, **numbers(ema.averaged)})


def test_copy_to_names_what_does_not_fit() -> None:
    ema = EMAWeightAveraging()
    with pytest.raises(ConfigurationError, match="nothing was averaged yet"):
        ema.copy_to(Small())
    fit(ema)
    with pytest.raises(ConfigurationError, match=r"Other has no 'scale' of the shape"):
        ema.copy_to(nn_task())


def test_what_averaged_gives_is_a_copy() -> None:
    ema = EMAWeightAveraging(decay=0.75)
    fit(ema)
    before = numbers(ema.averaged)
    ema.averaged["stem.weight"].zero_()
    ema.state_dict()["averaged"]["stem.weight"].zero_()
    assert_same_arrays(numbers(ema.averaged), before)


def with_arrays(state: Dict[str, Any]) -> Dict[str, Any]:
    """``state`` as a checkpoint gives it: arrays for tensors."""
    averaged = {
        name: each.numpy() if isinstance(each, flow.Tensor) else each
        for name, each in state["averaged"].items()
    }
    return {**state, "averaged": averaged}


@pytest.mark.parametrize("include_buffers", [False, True])
def test_a_continued_run_has_the_averages_of_the_whole_run(
    mode: str, include_buffers: bool
) -> None:
    def plain_sgd(task: Small) -> Small:  # with nothing that a new optimizer would not know
        task.configure_optimizers = lambda: flow.optim.SGD(task.param_groups(), lr=0.1)
        return task

    whole = EMAWeightAveraging(decay=0.75, include_buffers=include_buffers)
    fit(whole, plain_sgd(Small()), mode=mode)

    first = EMAWeightAveraging(decay=0.75, include_buffers=include_buffers)
    task = plain_sgd(Small())
    fit(first, task, mode=mode, max_epochs=1)
    fresh = EMAWeightAveraging(decay=0.75, include_buffers=include_buffers)
    seen = Evaluated(fresh)
    resume = Resume(fresh, with_arrays(first.state_dict()))
    fit(
        fresh, task, also=[resume, seen], mode=mode, max_epochs=1, num_sanity_val_steps=1,
        validation=batches(1),
    )  # fmt: skip
    assert fresh.count == whole.count == 8
    assert_same_arrays(numbers(fresh.averaged), numbers(whole.averaged))
    sanity = {name: seen.used[0][name] for name in first.averaged}
    assert_same_arrays(sanity, numbers(first.averaged))


def test_the_state_survives_the_round_trip_before_training() -> None:
    first = EMAWeightAveraging(decay=0.75)
    fit(first)
    state = first.state_dict()
    assert state["count"] == 8
    assert state["without"] == ["frozen"]
    fresh = EMAWeightAveraging(decay=0.75)
    fit(fresh, also=[Resume(fresh, with_arrays(state))], max_epochs=0)
    assert fresh.count == 8
    assert_same_arrays(numbers(fresh.averaged), numbers(first.averaged))
    assert fresh.state_dict()["without"] == ["frozen"]


def test_a_state_without_averages_is_one_too() -> None:
    fresh = EMAWeightAveraging(decay=0.75)
    fit(fresh, also=[Resume(fresh, with_arrays(EMAWeightAveraging().state_dict()))])
    assert fresh.count == 8


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda a: a.pop("head.bias"),
            "they lack 'head.bias' of what is averaged here, and have nothing beside it",
        ),
        (
            lambda a: a.update(body=np.zeros(2)),
            "they lack nothing of what is averaged here, and have 'body' beside it",
        ),
        (
            lambda a: a.update({"head.bias": np.zeros(4, "float32")}),
            r"'head.bias' has the shape \(4,\) there and \(3,\) here",
        ),
    ],
)
def test_a_state_of_another_model_is_an_error_before_training(change: Any, match: str) -> None:
    first = EMAWeightAveraging(decay=0.75)
    fit(first)
    state = first.state_dict()
    change(state["averaged"])
    fresh, seen = EMAWeightAveraging(decay=0.75), Weights()
    with pytest.raises(CheckpointError, match=match):
        fit(fresh, also=[Resume(fresh, with_arrays(state)), seen])
    assert seen.steps == []


def test_a_state_of_another_callback_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="lacks 'averaged', 'count'"):
        EMAWeightAveraging().load_state_dict({"wait_count": 1})


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"decay": 1.0}, "decay=1.0: give a number from 0.0 to below 1.0"),
        ({"decay": -0.1}, "decay=-0.1"),
        ({"decay": float("nan")}, "decay=nan"),
        ({"decay": "0.9"}, "decay='0.9'"),
        ({"decay": True}, "decay=True"),
        ({"every_n_steps": 0}, "every_n_steps=0: give a whole number"),
        ({"start_step": -1}, "start_step=-1: give the number of a step"),
        ({"include_buffers": 1}, "include_buffers=1: give True or False"),
        ({"evaluate": None}, "evaluate=None"),
    ],
)
def test_wrong_arguments_are_errors_at_once(wrong: Dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        EMAWeightAveraging(**wrong)


def test_two_that_would_evaluate_are_an_error_before_training(mode: str) -> None:
    two = [EMAWeightAveraging(), EMAWeightAveraging(0.9)]
    with pytest.raises(ConfigurationError, match="give the others evaluate=False"):
        quiet_trainer(mode=mode, max_epochs=1, callbacks=two).fit(Small(), batches())
    two[1].evaluate = False
    trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=two)
    trainer.fit(Small(), batches(), batches(1))
    assert [each.count for each in two] == [4, 4]
