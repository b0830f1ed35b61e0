"""What steps are composed of: layers called twice, parts computed again, nets beside the task."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import assert_same_weights, fill_deterministically, quiet_trainer
from oneflow import nn
from oneflow.utils.checkpoint import checkpoint

from ofengine import Callback, GraphModeError, OFEngineError, OFEngineWarning, TaskModule


class Stepped(TaskModule):
    def __init__(self, step: Any, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        fill_deterministically(self, spread=0.3)
        self.step = step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.step(self, batch))

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1, momentum=0.5)


def rows(count: int = 4, size: int = 6) -> List[Any]:
    generator = np.random.RandomState(0)
    return [flow.tensor(generator.randn(size, 4).astype("f4")) for _ in range(count)]


def by_hand(task: Stepped, batches: List[Any], accumulate: int = 1) -> None:
    """OneFlow's own eager loop."""
    optimizer = task.configure_optimizers()
    for index, batch in enumerate(batches):
        (
            task.step(task, batch) / accumulate if accumulate > 1 else task.step(task, batch)
        ).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def views(task: Any, batch: Any) -> Any:
    return (task.norm(task.net(batch)) * task.norm(task.net(batch * 0.5 + 1))).mean()


@pytest.mark.parametrize("eval_mode", ["eager", "graph"])
def test_a_validation_in_the_middle_of_an_accumulation_window(mode: str, eval_mode: str) -> None:
    """That it is compiled there takes nothing from the window's gradients."""

    def made() -> Stepped:
        return Stepped(lambda task, batch: task.net(batch).square().mean(), net=nn.Linear(4, 4))

    hand, task = made(), made()
    by_hand(hand, rows(6), 3)
    trainer = quiet_trainer(
        mode=mode, eval_mode=eval_mode, max_epochs=1, accumulate_grad_batches=3,
        val_check_interval=2, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(task, rows(6), rows(1))
    assert_same_weights(hand, task)


def three_views(task: Any, batch: Any) -> Any:
    first, second = task.norm(batch), task.norm(batch * 2)
    return ((first - second) * task.norm(task.net(batch - 1))).mean()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("momentum", [0.1, 0.3])
@pytest.mark.parametrize("step", [views, three_views])
def test_a_batch_norm_called_more_than_once(
    step: Any, momentum: float, accumulate: int, mode: str
) -> None:
    def made() -> Stepped:
        return Stepped(step, net=nn.Linear(4, 4), norm=nn.BatchNorm1d(4, momentum=momentum))

    hand, task = made(), made()
    by_hand(hand, rows(), accumulate)
    trainer = quiet_trainer(mode=mode, max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(task, rows())
    assert_same_weights(hand, task)


def test_a_batch_norm_called_twice_and_batches_of_two_sizes(mode: str) -> None:
    def made() -> Stepped:
        return Stepped(views, net=nn.Linear(4, 4), norm=nn.BatchNorm1d(4))

    hand, task = made(), made()
    batches = [*rows(2), *rows(1, size=3), *rows(2)]
    by_hand(hand, batches)
    quiet_trainer(mode=mode, max_epochs=1).fit(task, batches)
    assert_same_weights(hand, task)


def test_parts_that_are_computed_again(mode: str) -> None:
    def step(task: Any, batch: Any) -> Any:
        return checkpoint(lambda x: flow.tanh(task.net(x)), batch).mean()

    def made() -> Stepped:
        return Stepped(step, net=nn.Linear(4, 4))

    hand, task = made(), made()
    by_hand(hand, rows())
    quiet_trainer(mode=mode, max_epochs=1).fit(task, rows())
    assert_same_weights(hand, task)


class Adversary(TaskModule):
    """A generator; its discriminator is in a tuple, and steps eagerly in a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(200, 200)
        self.others = (nn.Linear(200, 200),)
        for module in (self.net, *self.others):
            fill_deterministically(module, spread=0.05)
        self.second = flow.optim.SGD(self.others[0].parameters(), lr=0.1)
        self.losses: List[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.others[0](self.net(batch)) ** 2).mean()

    def improve(self, batch: Any) -> None:
        for _ in range(3):
            ((self.others[0](batch) - 1) ** 2).mean().backward()
            self.second.step()
            self.second.zero_grad(set_to_none=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"].numpy()))
        self.improve(batch)

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1)


def told_of_gradients(mode: str) -> Any:
    match = r"Adversary reads 2 tensor\(s\) that train .*zero_grad\(\) .*on_save_checkpoint"
    return pytest.warns(OFEngineWarning, match=match) if mode == "graph" else nullcontext()


@pytest.mark.filterwarnings("ignore::ofengine.OFEngineWarning")
def test_a_net_beside_the_task_that_a_hook_updates(mode: str) -> None:
    generator = np.random.RandomState(0)
    batches = [flow.tensor(generator.randn(64, 200).astype("f4")) for _ in range(5)]
    hand, expected = Adversary(), []
    optimizer = hand.configure_optimizers()
    for batch in batches:
        loss = hand.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        hand.others[0].zero_grad(set_to_none=True)
        expected.append(float(loss.numpy()))
        hand.improve(batch)
    task = Adversary()
    with told_of_gradients(mode):
        quiet_trainer(mode=mode, max_epochs=1).fit(task, batches)
    if mode == "graph":  # eager mode leaves the step's gradients in the other net, as OneFlow does
        assert task.losses == expected
        assert_same_weights(task, hand)
    quiet_trainer(mode=mode, max_epochs=1).fit(task, batches)  # nothing lazy was left behind
    task.others[0].to("cpu")


class Careful(Adversary):
    """As the warning says: the step's gradients are dropped first, and the rest is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.second = flow.optim.Adam(self.others[0].parameters(), lr=0.01)

    def improve(self, batch: Any) -> None:
        for _ in range(2):
            self.second.zero_grad(set_to_none=True)
            ((self.others[0](batch) - 1) ** 2).mean().backward()
            self.second.step()

    def on_save_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        checkpoint["net"] = self.others[0].state_dict()
        moments = self.second.state_dict()["state"]
        checkpoint["steps"] = moments.pop("step")
        checkpoint["moments"] = {str(number): each for number, each in moments.items()}

    def on_load_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        given = {name: flow.tensor(each) for name, each in checkpoint["net"].items()}
        self.others[0].load_state_dict(given)
        state = self.second.state_dict()
        for number, each in checkpoint["moments"].items():
            state["state"][int(number)] = {key: flow.tensor(value) for key, value in each.items()}
        state["state"]["step"] = checkpoint["steps"]
        self.second.load_state_dict(state)


@pytest.mark.filterwarnings("ignore::ofengine.OFEngineWarning")
def test_a_net_beside_the_task_resumed_as_the_warnings_say(tmp_path: Path, mode: str) -> None:
    """Both modes are the loop by hand, and so is a run that was stopped, to the bit."""
    batches = rows(6, 8)
    batches = [flow.tensor(np.tile(each.numpy(), (1, 50))) for each in batches]
    hand = Careful()
    optimizer = hand.configure_optimizers()
    for batch in batches:
        hand.training_step(batch, 0).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        hand.improve(batch)

    class Saves(Callback):
        fires_last = True

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "x.safetensors")

    whole, rest = Careful(), Careful()
    quiet_trainer(mode=mode, max_epochs=1, callbacks=[Saves()]).fit(whole, batches)
    quiet_trainer(mode=mode, max_epochs=1).fit(rest, batches, ckpt_path=tmp_path / "x.safetensors")
    for task in (whole, rest):
        assert_same_weights(task, hand)
        assert_same_weights(task.others[0], hand.others[0])


def test_what_a_net_beside_the_task_had_come_to_is_told_where_nobody_keeps_it(
    tmp_path: Path, mode: str
) -> None:
    batches = [flow.tensor(np.tile(each.numpy(), (1, 50))) for each in rows(2, 8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(mode=mode, max_epochs=1)
        trainer.fit(Adversary(), batches)
    trainer.save_checkpoint(tmp_path / "x.safetensors")
    with pytest.warns(OFEngineWarning, match=r"Adversary\.(others|second).*on_save_checkpoint"):
        quiet_trainer(mode=mode, max_epochs=2).fit(
            Adversary(), batches, ckpt_path=tmp_path / "x.safetensors"
        )


def test_numbers_that_depend_on_what_is_computed_are_told() -> None:
    def step(task: Any, batch: Any) -> Any:
        chosen = flow.multinomial(flow.softmax(task.net(batch), 1).detach(), 2, replacement=True)
        return task.net(batch).mean() * chosen.float().mean()

    task = Stepped(step, net=nn.Linear(4, 4))
    with pytest.warns(OFEngineWarning, match="multinomial"):
        quiet_trainer(mode="graph", max_epochs=1).fit(task, rows(1))


def test_the_two_zeros_of_a_batch_s_constant(mode: str) -> None:
    class Signed(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(flow.zeros(1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            sign = float(np.copysign(1.0, batch["constant"]))
            return (self.weight * batch["x"]).sum() * sign

        def configure_optimizers(self) -> Any:
            return flow.optim.SGD(self.param_groups(), lr=1.0)

    task = Signed()
    data = [{"x": flow.ones(1), "constant": zero} for zero in (0.0, -0.0, -0.0)]
    quiet_trainer(mode=mode, max_epochs=1).fit(task, data)
    assert task.weight.item() == 1.0


# ---------------------------------------------------------------------- the user's batches


VIEWS = {
    "neighbours of a sequence": lambda table: (table[:, :-1], table[:, 1:]),
    "two columns": lambda table: (table[:, ::2], table[:, 1::2]),
    "transposed": lambda table: (table.t()[:3].t(), table[:, :3]),
    "split": lambda table: tuple(table.split(3, dim=1)),
    "rows": lambda table: (table[1:4, :3], table[2:5, 3:]),
}


@pytest.mark.parametrize("view", VIEWS)
def test_batches_that_are_views_are_read_right_and_left_alone(view: str, mode: str) -> None:
    generator = np.random.RandomState(0)
    tables = [flow.tensor(generator.randn(6, 6).astype("f4")) for _ in range(3)]
    kept = [table.numpy().copy() for table in tables]

    class Two(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(flow.zeros(1))
            self.seen: List[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            first, second = batch
            return (self.weight * first - second).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("sum", batch[0].sum())

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch[0] * 1.0

        def configure_optimizers(self) -> Any:
            return flow.optim.SGD(self.param_groups(), lr=0.1)

    batches = [VIEWS[view](table) for table in tables]
    hand, task = Two(), Two()
    copies = [tuple(each.contiguous() for each in pair) for pair in batches]
    optimizer = hand.configure_optimizers()
    for pair in copies:
        hand.training_step(pair, 0).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(task, batches)
    assert_same_weights(hand, task)
    predicted = trainer.predict(task, batches)
    for each, (first, _) in zip(predicted, copies):
        assert each.numpy().tobytes() == first.numpy().tobytes()
    trainer.validate(task, batches)
    for table, before in zip(tables, kept):
        assert table.numpy().tobytes() == before.tobytes()


# ---------------------------------------------------------------------- mistakes


MISTAKES = {
    "difference": lambda a, b: a - b,
    "product": lambda a, b: a * b,
    "power": lambda a, b: a**b,
    "comparison": lambda a, b: (a > b).float(),
    "maximum": lambda a, b: flow.maximum(a, b),
    "a loss": lambda a, b: nn.MSELoss()(a, b),
    "another loss": lambda a, b: nn.L1Loss()(a, b),
    "addcmul": lambda a, b: flow.addcmul(a, b, a),
    "in place": lambda a, b: (a * 1).sub_(b),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_shapes_that_do_not_broadcast_are_an_error_with_the_user_s_line(
    mistake: str, mode: str
) -> None:
    def step(task: Any, batch: Any) -> Any:
        return MISTAKES[mistake](task.net(batch), flow.ones(5, 4)).mean()

    task = Stepped(step, net=nn.Linear(4, 4))
    with pytest.raises((OFEngineError, RuntimeError)) as error:
        quiet_trainer(mode=mode, max_epochs=1).fit(task, rows(1, size=3))
    if mode == "graph":
        assert "test_composition.py" in str(error.value)
    task.step = lambda task, batch: task.net(batch).mean()
    quiet_trainer(mode=mode, max_epochs=1).fit(task, rows(1))  # the process is as well as before


def test_an_empty_tensor_in_a_batch_is_told() -> None:
    task = Stepped(lambda task, batch: task.net(batch[0]).mean(), net=nn.Linear(4, 4))
    with pytest.raises(GraphModeError, match=r"empty tensor, of shape \(0, 4\)"):
        quiet_trainer(mode="graph", max_epochs=1).fit(task, [(flow.ones(2, 4), flow.zeros(0, 4))])
    quiet_trainer(mode="eager", max_epochs=1).fit(task, [(flow.ones(2, 4), flow.zeros(0, 4))])


def test_a_tensor_of_the_task_after_a_step_that_failed() -> None:
    def fails(task: Any, batch: Any) -> Any:
        raise ValueError(str((task.net(batch) * task.factor).shape))

    task = Stepped(fails, net=nn.Linear(4, 4))
    task.factor = flow.ones(4) * 2
    with pytest.raises(GraphModeError, match="ValueError"):
        quiet_trainer(mode="graph", max_epochs=1).fit(task, rows(1))
    task.step = lambda task, batch: (task.net(batch) * task.factor).mean()
    quiet_trainer(mode="graph", max_epochs=1).fit(task, rows(1))
