"""By default, numbers gone bad are told once, and never take the place of good ones on the disk."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import oneflow as flow
import pytest
from helpers import fill_deterministically, quiet_trainer, weights_of
from oneflow import nn

from ofengine import Callback, NonFiniteError, OFEngineWarning, TaskModule
from ofengine.callbacks import ModelCheckpoint, TerminateOnNaN
from ofengine.checkpoint import read
from ofengine.run.finite import Expected

NAN, INF = float("nan"), float("inf")


class Small(TaskModule):
    """The loss is the mean square of the output times the factor in the batch."""

    def __init__(self, optimizer: Any = flow.optim.SGD, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 3)
        self.head = nn.Linear(3, 1)
        fill_deterministically(self, spread=0.4)
        self._made = optimizer, options

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, factor = batch
        return (self.head(self.stem(x)) * factor).pow(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))
        self.log("val_other", batch[0].mean())

    def configure_optimizers(self) -> Any:
        optimizer, options = self._made
        return optimizer(self.param_groups(), lr=0.01, **options)


class Data:
    """Passes over batches; in the pass ``epoch`` those of ``bad`` have that factor, not 1."""

    def __init__(self, count: int, bad: Dict[int, float], epoch: int = 0) -> None:
        self.count, self.bad, self.epoch = count, bad, epoch
        self.begun = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        bad = self.bad if self.begun == self.epoch else {}
        self.begun += 1
        for index in range(self.count):
            yield flow.ones(4, 2) * (1 + index % 3), flow.tensor([float(bad.get(index, 1.0))])


class Mends(Callback):
    """Puts back the weights that it saw at the beginning, at the end of each epoch."""

    def on_train_start(self, trainer: Any, task: Any) -> None:
        self.kept = {n: p.detach().clone() for n, p in task.named_parameters()}

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        with flow.no_grad():
            for name, parameter in task.named_parameters():
                parameter.copy_(self.kept[name])


def warned(records: Any, what: str) -> List[str]:
    texts = [str(each.message) for each in records if each.category is OFEngineWarning]
    return [text for text in texts if what in text]


def finite(path: Any) -> bool:
    return all(np.isfinite(array).all() for array in read(path).weights.values())


# ---------------------------------------------------------------------- what is said, and the end


@pytest.mark.parametrize(("every", "bad", "value"), [(2, 2, NAN), (50, 1, NAN), (50, 4, INF)])
def test_the_first_bad_step_is_told_once_and_the_fit_ends_an_epoch_later(
    mode: str, every: int, bad: int, value: float
) -> None:
    data = Data(5, {bad: value}, epoch=1)
    trainer = quiet_trainer(mode=mode, max_epochs=9, log_every_n_steps=every)
    with pytest.warns(OFEngineWarning) as records, pytest.raises(NonFiniteError) as error:
        trainer.fit(Small(), data)
    (told,) = warned(records, "not finite")
    first = f"the loss of optimizer step {5 + bad} (from 0; epoch 1, batch {bad}) is {value:g}"
    noticed_at = 10 if every == 50 else 8
    broken = "6 of the 6 numbers of 'stem.weight' are not finite"
    assert told.startswith(f"{first}, and after {noticed_at} steps {broken}: ")
    assert "TerminateOnNaN() would end it here." in told
    assert str(error.value).startswith(
        f"{first}, and a whole epoch later, after 15 steps, {broken}"
    )
    assert trainer.global_step == 15


def test_weights_that_the_last_step_breaks_end_the_fit_with_an_error(mode: str) -> None:
    class Breaks(Callback):
        def on_train_batch_end(self, trainer: Any, task: Any, *args: Any) -> None:
            if trainer.global_step == 4:
                with flow.no_grad():
                    task.head.weight[0, 1:] = INF

    with warnings.catch_warnings():
        warnings.simplefilter("error", OFEngineWarning)  # each loss was finite
        with pytest.raises(NonFiniteError, match="training is over, and after 4 steps, 2 of the 3"):
            quiet_trainer(mode=mode, max_epochs=2, callbacks=Breaks()).fit(Small(), Data(2, {}))


def test_weights_that_a_hook_mends_go_on(mode: str) -> None:
    trainer = quiet_trainer(mode=mode, max_epochs=4, callbacks=Mends())
    with pytest.warns(OFEngineWarning) as records:
        trainer.fit(Small(), Data(3, {1: NAN}, epoch=1))
    assert len(warned(records, "not finite")) == 1
    assert trainer.global_step == 12


def test_a_loss_alone_that_is_not_finite_ends_nothing() -> None:
    class Skips(Callback):
        def on_before_optimizer_step(self, trainer: Any, task: Any, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=True)

    trainer = quiet_trainer(max_epochs=3, callbacks=Skips())
    with pytest.warns(OFEngineWarning, match="after 2 steps all parameters are still finite: try"):
        trainer.fit(Small(), Data(2, {1: NAN}))
    assert trainer.global_step == 6


def test_a_batch_of_a_window_is_told_with_the_step_that_it_belongs_to(mode: str) -> None:
    trainer = quiet_trainer(mode=mode, max_epochs=1, accumulate_grad_batches=3)
    told = pytest.warns(OFEngineWarning, match=r"optimizer step 1 \(from 0; epoch 0, batch 4\)")
    with told, pytest.raises(NonFiniteError):
        trainer.fit(Small(), Data(8, {4: NAN}))


def test_a_loss_is_noticed_where_the_task_logs_one_under_its_name(mode: str) -> None:
    class Logs(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

    trainer = quiet_trainer(mode=mode, max_epochs=1, log_every_n_steps=2)
    told = pytest.warns(OFEngineWarning, match=r"optimizer step 2 .* and after 4 steps")
    with told, pytest.raises(NonFiniteError):
        trainer.fit(Logs(), Data(6, {2: NAN}))


def test_a_loss_is_noticed_in_a_long_epoch_that_logs_nothing(mode: str) -> None:
    trainer = quiet_trainer(mode=mode, max_epochs=1, log_every_n_steps=10_000)
    told = pytest.warns(OFEngineWarning, match=r"optimizer step 100 .* and after 257 steps")
    with told, pytest.raises(NonFiniteError):
        trainer.fit(Small(), Data(300, {100: NAN}))


def test_a_callback_that_watches_losses_speaks_alone(mode: str) -> None:
    trainer = quiet_trainer(mode=mode, max_epochs=3, callbacks=TerminateOnNaN())
    with warnings.catch_warnings():
        warnings.simplefilter("error", OFEngineWarning)
        with pytest.raises(NonFiniteError, match=r"step 1 .* is nan, and after 4 steps 6 of"):
            trainer.fit(Small(), Data(4, {1: NAN}))


def test_a_callback_that_stops_a_run_ends_it_without_an_error() -> None:
    class Stops(Callback):
        def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
            trainer.should_stop = True

    with pytest.warns(OFEngineWarning, match="is nan"):
        quiet_trainer(max_epochs=3, callbacks=Stops()).fit(Small(), Data(2, {1: NAN}))


def test_metrics_of_an_evaluation_are_told_once() -> None:
    trainer, task = quiet_trainer(max_epochs=3, num_sanity_val_steps=0), Small()
    bad = [(flow.ones(4, 2), flow.tensor([NAN]))]
    with pytest.warns(OFEngineWarning) as records:
        trainer.fit(task, Data(2, {}), bad)
    end = "gave what is not finite: val_loss = nan; all weights are finite: look at its data."
    assert warned(records, "finite") == [f"validation of epoch 0, after step 2, {end}"]
    with pytest.warns(OFEngineWarning) as records:
        trainer.validate(task, bad)
    assert warned(records, "finite") == [f"validation {end}"]


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"save_last": True},
        {"save_top_k": -1},
        {"every_n_train_steps": 1},
        {"every_n_train_steps": 1, "in_background": True, "save_last": True},
        {"monitor": "val_loss", "save_top_k": 2, "save_last": True},
        {"monitor": "val_other", "save_top_k": -1},
    ],
    ids=str,
)
def test_a_file_that_is_not_finite_takes_no_place(
    mode: str, options: Dict[str, Any], tmp_path: Path
) -> None:
    keeps = ModelCheckpoint(tmp_path, **options)
    trainer = quiet_trainer(mode=mode, max_epochs=4, callbacks=keeps)
    before: Dict[Path, bytes] = {}

    class Looks(Callback):
        def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
            if trainer.current_epoch == 2:
                keeps._finish()  # a thread may be at it still
                before.update((each, each.read_bytes()) for each in tmp_path.glob("*.safetensors"))

    trainer.callbacks.append(Looks())
    with pytest.warns(OFEngineWarning) as records, pytest.raises(NonFiniteError):
        trainer.fit(Small(), Data(2, {0: NAN}, epoch=2), list(Data(1, {})))
    after = {each: each.read_bytes() for each in tmp_path.iterdir()}
    assert after == before
    assert all(map(finite, after))
    assert Path(keeps.best_model_path) in after
    assert (Path(keeps.last_model_path) in after) == bool(options.get("save_last"))
    (told,) = warned(records, "ModelCheckpoint saves nothing of epoch 2, step ")
    assert "6 of the 6 numbers of 'stem.weight' are not finite" in told
    assert told.split(" and ")[1].split(" stays: ")[0] in map(str, after)


@pytest.mark.parametrize("signal", [KeyboardInterrupt, ValueError])
def test_a_run_that_is_cut_off_leaves_its_finite_file(
    signal: Any, mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Ends(Callback):
        def on_train_batch_end(self, trainer: Any, task: Any, *args: Any) -> None:
            if trainer.global_step == 4:
                raise signal

    keeps = ModelCheckpoint(tmp_path)
    trainer = quiet_trainer(mode=mode, max_epochs=4, callbacks=[keeps, Ends()])
    told = pytest.warns(OFEngineWarning)
    with caplog.at_level(logging.INFO, "ofengine"), told, pytest.raises(signal):
        trainer.fit(Small(), Data(3, {0: NAN}, epoch=1))
    (file,) = tmp_path.iterdir()
    assert file.name == "epoch=0-step=3.safetensors"
    assert finite(file)
    assert f"saved nothing of what is not finite; {file} stays" in caplog.text

    again = quiet_trainer(mode=mode, max_epochs=2, callbacks=ModelCheckpoint(tmp_path))
    again.fit(Small(), Data(3, {}), ckpt_path="last")
    assert again.resumed_from == file
    assert again.global_step == 6


def test_an_optimizer_s_state_that_is_not_finite_is_not_kept(mode: str, tmp_path: Path) -> None:
    keeps = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=keeps)
    task = Small(flow.optim.Adam)
    with pytest.warns(OFEngineWarning, match=r"the optimizer's exp_avg_sq of '.* are not"):
        trainer.fit(task, Data(4, {2: 1e13}))  # its squared gradients are beyond float32
    assert all(np.isfinite(each).all() for each in weights_of(task).values())
    assert Path(keeps.best_model_path).name == "epoch=0-step=2.safetensors"


def test_a_mask_of_infinite_numbers_is_the_user_s(mode: str, tmp_path: Path) -> None:
    class Masked(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", flow.full((2, 2), -INF))
            self.frozen = nn.Parameter(flow.tensor([NAN, 1.0]), requires_grad=False)

        def on_train_start(self) -> None:
            self.register_buffer("late", flow.full((3,), INF))

    with warnings.catch_warnings():
        warnings.simplefilter("error", OFEngineWarning)
        trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=ModelCheckpoint(tmp_path))
        trainer.fit(Masked(), Data(2, {}))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("which", ["last", "path"])
def test_a_file_that_is_not_finite_is_resumed_from_only_where_it_is_asked_for(
    which: str, tmp_path: Path
) -> None:
    class ByHand(Callback):
        fires_last = True

        def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "by_hand.safetensors")

    keeps = ModelCheckpoint(tmp_path, save_top_k=-1)
    trainer = quiet_trainer(max_epochs=2, callbacks=[keeps, ByHand()])
    with pytest.warns(OFEngineWarning) as records, pytest.raises(NonFiniteError):
        trainer.fit(Small(), Data(2, {1: NAN}, epoch=1))
    by_hand = tmp_path / "by_hand.safetensors"
    (told,) = warned(records, "save_checkpoint")
    assert told.startswith(f"save_checkpoint({str(by_hand)!r}) saves it, though 6 of the 6")

    again = quiet_trainer(max_epochs=2, callbacks=ModelCheckpoint(tmp_path, save_top_k=-1))
    with pytest.warns(OFEngineWarning, match="'stem.weight' are not finite"):
        if which == "last":
            again.fit(Small(), Data(2, {}), ckpt_path="last")
            assert again.resumed_from == tmp_path / "epoch=0-step=2.safetensors"
        else:
            with pytest.raises(NonFiniteError):
                again.fit(Small(), Data(2, {}), ckpt_path=by_hand)


def test_without_a_task_an_infinite_number_may_be_a_mask_s() -> None:
    unknown = Expected.of(None)
    assert unknown.broken({"a": np.array([INF, 1.0])}) is None
    assert unknown.broken({"a": np.array([NAN, 1.0])}) == "1 of the 2 numbers of 'a' are not finite"


def test_the_best_weights_come_back_and_the_fit_ends_well(mode: str, tmp_path: Path) -> None:
    keeps = ModelCheckpoint(tmp_path, monitor="val_loss", restore_best=True)
    trainer, task = quiet_trainer(mode=mode, max_epochs=2, callbacks=keeps), Small()
    with pytest.warns(OFEngineWarning, match="ModelCheckpoint saves nothing|is nan"):
        trainer.fit(task, Data(2, {1: NAN}, epoch=1), list(Data(1, {})))
    assert all(np.isfinite(each).all() for each in weights_of(task).values())


class Scores(Small):
    """Reports these scores, one an epoch."""

    def __init__(self, scores: List[float]) -> None:
        super().__init__()
        self.scores = scores

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("score", self.scores[self.current_epoch], on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("scores", "most", "kept", "best"),
    [
        ([NAN, 0.5, NAN, 0.2], 1, [3], 3),
        ([0.5, NAN, 0.2, NAN], 2, [0, 2], 2),
        ([NAN, 0.5, NAN], -1, [0, 1, 2], 1),
        ([NAN, NAN], 2, [], None),
    ],
)
def test_nan_is_no_score(
    scores: List[float], most: int, kept: List[int], best: Optional[int], tmp_path: Path
) -> None:
    keeps = ModelCheckpoint(tmp_path, "{epoch}", monitor="score", save_top_k=most)
    trainer = quiet_trainer(max_epochs=len(scores), callbacks=keeps)
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        trainer.fit(Scores(scores), Data(1, {}))
    names = sorted(each.name for each in tmp_path.iterdir())
    assert names == [f"epoch={epoch}.safetensors" for epoch in kept]
    assert Path(keeps.best_model_path).name == ("" if best is None else f"epoch={best}.safetensors")
    told = warned(records, "kept no best weights: score was NaN each time")
    assert len(told) == (best is None)
