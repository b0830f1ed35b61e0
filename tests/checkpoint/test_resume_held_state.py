"""What a task and callbacks hold beside parameters and buffers comes back, or is told."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import numpy as np
import oneflow as flow
import pytest
from helpers import bits
from helpers.stopping import Mean, check_stopping, run_once
from oneflow import nn
from oneflow.optim.lr_scheduler import StepLR

from ofengine import Callback, CheckpointError, OFEngineWarning, TaskModule
from ofengine.checkpoint import read, write


def train() -> Any:
    return [flow.ones(1) * n for n in (1.0, 2.0, 3.0)]


def validation() -> Any:
    return [flow.ones(1)]


# ---------------------------------------------------------------------- tensors


class Held(TaskModule):
    """A step multiplies its loss by a tensor, which it changes, and which is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(flow.zeros(1))
        self.hold()

    def hold(self) -> None:
        raise NotImplementedError

    def change(self) -> Any:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.weight * batch * self.change()).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", batch.mean())


class NotPersistent(Held):
    def hold(self) -> None:
        self.register_buffer("center", flow.zeros(1), persistent=False)

    def change(self) -> Any:
        return self.center.add_(1.0)


class AssignedAnew(NotPersistent):
    def change(self) -> Any:
        self.center = self.center + 1.0
        return self.center


class OfAModule(Held):
    def hold(self) -> None:
        self.layer = nn.Sequential(nn.Identity())
        self.layer[0].register_buffer("center", flow.zeros(1), persistent=False)

    def change(self) -> Any:
        return self.layer[0].center.add_(1.0)


class Attribute(Held):
    def hold(self) -> None:
        self.center = flow.zeros(1)

    def change(self) -> Any:
        return self.center.add_(1.0)


class MadeInTheFirstStep(Held):
    def hold(self) -> None:
        self.center: Any = None

    def change(self) -> Any:
        self.center = flow.ones(1) if self.center is None else self.center + 1.0
        return self.center


class InAList(Held):
    def hold(self) -> None:
        self.centers = [flow.zeros(1)]

    def change(self) -> Any:
        return self.centers[0].add_(1.0)


class InADict(Held):
    def hold(self) -> None:
        self.centers = {"a.b": flow.zeros(1)}

    def change(self) -> Any:
        return self.centers["a.b"].add_(1.0)


class MadeWhereTrainingStarts(Held):
    def hold(self) -> None:
        pass

    def on_train_start(self) -> None:
        self.center = flow.zeros(1)

    def change(self) -> Any:
        return self.center.add_(1.0)


class WholeNumbers(Held):
    def hold(self) -> None:
        self.register_buffer("count", flow.zeros(1, dtype=flow.int64), persistent=False)

    def change(self) -> Any:
        return self.count.add_(1).to(flow.float32)


HELD = [
    NotPersistent, AssignedAnew, OfAModule, Attribute, MadeInTheFirstStep, InAList, InADict,
    MadeWhereTrainingStarts, WholeNumbers,
]  # fmt: skip


def by_hand(epochs: int) -> float:
    """Steps t = 1, 2, ... take off 0.001 * t times 1, 2, 3, 1, ..."""
    return -0.001 * sum(t * ((t - 1) % 3 + 1) for t in range(1, 3 * epochs + 1))


@pytest.mark.parametrize("task", HELD)
def test_a_tensor_that_steps_change_comes_back(task: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", OFEngineWarning)
        every = 1 if task is HELD[0] else 3  # a third of the moments, after batches and validation
        whole = check_stopping(
            tmp_path, "eager", train, validation, every=every, task=task, max_epochs=2
        )
    assert whole.task.weight.item() == pytest.approx(by_hand(2), rel=1e-5)


class ChangedByAHook(NotPersistent):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.center.add_(1.0)

    def change(self) -> Any:
        return self.center


@pytest.mark.parametrize("other", ["eager", "graph"])
def test_in_graph_mode_and_across_the_modes(mode: str, other: str, tmp_path: Path) -> None:
    whole = check_stopping(
        tmp_path, mode, train, validation, every=3, other=other, task=ChangedByAHook, max_epochs=2
    )
    assert whole.task.weight.item() == pytest.approx(by_hand(2), rel=1e-5)


def test_a_run_that_is_resumed_twice_still_has_it(tmp_path: Path) -> None:
    # The second time it has not changed since the run was resumed.
    class Once(NotPersistent):
        def change(self) -> Any:
            if self.trainer.global_step == 0:
                self.center.add_(5.0)
            return self.center

    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    whole, saved = run_once("eager", train, task=Once, save_to=first)
    path = next(path for path, _ in saved if "epoch_end" in path.name)
    _, again = run_once("eager", train, task=Once, resume_from=path, save_to=second)
    for path, _ in again:
        resumed, _ = run_once("eager", train, task=Once, resume_from=path)
        assert resumed.bits == whole.bits, path.name


class Constant(Held):
    def hold(self) -> None:
        self.register_buffer("mask", flow.ones(300, 300), persistent=False)
        self.table = flow.ones(300, 300)

    def change(self) -> Any:
        return self.mask[0, 0] * self.table[0, 0]


def test_what_nothing_changes_is_not_in_the_file(tmp_path: Path) -> None:
    _, saved = run_once("eager", train, task=Constant, save_to=tmp_path)
    assert all(path.stat().st_size < 100_000 for path, _ in saved)


class Activations(Held):
    """Keeps large activations to look at: not worth a place in each checkpoint."""

    def hold(self) -> None:
        self.last: Any = None

    def change(self) -> Any:
        self.last = flow.ones(400, 400) * self.trainer.global_step
        return 1.0


def test_a_large_tensor_that_was_not_there_is_told_instead(tmp_path: Path) -> None:
    _, saved = run_once("eager", train, task=Activations, save_to=tmp_path)
    path = saved[-2][0]
    assert path.stat().st_size < 100_000
    with pytest.warns(OFEngineWarning, match=r"Activations\.last.*on_save_checkpoint"):
        run_once("eager", train, task=Activations, resume_from=path)


def test_one_of_another_shape_is_refused_before_anything_changes(tmp_path: Path) -> None:
    class Wider(NotPersistent):
        def hold(self) -> None:
            self.register_buffer("center", flow.zeros(2), persistent=False)

    _, saved = run_once("eager", train, task=NotPersistent, save_to=tmp_path)
    task = Wider()
    before = bits(task)
    with pytest.raises(CheckpointError, match=r"the tensor 'center'.*of the shape \(2,\)"):
        run_once("eager", train, task=lambda: task, resume_from=saved[-1][0])
    assert bits(task) == before


def test_a_file_makes_no_attributes(tmp_path: Path) -> None:
    _, saved = run_once("eager", train, task=NotPersistent, save_to=tmp_path)
    found = read(saved[-1][0])
    assert found.state is not None
    for name in ("training_step", "anything", "weight", "layer.weight", "trainer"):
        found.state["tensors"][name] = np.ones(1, dtype="float32")
    path = write(tmp_path / "other.safetensors", found.weights, found.state)
    with pytest.warns(OFEngineWarning, match=r"NotPersistent\.training_step"):
        ran, _ = run_once("eager", train, task=NotPersistent, resume_from=path)
    assert not {"training_step", "anything", "trainer"} & set(vars(ran.task))


# ---------------------------------------------------------------------- optimizers


class Adversary(Mean):
    """Steps a second optimizer in a hook, as a GAN may do."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(flow.ones(2))
        self.second = flow.optim.Adam([self.other], lr=0.5)

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD([self.weight], lr=0.125)

    def param_groups(self) -> List[Dict[str, Any]]:
        return [{"params": [self.weight]}]

    def setup(self, stage: str) -> None:
        self.other.requires_grad_(False)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with flow.enable_grad():
            other = self.other.detach().clone().requires_grad_(True)
            ((other - self.weight.detach() * batch) ** 2).sum().backward()
        self.other.grad = other.grad
        self.second.step()
        self.other.grad = None
        self.second.param_groups[0]["lr"] *= 0.9


class Steps(Callback):
    """As :class:`Adversary`, but of a callback, in a list."""

    def __init__(self) -> None:
        self.optimizers: List[Any] = []

    def on_fit_start(self, trainer: Any, task: Any) -> None:
        task.other.requires_grad_(False)
        self.optimizers = [flow.optim.SGD([task.other], lr=0.5, momentum=0.9)]

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, i: int) -> None:
        task.other.grad = batch * flow.ones(2)
        self.optimizers[0].step()
        task.other.grad = None


class Other(Mean):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(flow.ones(2), requires_grad=False)

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD([self.weight], lr=0.125)


@pytest.mark.parametrize("other", ["eager", "graph"])
def test_a_second_optimizer_goes_on(mode: str, other: str, tmp_path: Path) -> None:
    check_stopping(tmp_path, mode, train, every=3, other=other, task=Adversary, max_epochs=2)


def test_one_that_a_callback_holds_goes_on(tmp_path: Path) -> None:
    check_stopping(tmp_path, "eager", train, task=Other, callbacks=lambda: [Steps()], max_epochs=2)


def test_one_that_is_another_is_refused_before_anything_changes(tmp_path: Path) -> None:
    class Changed(Adversary):
        def __init__(self) -> None:
            super().__init__()
            self.second = flow.optim.SGD([self.other], lr=0.5)

    _, saved = run_once("eager", train, task=Adversary, save_to=tmp_path)
    task = Changed()
    before = bits(task)
    with pytest.raises(CheckpointError, match=r"optimizer task\.second.*Adam.*SGD"):
        run_once("eager", train, task=lambda: task, resume_from=saved[-1][0])
    assert bits(task) == before


# ---------------------------------------------------------------------- what hooks make


class MadeByTheHook(Mean):
    """on_train_epoch_start empties what each batch fills."""

    def on_train_epoch_start(self) -> None:
        self.seen: List[int] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        getattr(self, "seen", []).append(batch_idx)


class Kept(MadeByTheHook):
    def on_save_checkpoint(self, checkpoint: Any) -> None:
        checkpoint["seen"] = getattr(self, "seen", [])

    def on_load_checkpoint(self, checkpoint: Any) -> None:
        self.seen = checkpoint["seen"]


def said(
    task: Callable[[], Any], moment: str, folder: Path, callbacks: Any = list
) -> Optional[str]:
    """What is told where a run is resumed from the first file of ``moment``."""
    _, saved = run_once("eager", train, task=task, callbacks=callbacks, save_to=folder)
    path = next(path for path, _ in saved if moment in path.name)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run_once("eager", train, task=task, callbacks=callbacks, resume_from=path)
    texts = [str(each.message) for each in told if each.category is OFEngineWarning]
    assert len(texts) <= 1
    return texts[0] if texts else None


@pytest.mark.parametrize("moment", ["batch_end", "epoch_start"])
def test_what_on_train_epoch_start_made_is_told_within_an_epoch(
    moment: str, tmp_path: Path
) -> None:
    text = said(MadeByTheHook, moment, tmp_path)
    assert text is not None
    assert "MadeByTheHook.seen (on_train_epoch_start is not called again" in text
    assert "on_save_checkpoint of the task, and take it back in on_load_checkpoint" in text


@pytest.mark.parametrize("moment", ["epoch_end", "train_start", "train_end"])
def test_it_is_not_told_where_the_hook_comes_first(moment: str, tmp_path: Path) -> None:
    assert said(MadeByTheHook, moment, tmp_path) is None


@pytest.mark.parametrize("moment", ["batch_end", "epoch_end"])
def test_what_a_checkpoint_keeps_is_not_told(moment: str, tmp_path: Path) -> None:
    assert said(Kept, moment, tmp_path) is None


class CountsBatches(Callback):
    """A whole run's count, which nothing but the batches changes."""

    def __init__(self) -> None:
        self.count = 0
        self.by_epoch: Dict[int, List[int]] = {}

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, i: int) -> None:
        self.count += 1
        self.by_epoch.setdefault(trainer.current_epoch, []).append(i)


class CountsAndKeeps(CountsBatches):
    def state_dict(self) -> Dict[str, Any]:
        return {"count": self.count, "by_epoch": {str(k): v for k, v in self.by_epoch.items()}}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.count = state["count"]
        self.by_epoch = {int(k): v for k, v in state["by_epoch"].items()}


@pytest.mark.parametrize("moment", ["batch_end", "epoch_end"])
def test_a_count_of_a_callback_is_told(moment: str, tmp_path: Path) -> None:
    text = said(Mean, moment, tmp_path, lambda: [CountsBatches()])
    assert text is not None
    assert "CountsBatches.count, CountsBatches.by_epoch" in text
    assert "state_dict of the callback, and take it back in load_state_dict" in text


@pytest.mark.parametrize("moment", ["batch_end", "epoch_end"])
def test_one_that_keeps_it_is_not(moment: str, tmp_path: Path) -> None:
    assert said(Mean, moment, tmp_path, lambda: [CountsAndKeeps()]) is None


class Times(Callback):
    """Sets before each batch, and where training starts, all that it looks at later."""

    def on_train_start(self, trainer: Any, task: Any) -> None:
        self.begin()

    def begin(self) -> None:
        self.begun = random.random()

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        self.started = random.random()


@pytest.mark.parametrize("moment", ["batch_end", "epoch_end"])
def test_what_hooks_set_anew_is_not_told(moment: str, tmp_path: Path) -> None:
    assert said(Mean, moment, tmp_path, lambda: [Times()]) is None


def test_what_never_changes_is_not_told(tmp_path: Path) -> None:
    class Configured(Callback):
        def __init__(self) -> None:
            self.path, self.table, self.f = Path("x"), {"a": [1, 2]}, random.random

    assert said(Mean, "batch_end", tmp_path, lambda: [Configured()]) is None


class Schedules(Other):
    """Steps a scheduler of an optimizer that is not the run's."""

    def __init__(self) -> None:
        super().__init__()
        self.second = flow.optim.SGD([self.other], lr=0.5)
        self.schedule = StepLR(self.second, 2, 0.5)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.schedule.step()


def test_a_scheduler_of_ones_own_is_told(tmp_path: Path) -> None:
    text = said(Schedules, "batch_end", tmp_path)
    assert text is not None
    assert "Schedules.schedule" in text


def test_the_run_s_own_scheduler_is_not(tmp_path: Path) -> None:
    class Returns(Mean):
        def configure_optimizers(self) -> Any:
            self.made = flow.optim.SGD(self.parameters(), lr=0.125)
            self.schedule = StepLR(self.made, 2, 0.5)
            return {"optimizer": self.made, "lr_scheduler": self.schedule}

    ran, _ = run_once("eager", train, task=Returns)
    path = ran.trainer.save_checkpoint(tmp_path / "after.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", OFEngineWarning)
        run_once("eager", train, task=Returns, resume_from=path, max_epochs=5)
