"""A run with several optimizers goes on bit for bit as if it had never stopped, from any point."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

import oneflow as flow
import pytest
from helpers import quiet_trainer, resuming, sentence
from helpers.duels import Duel
from helpers.resuming import Endless, check_exact, run, shuffled
from oneflow.optim.lr_scheduler import ReduceLROnPlateau

from ofengine import Callback, CheckpointError
from ofengine.callbacks import EMAWeightAveraging, LRDecayCallback


class Thrice(Duel):
    """The generator steps in every third batch, which 5 batches an epoch are no multiple of."""

    every_n_batches = 3


def decaying() -> List[Callback]:
    """Decay events in the middle of an epoch, too."""
    return [LRDecayCallback(every_n_batches=2), EMAWeightAveraging(0.9)]


@pytest.mark.parametrize(
    ("mode", "other"),
    [
        ("graph", "eager"),
        ("eager", "graph"),
        ("eager", "eager"),
        ("graph", "graph"),
    ],
)
@pytest.mark.slow
def test_from_a_point_of_each_kind(
    mode: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == other == "graph":
        monkeypatch.setattr(resuming, "KINDS", ("batch", "validating", "epoch_end"))
    check_exact(tmp_path, mode, other, task=Duel, seed=7, callbacks=decaying)


@pytest.mark.slow
@pytest.mark.parametrize("task", [Duel, Thrice])
def test_from_every_point(task: Any, tmp_path: Path) -> None:
    check_exact(tmp_path, "eager", most=None, task=task, callbacks=decaying)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "other"), [("eager", "graph"), ("graph", "graph")])
def test_from_every_point_in_and_across_the_modes(mode: str, other: str, tmp_path: Path) -> None:
    check_exact(tmp_path, mode, other, None, task=Thrice, seed=7, callbacks=decaying)


@pytest.mark.slow
def test_data_of_unknown_length(tmp_path: Path) -> None:
    check_exact(tmp_path, "eager", task=Thrice, data=Endless, callbacks=decaying)


class Watched(Duel):
    """Each optimizer has a ReduceLROnPlateau of its own, one by step and one by epoch."""

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        for name, monitor, interval in (
            ("discriminator", "discriminator_loss_step", "step"),
            ("generator", "val", "epoch"),
        ):
            plateau = ReduceLROnPlateau(made[name]["optimizer"], patience=0, factor=0.5)
            made[name]["lr_scheduler"] = {
                "scheduler": plateau, "monitor": monitor, "interval": interval,
            }  # fmt: skip
        return made


@pytest.mark.slow
def test_plateaus(tmp_path: Path) -> None:
    whole = check_exact(tmp_path, "eager", task=Watched, max_epochs=3)
    plan = whole.trainer.rates
    base = {group.name: group.lr * group.lr_scale for group in plan.groups}
    last = dict(zip(plan.names, plan.rates(whole.trainer.global_step - 1)))
    assert all(last[name] < 0.9 * base[name] for name in base)


class SetsRates(Callback):
    """Gives a group of the generator another rate in the middle of the first epoch."""

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, i: int) -> None:
        if trainer.batches_seen == 3:
            trainer.set_lr("generator/last", 0.005)


def test_a_rate_that_was_set(tmp_path: Path) -> None:
    whole = check_exact(tmp_path, "eager", task=Duel, callbacks=lambda: [SetsRates()])
    assert whole.trainer.rates.rate("generator/last", 9) == pytest.approx(0.005)


# ---------------------------------------------------------------------- what does not fit


class Renamed(Duel):
    """Calls the generator otherwise."""

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        return {"discriminator": made["discriminator"], "forger": made["generator"]}

    def training_step(self, batch: Any, batch_idx: int, optimizer_name: str) -> Any:
        name = {"forger": "generator"}.get(optimizer_name, optimizer_name)
        return super().training_step(batch, batch_idx, name)


class Alone(Duel):
    """Has one optimizer for all."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        return self.loss_of(batch[0], "discriminator")

    def configure_optimizers(self) -> Any:
        return flow.optim.Adam(self.parameters())


class OfAnotherKind(Duel):
    """The generator has another optimizer."""

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        made["generator"]["optimizer"] = flow.optim.SGD(self.generator_groups())
        return made


REFUSED: Dict[Any, str] = {
    Renamed: "has the optimizers 'discriminator' and 'generator', and configure_optimizers\\(\\) "
    "returns the optimizers 'discriminator' and 'forger'",
    Alone: "has the optimizers 'discriminator' and 'generator', and .* returns one optimizer",
    OfAnotherKind: "optimizer 'generator': .* was trained with Adam, and .* returns SGD",
    Thrice: "optimizer 'generator' has every_n_batches=3, and 2 in ",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the second batch."""
    whole = run("eager", task=Duel, save_to=tmp_path_factory.mktemp("saved"), max_steps=2)
    assert whole.saves is not None
    return next(path for path in reversed(whole.saves.files) if "batch" in path.name)


@pytest.mark.parametrize("task", REFUSED)
def test_other_optimizers_are_refused(task: Any, saved: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        quiet_trainer(max_epochs=2).fit(task(), shuffled()(1), ckpt_path=saved)
    sentence(error, REFUSED[task])


def test_a_run_with_one_optimizer_does_not_go_on_with_several(tmp_path: Path) -> None:
    path = tmp_path / "one"
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(Alone(), shuffled()(1))
    trainer.save_checkpoint(path)
    with pytest.raises(CheckpointError) as error:
        quiet_trainer(max_epochs=2).fit(Duel(), shuffled()(1), ckpt_path=path)
    sentence(error, "has one optimizer, and configure_optimizers\\(\\) returns the optimizers")
