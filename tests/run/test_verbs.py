"""The verbs beside fit, one run after the other, and what a run leaves behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any, Iterator

import oneflow as flow
import pytest
from fits import OfLists, fitted, loader_of
from helpers import (
    Notes,
    SquaredLine,
    assert_same_weights,
    numbered_batches,
    quiet_trainer,
    sized,
)
from oneflow import nn

# ---------------------------------------------------------------------- the other verbs


def test_test_and_validate_return_and_log_their_metrics(mode: str) -> None:
    for verb in ("test", "validate"):
        notes = Notes()
        trainer = quiet_trainer(mode=mode, logger=notes)
        assert getattr(trainer, verb)(SquaredLine(), numbered_batches(4)) == [{"seen": 1.5}]
        assert notes.rows == [(0, 0, {"seen": 1.5})]
        assert trainer.callback_metrics == {"seen": 1.5}


def test_a_step_that_logs_nothing_gives_an_empty_dict(mode: str) -> None:
    class Silent(SquaredLine):
        def test_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    assert quiet_trainer(mode=mode).test(Silent(), numbered_batches(2)) == [{}]


def test_the_task_s_own_loaders_are_used_where_none_is_given(mode: str) -> None:
    class Own(SquaredLine):
        def train_dataloader(self) -> Any:
            return numbered_batches(2)

        def val_dataloader(self) -> Any:
            return numbered_batches(2, start=1)

        def test_dataloader(self) -> Any:
            return numbered_batches(2, start=2)

        def predict_dataloader(self) -> Any:
            return numbered_batches(2, start=3)

    task, trainer = Own(), quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(task)
    assert trainer.global_step == 2
    assert trainer.callback_metrics["seen"] == 1.5
    assert trainer.validate(task) == [{"seen": 1.5}]
    assert trainer.test(task) == [{"seen": 2.5}]
    assert len(trainer.predict(task)) == 2
    assert trainer.test(task, numbered_batches(1, start=9)) == [{"seen": 9.0}]


def test_predict_returns_the_outputs_in_order(mode: str) -> None:
    task = SquaredLine()  # sum of the inputs / 2
    outputs = quiet_trainer(mode=mode).predict(task, [*sized(2, 3), flow.zeros(1, 2)])
    assert [output.shape for output in outputs] == [(2, 1), (3, 1), (1, 1)]
    assert [output.numpy()[0, 0] for output in outputs] == [1.0, 2.0, 0.0]


def test_predictions_are_not_overwritten_by_later_batches(mode: str) -> None:
    outputs = quiet_trainer(mode=mode).predict(SquaredLine(), numbered_batches(20))
    assert [float(output) for output in outputs] == [float(index) for index in range(20)]


def test_predict_takes_the_inputs_out_of_a_pair(mode: str) -> None:
    (output,) = quiet_trainer(mode=mode).predict(SquaredLine(), [(flow.ones(1, 2), flow.zeros(1))])
    assert output.numpy().tolist() == [[1.0]]


def test_predict_over_several_loaders_returns_a_list_for_each(mode: str) -> None:
    loaders = [loader_of(1.0, 2.0), loader_of(7.0)]
    outputs = quiet_trainer(mode=mode).predict(OfLists(), loaders)
    assert [[float(output) for output in one] for one in outputs] == [[1.0, 2.0], [7.0]]


def test_predict_returns_whatever_the_step_returns(mode: str) -> None:
    class Returns(SquaredLine):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return {"doubled": batch * 2, "rest": [batch, None]}

    (output,) = quiet_trainer(mode=mode).predict(Returns(), numbered_batches(1, start=3))
    assert output["doubled"].numpy().tolist() == [[6.0, 6.0]]
    assert output["rest"][0].numpy().tolist() == [[3.0, 3.0]]
    assert output["rest"][1] is None


# ---------------------------------------------------------------------- one after the other


def test_a_second_fit_of_the_same_task_by_the_same_trainer_goes_on_from_the_weights(
    mode: str,
) -> None:
    twice, at_once = SquaredLine(), SquaredLine()
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(twice, numbered_batches(3))
    trainer.fit(twice, numbered_batches(3))
    assert trainer.global_step == 3
    quiet_trainer(mode=mode, max_epochs=2).fit(at_once, numbered_batches(3))
    assert_same_weights(twice, at_once)  # SGD without momentum has no other state


def test_a_second_fit_in_the_other_mode(mode: str) -> None:
    other = "graph" if mode == "eager" else "eager"
    first, second = SquaredLine(), SquaredLine()
    quiet_trainer(mode=mode, max_epochs=1).fit(first, sized(2, 1))
    quiet_trainer(mode=other, max_epochs=1).fit(first, sized(2, 1))
    quiet_trainer(mode=mode, max_epochs=2).fit(second, sized(2, 1))
    assert_same_weights(first, second)


def test_one_trainer_fits_two_tasks(mode: str) -> None:
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    first, second = SquaredLine(), SquaredLine()
    trainer.fit(first, numbered_batches(3))
    trainer.fit(second, numbered_batches(3))
    assert_same_weights(first, second)
    assert trainer.task is second


def test_a_fit_after_one_that_failed(mode: str) -> None:
    class Fails(SquaredLine):
        fail = True

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.fail and batch_idx == 1:
                raise ValueError("mine")

    trainer = quiet_trainer(mode=mode, max_epochs=1, accumulate_grad_batches=3)
    task, fresh = Fails(), SquaredLine()
    with pytest.raises(ValueError, match="mine"):
        trainer.fit(task, numbered_batches(3))
    task.fail = False
    trainer.fit(task, numbered_batches(3))
    quiet_trainer(mode=mode, max_epochs=1, accumulate_grad_batches=3).fit(
        fresh, numbered_batches(3)
    )
    assert_same_weights(task, fresh)  # no step of the failed window, nothing left of it


def test_validation_after_fit_sees_the_trained_weights(mode: str) -> None:
    class Weight(SquaredLine):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("out", self.layer(batch).mean())

    task = Weight()
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(task, numbered_batches(3))
    expected = float(task(flow.ones(1, 2)))
    assert expected != 1.0
    (result,) = trainer.validate(task, [flow.ones(1, 2)])
    assert result["out"] == pytest.approx(expected, abs=1e-6)


def test_validation_in_the_middle_of_training_sees_the_weights_of_that_moment(mode: str) -> None:
    class Weight(SquaredLine):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("bias", self.layer.bias.sum() + 0)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).mean()

    notes = Notes()
    fitted(
        Weight(),
        numbered_batches(3),
        numbered_batches(1),
        mode=mode,
        val_check_interval=1,
        logger=notes,
    )
    # d loss / d bias = 1, rate 0.1
    biases = [round(value, 5) for _, value in notes.values("bias")]
    assert biases == [-0.1, -0.2, -0.3]


# ---------------------------------------------------------------------- what is left behind


def live_graphs() -> int:
    gc.collect()
    return sum(isinstance(each, nn.Graph) for each in gc.get_objects())


def test_the_trainer_lets_its_graphs_go() -> None:
    trainer = quiet_trainer(mode="graph", max_epochs=1)
    task = SquaredLine()
    for _ in range(3):
        trainer.fit(task, sized(2, 1), sized(2, 1))
        trainer.validate(task, sized(2))
        trainer.predict(task, sized(2))
        assert live_graphs() == 0


def test_the_trainer_lets_its_graphs_go_after_an_error() -> None:
    class Fails(SquaredLine):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        quiet_trainer(mode="graph", max_epochs=1).fit(Fails(), numbered_batches(1))
    assert live_graphs() == 0


def test_a_task_can_be_collected_after_its_trainer(mode: str) -> None:
    task = SquaredLine()
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(task, numbered_batches(2), numbered_batches(1))
    reference = weakref.ref(task)
    del task, trainer
    gc.collect()
    assert reference() is None


def test_data_is_not_held_after_the_run(mode: str) -> None:
    class Data:
        def __iter__(self) -> Iterator[Any]:
            return iter(numbered_batches(2))

        def __len__(self) -> int:
            return 2

    data = Data()
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(SquaredLine(), data)
    reference = weakref.ref(data)
    del data
    gc.collect()
    assert reference() is None
