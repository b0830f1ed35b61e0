"""Several optimizers: what loops by hand over OneFlow alone compute, in both modes, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
import oneflow as flow
import pytest
from helpers import MODES, bits, fill_deterministically, quiet_trainer, random_rows
from helpers.duels import Duel, softplus
from helpers.resuming import shuffled
from oneflow import nn
from oneflow.optim.lr_scheduler import StepLR

from ofengine import Callback, TaskModule
from ofengine.callbacks import GradualUnfreezing, LearningRateMonitor, LRDecayCallback, ModelSummary
from ofengine.cli import main
from ofengine.modes import step_graphs

EPOCHS, BATCHES = 2, 5
ROWS = random_rows([6] * BATCHES, 4)
Bits = List[Dict[str, bytes]]


class Nets(nn.Module):
    """Two nets with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
        )
        self.discriminator = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1)
        )

    def critic_loss(self, real: Any) -> Any:
        made = self.generator(real.flip(0))
        return (
            softplus(-self.discriminator(real)).mean() + softplus(self.discriminator(made)).mean()
        )

    def generator_loss(self, real: Any) -> Any:
        return softplus(-self.discriminator(self.generator(real.flip(0)))).mean()

    def lower_layers(self) -> List[Any]:
        return [*self.generator[0].parameters(), *self.generator[1].parameters()]


class Gan(TaskModule):
    """The same with the engine: the discriminator steps twice where the generator does once."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.nets = Nets()
        self.options = options
        fill_deterministically(self, 3, 0.5)

    def training_step(self, batch: Any, batch_idx: int, optimizer_name: str) -> Any:
        if optimizer_name == "critic":
            return self.nets.critic_loss(batch)
        return self.nets.generator_loss(batch)

    def configure_optimizers(self) -> Any:
        groups = [
            {"name": "lower", "params": self.nets.lower_layers(), "lr": 0.02,
             "lr_scale": 0.3, "lr_decay_scale": 0.9},
            {"name": "upper", "params": self.nets.generator[3].parameters(), "lr": 0.02},
        ]  # fmt: skip
        critic = flow.optim.Adam(
            self.nets.discriminator.parameters(), lr=0.03, betas=(0.5, 0.9), **self.options
        )
        generator = flow.optim.Adam(groups, betas=(0.0, 0.99), **self.options)
        return {
            "critic": {"optimizer": critic, "lr_scheduler": StepLR(critic, 3, 0.5)},
            "generator": {
                "optimizer": generator, "every_n_batches": 2, "gradient_clip_val": 0.05,
            },
        }  # fmt: skip


class Weights(Callback):
    """The bits of all parameters and buffers after each batch."""

    def __init__(self) -> None:
        self.rows: Bits = []

    def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
        trainer.settle()
        self.rows.append(bits(task))


def trained(task: Any, mode: str, *callbacks: Callback, **arguments: Any) -> Bits:
    weights = Weights()
    arguments = {"max_epochs": EPOCHS, **arguments}
    trainer = quiet_trainer(mode=mode, callbacks=[*callbacks, weights], **arguments)
    trainer.fit(task, ROWS)
    return weights.rows


# ---------------------------------------------------------------------- by hand


def by_hand(first: Any) -> Iterator[Dict[str, bytes]]:
    """Eager OneFlow alone: layerwise rates with decay, a schedule, clipping, two to one."""
    holder = nn.Module()
    holder.nets = nets = Nets()
    holder.load_state_dict(first)
    options: Dict[str, Any] = {"do_bias_correction": False}
    critic = flow.optim.Adam(nets.discriminator.parameters(), lr=0.03, betas=(0.5, 0.9), **options)
    schedule = StepLR(critic, 3, 0.5)
    groups = [{"params": nets.lower_layers()}, {"params": nets.generator[3].parameters()}]
    generator = flow.optim.Adam(groups, lr=0.02, betas=(0.0, 0.99), **options)
    lr = 0.02
    for index, real in [*enumerate(ROWS)] * EPOCHS:
        nets.critic_loss(real).backward()
        critic.step()
        schedule.step()
        critic.zero_grad(set_to_none=True)
        generator.zero_grad(set_to_none=True)
        if index % 2 == 0:
            generator.param_groups[0]["lr"] = float(np.float32(lr) * np.float32(0.3))
            nets.generator_loss(real).backward()
            nn.utils.clip_grad_norm_(nets.generator.parameters(), 0.05)
            generator.step()
            critic.zero_grad(set_to_none=True)
            generator.zero_grad(set_to_none=True)
        if index % 3 == 0:
            lr *= 0.9
        yield bits(holder)


def test_a_loop_by_hand_has_the_same_weights_after_every_step(mode: str) -> None:
    task = Gan(do_bias_correction=False)
    expected = [*by_hand(task.state_dict())]
    assert trained(task, mode, LRDecayCallback(every_n_batches=3)) == expected
    assert len({row["nets.generator.0.weight"] for row in expected}) == EPOCHS * 3  # 0, 2, 4 of 5


class GraphByHand(nn.Graph):
    """One step of one of the optimizers, as OneFlow compiles it."""

    def __init__(self, nets: Any, loss: str, optimizer: Any, schedule: Any = None) -> None:
        super().__init__()
        self.nets, self.loss = nets, loss
        self.add_optimizer(optimizer, **({} if schedule is None else {"lr_sch": schedule}))

    def build(self, real: Any) -> Any:
        generator, discriminator = self.nets.generator, self.nets.discriminator
        made = discriminator(generator(real.flip(0)))
        if self.loss == "critic":
            loss = softplus(-discriminator(real)).mean() + softplus(made).mean()
        else:
            loss = softplus(-made).mean()
        loss.backward()
        return loss


class Plain(Gan):
    """No decay, clipping or layer that a graph by hand would call twice."""

    def __init__(self) -> None:
        super().__init__()
        self.nets.discriminator[1] = nn.Identity()

    def configure_optimizers(self) -> Any:
        critic, generator = optimizers_of(self.nets)
        return {
            "critic": {"optimizer": critic, "lr_scheduler": StepLR(critic, 3, 0.5)},
            "generator": {"optimizer": generator, "every_n_batches": 2},
        }


def optimizers_of(nets: Nets) -> Tuple[Any, Any]:
    """With bias correction, which graphs and eager OneFlow round otherwise."""
    groups = [
        {"name": "lower", "params": nets.lower_layers(), "lr": 0.02, "lr_scale": 0.3},
        {"name": "upper", "params": nets.generator[3].parameters(), "lr": 0.02},
    ]
    critic = flow.optim.Adam(nets.discriminator.parameters(), lr=0.03, betas=(0.5, 0.9))
    return critic, flow.optim.AdamW(groups, betas=(0.5, 0.99), weight_decay=0.1)


def test_two_graphs_by_hand_have_the_same_weights_after_every_step() -> None:
    task = Plain()
    holder = nn.Module()
    holder.nets = nets = Nets()
    nets.discriminator[1] = nn.Identity()
    holder.load_state_dict(task.state_dict())
    critic, generator = optimizers_of(nets)
    graphs = {
        "critic": GraphByHand(nets, "critic", critic, StepLR(critic, 3, 0.5)),
        "generator": GraphByHand(nets, "generator", generator),
    }
    expected = []
    for index, real in [*enumerate(ROWS)] * EPOCHS:
        for name, graph in graphs.items():
            if name == "critic" or index % 2 == 0:
                for parameter in holder.parameters():
                    parameter.grad = None  # or the second graph cannot be compiled
                graph(real)
        flow._oneflow_internal.eager.Sync()
        expected.append(bits(holder))
    for mode in MODES:
        ours = trained(Plain(), mode)
        tracked = "nets.generator.1.num_batches_tracked"  # which graphs by hand leave alone
        for row, other in zip(ours, expected):
            assert np.frombuffer(row.pop(tracked), np.int64)[0] > 0
            other = {name: each for name, each in other.items() if name != tracked}
            assert row == other
        assert len(ours) == len(expected)


# ---------------------------------------------------------------------- both modes


def duel(mode: str, *callbacks: Callback, **arguments: Any) -> Tuple[Any, Bits, Any]:
    """Dropout, batch norm, validation, decay: (trainer, weights, task)."""
    np.random.seed(0)
    flow.manual_seed(0)
    weights, task = Weights(), Duel()
    fill_deterministically(task, 1, 0.5)
    given = [LRDecayCallback(every_n_batches=2), *callbacks, weights]
    trainer = quiet_trainer(
        mode=mode, callbacks=given, log_every_n_steps=1,
        **{"max_epochs": 2, "seed": 4, **arguments},
    )  # fmt: skip
    trainer.fit(task, shuffled()(3), [ROWS[:2]])
    return trainer, weights.rows, task


class Rates(Callback):
    """The rates of each batch's step, by group."""

    def __init__(self) -> None:
        self.rows: List[Dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        plan = trainer.rates
        self.rows.append(dict(zip(plan.names, plan.rates(trainer.global_step - 1))))


def test_both_modes_train_the_same_and_log_the_same() -> None:
    logged, rows = [], []
    for mode in MODES:
        trainer, weights, task = duel(mode, LearningRateMonitor(), ModelSummary(), Rates())
        rows.append(weights)
        logged.append(dict(trainer.callback_metrics))
        assert trainer.global_step == len(weights) == 10
        assert all(parameter.requires_grad for parameter in task.parameters())
        assert all(parameter.grad is None for parameter in task.parameters())
    assert rows[0] == rows[1]
    assert logged[0] == logged[1]
    assert {"lr/generator/first", "lr/discriminator/group_0", "generator_loss_epoch"} <= set(
        logged[0]
    )


def test_validation_may_be_in_the_other_mode() -> None:
    (_, ours, _), (_, theirs, _) = duel("eager", eval_mode="graph"), duel("eager")
    assert ours == theirs


class Shared(Gan):
    """Both nets begin with one layer, which the generator's optimizer has."""

    def __init__(self) -> None:
        super().__init__()
        self.nets.discriminator[0] = self.nets.generator[0]

    def configure_optimizers(self) -> Any:
        nets = self.nets
        return {
            "critic": flow.optim.SGD(nets.discriminator[1:].parameters(), lr=0.1, momentum=0.5),
            "generator": flow.optim.SGD(nets.generator.parameters(), lr=0.1, weight_decay=0.1),
        }


def test_a_layer_of_both_nets_trains_with_the_optimizer_that_has_it(mode: str) -> None:
    task = Shared()
    holder = nn.Module()
    holder.nets = nets = Nets()
    nets.discriminator[0] = nets.generator[0]
    holder.load_state_dict(task.state_dict())
    critic = flow.optim.SGD(nets.discriminator[1:].parameters(), lr=0.1, momentum=0.5)
    generator = flow.optim.SGD(nets.generator.parameters(), lr=0.1, weight_decay=0.1)
    expected = []
    for real in ROWS * EPOCHS:
        for optimizer, loss in ((critic, nets.critic_loss), (generator, nets.generator_loss)):
            loss(real).backward()
            optimizer.step()
            for parameter in nets.parameters():
                parameter.grad = None
        expected.append(bits(holder))
    assert trained(task, mode) == expected


def test_what_the_preview_shows_is_what_was_trained_with(mode: str) -> None:
    seen = Rates()
    _, _, task = duel(mode, seen)
    preview = quiet_trainer(
        mode=mode, max_epochs=2, callbacks=[LRDecayCallback(every_n_batches=2)]
    ).preview(task, steps_per_epoch=5)
    assert [preview.at(step) for step in range(10)] == seen.rows
    assert "generator/first" in str(preview) and preview.draw()
    # The first step in an epoch, then every second: events follow the batches 0, 2 and 4.
    decay = [0.9**events for events in (0, 0, 1, 1, 2, 3, 3, 4, 4, 5)]
    expected = [np.float32(0.02 * each) * np.float32(0.3) for each in decay]
    assert [row["generator/first"] for row in seen.rows] == pytest.approx(expected, rel=1e-6)
    halves = [0.03 * 0.5 ** (step // 3) for step in range(10)]
    assert [row["discriminator/group_0"] for row in seen.rows] == pytest.approx(halves, rel=1e-6)


def test_groups_may_be_unfrozen_one_after_the_other() -> None:
    later = {0: ["discriminator/group_0", "generator/last"], 1: ["generator/first"]}
    rows = [duel(mode, GradualUnfreezing(later))[1] for mode in MODES]
    assert rows[0] == rows[1]
    first = [row["generator.0.weight"] for row in rows[0]]
    assert len({*first[:5]}) == 1
    assert len({*first}) == 4  # the batches 0, 2 and 4 of the second epoch


def test_a_rate_may_be_set() -> None:
    class Sets(Callback):
        def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
            if trainer.batches_seen == 4:
                trainer.set_lr("generator/last", 0.5)

    rows = [duel(mode, Sets())[1] for mode in MODES]
    assert rows[0] == rows[1]
    other = duel("eager")[1]
    assert rows[0][:4] == other[:4] and rows[0][4] != other[4]


def test_the_commands_show_each_optimizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "saved.safetensors"
    trainer, _, _ = duel("eager", max_epochs=1)
    trainer.save_checkpoint(path)
    assert main(["checkpoint", str(path)]) == 0
    said = capsys.readouterr().out
    assert "discriminator: Adam, 5 steps" in said and "generator: Adam, 3 steps" in said
    file = tmp_path / "gan.py"
    file.write_text("from helpers.duels import Duel\n\n\nclass Mine(Duel):\n    pass\n")
    assert main(["rates", f"{file}:Mine", "--steps-per-epoch", "5"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in trainer.rates.names)


def test_where_the_time_goes(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    duel(mode, max_epochs=1, profiler="simple")
    said = capsys.readouterr().out
    assert "step: training discriminator" in said and "step: training generator" in said


@pytest.mark.slow
def test_the_proof_of_a_task(tmp_path: Path) -> None:
    report = quiet_trainer(seed=1).prove(Duel(), shuffled()(2), steps=4)
    assert report.equal, str(report)


# ---------------------------------------------------------------------- one batch


class Looks(Callback):
    """What is so inside the steps, in eager mode."""

    def __init__(self) -> None:
        self.inside: List[Any] = []
        self.updates = 0

    def on_before_optimizer_step(self, trainer: Any, task: Any, optimizer: Any) -> None:
        own = {id(p) for group in optimizer.param_groups for p in group.parameters}
        name = next(n for n, each in trainer.optimizers.items() if each is optimizer)
        having = {n for n, p in task.named_parameters() if p.grad is not None}
        assert having == {n for n, p in task.named_parameters() if id(p) in own}
        assert having == {n for n, p in task.named_parameters() if p.requires_grad}
        self.inside.append(name)

    def on_after_optimizer_step(self, trainer: Any, task: Any) -> None:
        self.updates += 1


def test_only_its_own_parameters_have_gradients_in_a_step() -> None:
    looks = Looks()
    trainer, _, _ = duel("eager", looks, max_epochs=1)
    both = ["discriminator", "generator"]
    assert looks.inside == [*both, "discriminator", *both, "discriminator", *both]
    assert looks.updates == 5
    assert list(trainer.optimizers) == both
    assert len(trainer.param_groups) == len(trainer.rates.names) == 3
    assert len(trainer.parameters) == 12


class Graphs(Callback):
    """The graphs that were compiled."""

    def __init__(self) -> None:
        self.seen: List[Any] = []

    def on_before_graph_compile(self, trainer: Any, task: Any, graph: Any) -> None:
        self.seen.append(graph)


def test_no_graph_computes_a_gradient_of_another_one_s_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes, weights = [], []
    for hold in (step_graphs.hold, lambda *_: None):
        monkeypatch.setattr(step_graphs, "hold", hold)
        graphs = Graphs()
        weights.append(trained(Gan(), "graph", graphs, max_steps=1))
        sizes.append([len(each._full_job_proto.net.op) for each in graphs.seen])
    assert [len(each) for each in sizes] == [2, 2]  # one for each optimizer
    assert all(held < computed for held, computed in zip(*sizes))
    assert weights[0] == weights[1]


class Keeps(Callback):
    """What each batch returned."""

    def __init__(self) -> None:
        self.outputs: List[Any] = []

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, *_: Any) -> None:
        self.outputs.append(outputs)


def test_what_a_batch_returns(mode: str) -> None:
    keeps = Keeps()
    duel(mode, keeps, max_epochs=1)
    for index, outputs in enumerate(keeps.outputs):
        names = {"discriminator", "generator"} if index % 2 == 0 else {"discriminator"}
        assert set(outputs) == {"loss", *names}
        own = [outputs[name] for name in sorted(names)]
        losses = [each["loss"].numpy() for each in own]
        assert outputs["loss"].numpy() == np.sum(losses, dtype=np.float32)
        for each in own:
            assert each["twice"].numpy() == 2 * each["loss"].numpy()


def test_what_trains_is_as_before_after_an_error() -> None:
    class Fails(Duel):
        def training_step(self, batch: Any, batch_idx: int, optimizer_name: str) -> Any:
            raise ZeroDivisionError

    task = Fails()
    with pytest.raises(ZeroDivisionError):
        quiet_trainer(max_epochs=1).fit(task, shuffled()(1))
    assert all(parameter.requires_grad for parameter in task.parameters())


class Clipped(Gan):
    """Both optimizers clip by ``clip``."""

    def __init__(self, clip: Optional[float]) -> None:
        super().__init__()
        self.clip = clip

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        for options in made.values():
            options["gradient_clip_val"] = self.clip
        return made


def test_clipping_is_each_ones_own_or_the_trainer_s() -> None:
    own, of_all = trained(Clipped(0.05), "eager"), trained(Gan(), "eager", gradient_clip_val=0.05)
    without = trained(Clipped(None), "eager", gradient_clip_val=0.05)
    assert own == of_all != without
    assert without == trained(Clipped(None), "graph", gradient_clip_val=0.05)
