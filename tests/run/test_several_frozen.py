"""Several optimizers: one whose parameters are all frozen makes no step, in both modes alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Iterator, List

import oneflow as flow
import pytest
from helpers import MODES, bits, fill_deterministically, quiet_trainer, random_rows, refused
from helpers.duels import Duel
from helpers.resuming import check_exact
from oneflow import nn
from oneflow.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from ofengine import Callback, ConfigurationError, TaskModule
from ofengine.callbacks import BackboneFinetuning, GradualUnfreezing, LRDecayCallback

EPOCHS, BATCHES = 3, 5
ROWS = random_rows([6] * BATCHES, 4)
LATE = {0: ["critic/group_0"], 1: ["maker/group_0"]}


class Pair(TaskModule):
    """Two layers, against each other."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.critic = nn.Linear(4, 4), nn.Linear(4, 1)
        self.called: List[str] = []
        fill_deterministically(self, 2, 0.5)

    def loss(self, batch: Any, name: str) -> Any:
        made = self.critic(self.maker(batch)).pow(2).mean()
        return made if name == "maker" else self.critic(batch).exp().mean() - made * 0.1

    def training_step(self, batch: Any, batch_idx: int, optimizer_name: str) -> Any:
        return self.loss(batch, optimizer_name)

    def configure_optimizers(self) -> Any:
        critic = flow.optim.SGD(self.critic.parameters(), lr=0.05, momentum=0.9)
        maker = flow.optim.SGD(self.maker.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        return {
            "critic": critic,
            "maker": {"optimizer": maker, "lr_scheduler": StepLR(maker, 4, 0.5)},
        }


class Weights(Callback):
    """The bits of all parameters, and which optimizers have stepped, by batch."""

    def __init__(self) -> None:
        self.rows: List[Dict[str, bytes]] = []
        self.stepped: List[List[str]] = []

    def on_train_batch_end(
        self, trainer: Any, task: Any, outputs: Dict[str, Any], batch: Any, i: int
    ) -> None:
        trainer.settle()
        self.rows.append(bits(task))
        self.stepped.append([name for name in outputs if name != "loss"])


class Freezes(Callback):
    """Freezes the maker in the middle of an epoch, twice."""

    frozen = (2, 3, 6, 7, 8)

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        task.maker.requires_grad_(trainer.batches_seen not in self.frozen)


def by_hand(frozen: Any) -> Iterator[Dict[str, bytes]]:
    task = Pair()
    made = task.configure_optimizers()
    maker, schedule = made["maker"]["optimizer"], made["maker"]["lr_scheduler"]
    for seen in range(EPOCHS * BATCHES):
        real = ROWS[seen % BATCHES]
        for name, optimizer in (("critic", made["critic"]), ("maker", maker)):
            if name == "critic" or seen not in frozen:
                task.loss(real, name).backward()
                optimizer.step()
                for parameter in task.parameters():
                    parameter.grad = None
        schedule.step()
        yield bits(task)


def trained(mode: str, *callbacks: Callback, task: Any = None, **arguments: Any) -> Weights:
    weights = Weights()
    trainer = quiet_trainer(
        mode=mode, max_epochs=EPOCHS, callbacks=[*callbacks, weights], **arguments
    )
    trainer.fit(task or Pair(), ROWS)
    return weights


@pytest.mark.parametrize(
    ("callback", "frozen"),
    [
        (lambda: GradualUnfreezing(LATE), range(BATCHES)),
        (Freezes, Freezes.frozen),
    ],
)
def test_it_is_what_a_loop_by_hand_makes_that_leaves_its_step_out(
    mode: str, callback: Any, frozen: Any
) -> None:
    weights = trained(mode, callback())
    assert weights.rows == [*by_hand(frozen)]
    both = ["critic", "maker"]
    assert weights.stepped == [
        both[:1] if seen in frozen else both for seen in range(EPOCHS * BATCHES)
    ]


def test_the_backbone_may_be_all_that_an_optimizer_has() -> None:
    rows = []
    for mode in MODES:
        finetuning = BackboneFinetuning(1, backbone="maker", backbone_initial_lr=0.01)
        rows.append(trained(mode, finetuning).rows)
    assert rows[0] == rows[1]
    maker = [row["maker.weight"] for row in rows[0]]
    assert len({*maker[:BATCHES]}) == 1 and len({*maker}) == 1 + 2 * BATCHES


def unfreezing() -> List[Callback]:
    """Adam with bias correction, two steps to one, decay."""
    late = {0: ["discriminator/group_0"], 1: ["generator/first", "generator/last"]}
    return [LRDecayCallback(every_n_batches=2), GradualUnfreezing(late)]


@pytest.mark.parametrize(("mode", "other"), [("graph", "eager"), ("eager", "graph")])
@pytest.mark.slow
def test_a_run_goes_on_from_before_and_behind_its_unfreezing(
    mode: str, other: str, tmp_path: Path
) -> None:
    check_exact(tmp_path, mode, other, task=Duel, seed=7, callbacks=unfreezing)


class Plateau(Pair):
    """The maker's rate falls where its own loss does not."""

    def training_step(self, batch: Any, batch_idx: int, optimizer_name: str) -> Any:
        loss = self.loss(batch, optimizer_name)
        self.log(f"{optimizer_name}_loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        maker = made["maker"]["optimizer"]
        plateau = ReduceLROnPlateau(maker, patience=0, threshold=9.0, threshold_mode="abs")
        monitored = {"scheduler": plateau, "monitor": "maker_loss_epoch", "interval": "epoch"}
        made["maker"] = {"optimizer": maker, "lr_scheduler": monitored}
        return made


def test_a_plateau_observes_nothing_while_it_is_frozen(mode: str) -> None:
    rates: List[float] = []

    class Rates(Callback):
        def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
            rates.append(trainer.rates.rate("maker/group_0", trainer.global_step))

    callbacks = [GradualUnfreezing(LATE), Rates()]
    quiet_trainer(mode=mode, max_epochs=5, callbacks=callbacks).fit(Plateau(), ROWS)
    # It looks for the first time behind the second epoch.
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.001])


class Rare(Pair):
    """The maker steps in every second batch."""

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        made["maker"]["every_n_batches"] = 2
        return made


def test_a_batch_in_which_nobody_steps_is_told(mode: str) -> None:
    frozen = Pair()
    frozen.requires_grad_(False)
    first = "all parameters of 'critic' and 'maker' are frozen, by requires_grad or a callback"
    refused(
        frozen, ConfigurationError, f"no optimizer steps in batch 0: {first}", mode=mode,
        train=ROWS,
    )  # fmt: skip
    early = GradualUnfreezing({0: ["maker/group_0"], 1: ["critic/group_0"]})
    text = (
        "no optimizer steps in batch 1: all parameters of 'critic' are frozen, .*such as "
        "GradualUnfreezing, and the turn of 'maker' comes in other batches: let those of one"
    )
    refused(
        Rare(), ConfigurationError, text, mode=mode, train=ROWS, callbacks=[early], trained=1
    )  # fmt: skip
