"""StochasticWeightAveraging: the mean is that of the epochs' last weights, in both modes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import oneflow as flow
import pytest
from helpers import quiet_trainer, weights_of
from oneflow import nn

from ofengine import Callback, CheckpointError, ConfigurationError, OFEngineWarning, TaskModule
from ofengine.callbacks import ModelCheckpoint, StochasticWeightAveraging


class Net(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.frozen = nn.Parameter(flow.tensor([0.1, 0.7, 1.0 / 3.0]), requires_grad=False)
        with flow.no_grad():
            for number, parameter in enumerate(self.parameters()):
                count = parameter.numel()
                values = np.linspace(-0.4, 0.5, count, dtype="float32") * (number + 1) / 3
                parameter.copy_(flow.tensor(values.reshape(tuple(parameter.shape))))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.head(self.norm(self.body(batch))) * self.frozen.sum() - 1).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("seen", self.head.weight.sum())

    def configure_optimizers(self) -> Any:
        trained = [each for each in self.parameters() if each.requires_grad]
        return flow.optim.SGD(trained, lr=0.05, momentum=0.9)


BATCHES = [
    flow.tensor(np.random.default_rng(seed).normal(size=(6, 4)).astype("float32"))
    for seed in range(3)
]


class Ends(Callback):
    """The weights and buffers that each epoch ends with."""

    def __init__(self) -> None:
        self.of: List[Dict[str, np.ndarray]] = []
        self.last: Any = None

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        trainer.settle()
        self.of.append({name: value.numpy().copy() for name, value in task.state_dict().items()})


def mean_by_hand(ends: List[Dict[str, np.ndarray]]) -> Dict[str, np.ndarray]:
    mean = {name: value.copy() for name, value in ends[0].items()}
    for count, end in enumerate(ends[1:], 2):
        for name, value in mean.items():
            if value.dtype.kind == "f":
                factor = np.float32(1.0 / count)
                value += (end[name] - value) * factor
    return mean


def fitted(mode: str, averaging: Any, epochs: int = 5, **options: Any) -> Any:
    ends, task = Ends(), Net()
    callbacks = [averaging, ends, *options.pop("callbacks", [])]
    trainer = quiet_trainer(mode=mode, max_epochs=epochs, callbacks=callbacks)
    trainer.fit(task, BATCHES, **options)
    return task, ends.of, trainer


@pytest.mark.parametrize(
    ("start", "every", "counted"),
    [(2, 1, [2, 3, 4]), (0.5, 1, [3, 4]), (0, 2, [0, 2, 4]), (1.0, 1, [4])],
)
def test_the_mean_of_the_last_epochs_is_left(
    mode: str, start: Any, every: int, counted: List[int]
) -> None:
    averaging = StochasticWeightAveraging(start, every_n_epochs=every)
    task, ends, _ = fitted(mode, averaging)
    mean, left = mean_by_hand([ends[i] for i in counted]), weights_of(task)
    for name, value in mean.items():
        if name != "norm.num_batches_tracked":
            # One multiplication and one addition, that OneFlow rounds as one or as two.
            np.testing.assert_allclose(left[name], value, rtol=0, atol=1e-7)
    assert left["frozen"].tobytes() == ends[0]["frozen"].tobytes()
    assert averaging.count == len(counted)
    assert left["norm.num_batches_tracked"] == 15


def test_both_modes_leave_the_same_bits() -> None:
    one, other = (
        weights_of(fitted(mode, StochasticWeightAveraging(1))[0]) for mode in ("eager", "graph")
    )
    assert {name for name in one if one[name].tobytes() != other[name].tobytes()} == set()


def test_without_buffers_the_last_statistics_stay() -> None:
    task, ends, _ = fitted("eager", StochasticWeightAveraging(2, include_buffers=False))
    left = weights_of(task)
    assert left["norm.running_mean"].tobytes() == ends[-1]["norm.running_mean"].tobytes()
    assert left["head.weight"].tobytes() != ends[-1]["head.weight"].tobytes()


@pytest.mark.parametrize("epochs", [2, 4])
def test_a_resumed_run_leaves_the_same_mean(mode: str, tmp_path: Path, epochs: int) -> None:
    whole = weights_of(fitted(mode, StochasticWeightAveraging(1))[0])
    saves = ModelCheckpoint(tmp_path, save_last=True)
    fitted(mode, StochasticWeightAveraging(1), epochs, callbacks=[saves])
    last = tmp_path / "last.safetensors"
    task, ends, _ = fitted(mode, StochasticWeightAveraging(1), ckpt_path=last)
    assert len(ends) == 5 - epochs
    resumed = weights_of(task)
    assert {name for name in whole if whole[name].tobytes() != resumed[name].tobytes()} == set()


def resumed_with(
    mode: str, folder: Path, before: Tuple[Any, int], now: Tuple[Any, int]
) -> Tuple[StochasticWeightAveraging, Any]:
    """Of (``swa_epoch_start``, epochs), the run of ``now`` that goes on from that of before."""
    saves = ModelCheckpoint(folder)
    fitted(mode, StochasticWeightAveraging(before[0]), before[1], callbacks=[saves])
    averaging = StochasticWeightAveraging(now[0])
    return averaging, fitted(mode, averaging, now[1], ckpt_path=saves.best_model_path)[0]


def test_a_share_of_more_epochs_begins_anew_where_none_of_before_counts(
    mode: str, tmp_path: Path
) -> None:
    whole = StochasticWeightAveraging(0.5)
    expected = weights_of(fitted(mode, whole, 4)[0])
    averaging, task = resumed_with(mode, tmp_path, (0.5, 2), (0.5, 4))
    left = weights_of(task)
    assert averaging.count == whole.count == 2
    assert {name for name in left if left[name].tobytes() != expected[name].tobytes()} == set()


@pytest.mark.parametrize(
    ("before", "now", "match"),
    [
        (
            (0.5, 4),
            (0.5, 6),
            "each epoch from 2 on has counted.* each epoch from 3 on counts.*write",
        ),
        (
            (2, 4),
            (0, 5),
            "from 2 on has counted.* from 0 on counts.*write swa_epoch_start=2, every",
        ),
        ((5, 6), (0.5, 7), "from 5 on has counted.* from 4 on counts"),
    ],
)
def test_epochs_that_should_not_have_counted_or_should_have_are_told(
    tmp_path: Path, before: Tuple[Any, int], now: Tuple[Any, int], match: str
) -> None:
    with pytest.warns(OFEngineWarning, match=match):
        resumed_with("eager", tmp_path, before, now)


def test_the_same_epochs_by_another_way_of_saying_so_are_not_told(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    averaging, _ = resumed_with("eager", tmp_path, (3, 4), (0.5, 5))
    assert averaging.count == 2
    assert not [each for each in recwarn if "has counted" in str(each.message)]


def test_states_of_earlier_versions_do_not_say_which_epochs_counted() -> None:
    averaging = StochasticWeightAveraging(2)
    averaging.load_state_dict({"averaged": {}, "count": 0})
    assert averaging.state_dict()["epochs"] == {"first": 0, "every": 1, "ended": 0}
    for wrong in ({"first": -1, "every": 1, "ended": 0}, {"first": 0}, 3):
        state: Dict[str, Any] = {"averaged": {}, "count": 0, "epochs": wrong}
        with pytest.raises(CheckpointError, match="state of StochasticWeightAveraging is wrong"):
            averaging.check_state_dict(state, Net())


def test_a_file_that_is_saved_after_fit_goes_on_with_the_weights_of_training(
    mode: str, tmp_path: Path
) -> None:
    whole = weights_of(fitted(mode, StochasticWeightAveraging(1, evaluate=True))[0])
    averaging = StochasticWeightAveraging(1, evaluate=True)
    task, _, trainer = fitted(mode, averaging, 3)
    mean = weights_of(task)
    trainer.validate(task, BATCHES)  # with the mean, which is in the task already
    with pytest.warns(OFEngineWarning, match="not those that a callback has left in the task"):
        path = trainer.save_checkpoint(tmp_path / "after.safetensors")
    assert weights_of(task)["head.weight"].tobytes() == mean["head.weight"].tobytes()
    task, _, _ = fitted(mode, StochasticWeightAveraging(1, evaluate=True), ckpt_path=path)
    resumed = weights_of(task)
    assert {name for name in whole if whole[name].tobytes() != resumed[name].tobytes()} == set()


@pytest.mark.parametrize("error", [False, True])
def test_the_best_weights_are_not_those_that_a_resumed_run_goes_on_with(
    error: bool, mode: str, tmp_path: Path
) -> None:
    """``restore_best`` puts them into the task; other checkpoints are written behind that."""

    class Fails(Callback):
        def on_fit_end(self, trainer: Any, task: Any) -> None:
            if error:
                raise OSError("no space left")

    def best(folder: Path) -> List[ModelCheckpoint]:
        """The first epoch stays the best; at an error, and else at the end, a file is written."""
        best = ModelCheckpoint(folder / "best", monitor="seen", mode="min", restore_best=True)
        return [best] if error else [best, ModelCheckpoint(folder / "last", save_last=True)]

    def fit(folder: Path, epochs: int, *others: Callback, **options: Any) -> Any:
        task, ends = Net(), Ends()
        callbacks = [ends, *others, *best(folder)]
        trainer = quiet_trainer(mode=mode, max_epochs=epochs, callbacks=callbacks)
        with contextlib.suppress(OSError):
            trainer.fit(task, BATCHES, BATCHES[:1], **options)
        return ends.of, task, trainer

    whole = fit(tmp_path / "whole", 3)[0]
    folder = tmp_path / "run"
    _, task, trainer = fit(folder, 2, Fails())
    (last,) = folder.rglob("last.safetensors")
    left = weights_of(task)["head.weight"].tobytes()
    with pytest.warns(OFEngineWarning, match="has left in the task"):
        after = trainer.save_checkpoint(tmp_path / "after.safetensors")
    for path in [last] if error else [last, after]:  # after an error, fit has not come to its end
        (end,), task, _ = fit(folder, 3, ckpt_path=path)
        assert {n for n in end if end[n].tobytes() != whole[-1][n].tobytes()} == set()
        assert weights_of(task)["head.weight"].tobytes() == left


def test_validation_runs_with_the_mean_where_that_is_asked_for(mode: str) -> None:
    seen: Dict[bool, List[float]] = {}
    for evaluate in (False, True):
        rows: List[float] = seen.setdefault(evaluate, [])

        class Notes(Callback):
            def on_validation_end(self, trainer: Any, task: Any, rows: Any = rows) -> None:
                rows.append(trainer.callback_metrics["seen"])

        averaging = StochasticWeightAveraging(0, evaluate=evaluate)
        _, ends, _ = fitted(mode, averaging, 3, callbacks=[Notes()], val_dataloaders=BATCHES[:1])
    own = [float(each["head.weight"].sum()) for each in ends]
    assert seen[False][-3:] == pytest.approx(own, abs=1e-6)
    # The validation of an epoch comes before its end: it has the mean of those before.
    assert seen[True][-2:] == pytest.approx([own[0], (own[0] + own[1]) / 2], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"swa_epoch_start": -1}, "swa_epoch_start=-1: give an epoch from 0 on"),
        ({"swa_epoch_start": 1.5}, "swa_epoch_start=1.5: give an epoch"),
        ({"swa_epoch_start": True}, "swa_epoch_start=True"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"evaluate": 1}, "evaluate=1"),
    ],
)
def test_a_wrong_argument_is_an_error_at_once(options: Any, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        StochasticWeightAveraging(**options)


def test_an_epoch_that_never_comes_is_an_error_before_training() -> None:
    with pytest.raises(ConfigurationError, match="3 epochs, the last of which is 2, so none"):
        fitted("eager", StochasticWeightAveraging(3), 3)
    with pytest.raises(ConfigurationError, match="a share of max_epochs, which"):
        quiet_trainer(max_epochs=-1, max_steps=4, callbacks=StochasticWeightAveraging()).fit(
            Net(), BATCHES
        )
