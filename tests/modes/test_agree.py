"""Both modes compute what a hand-written eager loop computes, to the last bit.

The loop in ``by_hand`` uses OneFlow alone: ``(loss / n).backward()`` for each of a window's n
batches, ``clip_grad_norm_`` over all parameters, ``optimizer.step()``. SGD runs through the same
kernels in both modes, so nothing less than equal bits is accepted, ``num_batches_tracked`` and
running statistics included.
"""

from __future__ import annotations

import functools
from typing import Any, Dict, List, Tuple

import numpy as np
import oneflow as flow
import pytest
from helpers import (
    OfClaimedLength,
    OfUnknownLength,
    assert_same_arrays,
    assert_same_weights,
    fill_deterministically,
    image_batches,
    quiet_trainer,
    weights_of,
)
from oneflow import nn

from ofengine import Callback, DataError, TaskModule, Trainer
from ofengine.callbacks import LRDecayCallback

EPOCHS = 2

OPTIMIZERS: Dict[str, Dict[str, Any]] = {
    "SGD": {},
    "SGD, weight decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "momentum, dampening and weight decay": {
        "momentum": 0.8,
        "dampening": 0.3,
        "weight_decay": 0.05,
    },
}

# The batches' sizes in an epoch, and what the Trainer is asked for.
SCENARIOS: Dict[str, Tuple[List[int], Dict[str, Any]]] = {
    "plain": ([6, 6, 6], {}),
    "last batch smaller": ([6, 6, 4], {}),
    "many sizes": ([4, 6, 3, 6, 4], {}),
    "windows of 2, the last cut short": ([6, 6, 6], {"accumulate_grad_batches": 2}),
    "windows of 3, the last cut short": ([6, 6, 6, 6, 6], {"accumulate_grad_batches": 3}),
    "one window longer than the epoch": ([6, 6], {"accumulate_grad_batches": 5}),
    "windows of unequal batches": ([6, 4, 3], {"accumulate_grad_batches": 2}),
    "clipped norm": ([6, 6, 4], {"gradient_clip_val": 0.3}),
    "clipped values": (
        [6, 6, 4],
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    ),
    "windows and clipped norm": (
        [6, 4, 6],
        {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2},
    ),
    "windows and clipped values": (
        [6, 6, 4, 4],
        {
            "gradient_clip_val": 0.02,
            "gradient_clip_algorithm": "value",
            "accumulate_grad_batches": 3,
        },
    ),
}


def make_net(drop: float = 0.3) -> nn.Module:
    """Convolution, batch norm, dropout and linear; the same weights every time."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(drop),
        nn.AdaptiveAvgPool2d((2, 2)),
        nn.Flatten(),
        nn.Dropout(drop / 2),
        nn.Linear(16, 5),
    )
    fill_deterministically(net, spread=0.4)
    return net


class Classifier(TaskModule):
    """The net in two groups of unequal rates."""

    def __init__(self, options: Dict[str, Any], drop: float = 0.3) -> None:
        super().__init__()
        self.net = make_net(drop)
        self.options = options

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def param_groups(self) -> List[Dict[str, Any]]:
        return [
            {"params": self.net[:2].parameters(), "lr": 0.1, "lr_scale": 0.5},
            {"params": self.net[7].parameters()},
        ]

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.02, **self.options)


@functools.lru_cache(maxsize=None)
def by_hand(optimizer_name: str, scenario: str) -> Dict[str, np.ndarray]:
    """The weights after a loop that shares no code with the engine."""
    sizes, asked = SCENARIOS[scenario]
    accumulate = asked.get("accumulate_grad_batches", 1)
    clip = asked.get("gradient_clip_val")
    by_value = asked.get("gradient_clip_algorithm") == "value"
    net = make_net()
    groups = [
        {"params": net[:2].parameters(), "lr": 0.1 * 0.5},
        {"params": net[7].parameters(), "lr": 0.02},
    ]
    optimizer = flow.optim.SGD(groups, **OPTIMIZERS[optimizer_name])
    batches = image_batches(sizes)
    clipped = 0
    for _ in range(EPOCHS):
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            for images, labels in window:
                loss = nn.functional.cross_entropy(net(images), labels)
                (loss / len(window)).backward()
            if clip is not None and by_value:
                clipped += any(np.abs(p.grad.numpy()).max() > clip for p in net.parameters())
                nn.utils.clip_grad_value_(net.parameters(), clip)
            elif clip is not None:
                clipped += float(nn.utils.clip_grad_norm_(net.parameters(), clip)) > clip
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert clip is None or clipped, "this scenario clips nothing"
    return weights_of(net)


def fit_by_hand(net: nn.Module, batches: List[Any]) -> None:
    """The plainest loop: momentum, and the rates of :class:`Classifier`."""
    groups = [
        {"params": net[:2].parameters(), "lr": 0.05},
        {"params": net[7].parameters(), "lr": 0.02},
    ]
    optimizer = flow.optim.SGD(groups, momentum=0.9)
    for images, labels in batches * EPOCHS:
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def train(mode: str, task: TaskModule, batches: Any, **asked: Any) -> Trainer:
    trainer = quiet_trainer(mode=mode, max_epochs=EPOCHS, **asked)
    trainer.fit(task, batches)
    return trainer


# ---------------------------------------------------------------------- against a loop by hand


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario_is_the_loop_by_hand(mode: str, scenario: str) -> None:
    """With momentum: batches of any size, windows cut short, clipping over all groups."""
    sizes, asked = SCENARIOS[scenario]
    task = Classifier(OPTIMIZERS["momentum"])
    train(mode, task, image_batches(sizes), **asked)
    assert_same_arrays(weights_of(task.net), by_hand("momentum", scenario))


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "momentum"])
@pytest.mark.parametrize("scenario", ["many sizes", "windows and clipped norm"])
def test_every_kind_of_sgd_is_the_loop_by_hand(mode: str, scenario: str, optimizer: str) -> None:
    """Plain, weight decay, Nesterov, dampening."""
    sizes, asked = SCENARIOS[scenario]
    task = Classifier(OPTIMIZERS[optimizer])
    train(mode, task, image_batches(sizes), **asked)
    assert_same_arrays(weights_of(task.net), by_hand(optimizer, scenario))


def test_batches_are_counted_as_by_hand(mode: str) -> None:
    """``num_batches_tracked`` counts every batch, those inside a window too."""
    task = Classifier({})
    train(mode, task, image_batches([6, 4, 6]), accumulate_grad_batches=2)
    assert int(task.net[1].num_batches_tracked.numpy()) == 3 * EPOCHS


def test_the_count_is_right_while_training_goes_on(mode: str) -> None:
    """A callback at the end of an epoch sees the batches that were trained so far."""
    counts: List[int] = []

    class Count(Callback):
        def on_train_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
            counts.append(int(task.net[1].num_batches_tracked.numpy()))

    train(mode, Classifier({}), image_batches([6, 4, 6]), callbacks=[Count()])
    assert counts == [3, 6]


def test_images_of_several_sizes(mode: str) -> None:
    """Batches that differ in height and width as well."""
    batches = [
        image_batches([4], (3, 8, 8), seed=1)[0],
        image_batches([4], (3, 6, 10), seed=2)[0],
        image_batches([3], (3, 8, 8), seed=3)[0],
    ]
    task = Classifier({"momentum": 0.9})
    train(mode, task, batches)
    net = make_net()
    fit_by_hand(net, batches)
    assert_same_weights(task.net, net)


# ---------------------------------------------------------------------- parameters of all kinds


class Odd(TaskModule):
    """Tied weights, a layer that the loss does not reach, parameter lists, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.unreached = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(6)
        self.scales = nn.ParameterList([nn.Parameter(flow.ones(6)) for _ in range(2)])
        fill_deterministically(self, spread=0.5)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = self.embedding(batch).mean(1)
        hidden = self.second(self.first(hidden).tanh() * self.scales[0]) + self.scales[1]
        return self.norm(hidden).pow(2).mean() + hidden.abs().mean()

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize(
    "asked",
    [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.05}],
    ids=["plain", "windows", "clipped"],
)
def test_tied_unreached_and_listed_parameters(mode: str, asked: Dict[str, Any]) -> None:
    """A parameter without a gradient is left as it is, one with two names is stepped once.

    Eager mode gives the loop's bits. In a graph the last bit may differ: ``hidden`` is used
    three times and more inside the layer norm and beside it, and a graph adds the gradients of
    such uses with one add_n, eager mode one after the other. Seen: 6e-8.
    """
    generator = np.random.RandomState(0)
    batches = [flow.tensor(generator.randint(0, 7, (size, 3))) for size in (4, 4, 2)]
    task = Odd()
    train(mode, task, batches, **asked)

    net = Odd()
    optimizer = flow.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    accumulate = asked.get("accumulate_grad_batches", 1)
    for _ in range(EPOCHS):
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            for batch in window:
                (net.training_step(batch, 0) / len(window)).backward()
            if asked.get("gradient_clip_val"):
                nn.utils.clip_grad_norm_(net.parameters(), asked["gradient_clip_val"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for name, array in weights_of(net).items():
        tolerance = 0 if mode == "eager" else 5e-7
        np.testing.assert_allclose(weights_of(task)[name], array, rtol=0, atol=tolerance)
    assert_same_weights(task.unreached, Odd().unreached)


def test_recurrent_layers_agree_to_the_last_digits() -> None:
    """As above, where parameters are used at each of five time steps. Seen: 7.5e-9."""

    class Recurrent(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, 4)
            fill_deterministically(self, spread=0.5)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.rnn(batch)[0].pow(2).mean()

        def configure_optimizers(self) -> Any:
            return flow.optim.SGD(self.param_groups(), lr=0.5)

    batches = [
        flow.tensor(np.random.RandomState(n).randn(5, 3, 4).astype("float32")) for n in (1, 2)
    ]
    tasks = [Recurrent(), Recurrent()]
    for mode, task in zip(("eager", "graph"), tasks):
        train(mode, task, batches)
    for one, other in zip(weights_of(tasks[0]).values(), weights_of(tasks[1]).values()):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "asked", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}], ids=str
)
def test_clipping_that_a_group_asks_for_itself(asked: Dict[str, Any]) -> None:
    """OneFlow's ``clip_grad_max_norm`` in a group: a graph obeys it, so eager mode must too."""

    class Clipped(Classifier):
        def param_groups(self) -> List[Dict[str, Any]]:
            body, head = super().param_groups()
            return [{**body, "clip_grad_max_norm": 0.05, "clip_grad_norm_type": 2.0}, head]

    tasks = [Clipped({"momentum": 0.9}), Clipped({"momentum": 0.9})]
    for mode, task in zip(("eager", "graph"), tasks):
        train(mode, task, image_batches([6, 6, 4]), **asked)
    assert_same_weights(*tasks)


# ---------------------------------------------------------------------- dropout and seeds


class TwoDropouts(TaskModule):
    """Shows the masks of two dropout layers of one shape, beside training something."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Dropout(0.5, inplace), nn.Dropout(0.5, inplace)
        self.layer = nn.Linear(32, 1)
        fill_deterministically(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, second = self.first(batch * 1.0), self.second(batch * 1.0)
        loss = self.layer(first + second).pow(2).mean()
        return {"loss": loss, "masks": [first, second]}


class KeepMasks(Callback):
    def __init__(self) -> None:
        self.masks: List[Tuple[bytes, bytes]] = []

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        first, second = (mask.detach().numpy() for mask in outputs["masks"])
        assert set(np.unique(first)) | set(np.unique(second)) == {0.0, 2.0}
        self.masks.append((first.tobytes(), second.tobytes()))


def masks_of(mode: str, inplace: bool = False, **asked: Any) -> List[Tuple[bytes, bytes]]:
    keep = KeepMasks()
    batches = [flow.ones(size, 32) for size in (4, 4, 3)]
    train(mode, TwoDropouts(inplace), batches, callbacks=[keep], **asked)
    return keep.masks


@pytest.mark.parametrize("asked", [{}, {"accumulate_grad_batches": 2}], ids=["plain", "windows"])
def test_a_seed_gives_each_dropout_masks_of_its_own(mode: str, asked: Dict[str, Any]) -> None:
    """With a seed no two masks are alike: not of two layers, of two steps or of two epochs."""
    masks = [mask for pair in masks_of(mode, seed=3, **asked) for mask in pair]
    assert len(set(masks)) == len(masks) == 2 * 3 * EPOCHS
    assert masks_of(mode, seed=3, **asked) == [tuple(p) for p in zip(masks[::2], masks[1::2])]
    assert not set(masks) & {mask for pair in masks_of(mode, seed=4, **asked) for mask in pair}


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
def test_masks_are_the_same_in_both_modes(seed: Any, inplace: bool) -> None:
    """Batch sizes that come and go do not disturb the sequence of masks."""
    assert masks_of("eager", inplace, seed=seed) == masks_of("graph", inplace, seed=seed)


@pytest.mark.parametrize("scenario", ["many sizes", "windows and clipped norm"])
def test_with_a_seed_both_modes_are_one(scenario: str) -> None:
    """Dropout reseeded by the engine: the same weights in both modes, bit for bit."""
    sizes, asked = SCENARIOS[scenario]
    tasks = [Classifier(OPTIMIZERS["nesterov"]), Classifier(OPTIMIZERS["nesterov"])]
    for mode, task in zip(("eager", "graph"), tasks):
        train(mode, task, image_batches(sizes), seed=11, **asked)
    assert_same_weights(*tasks)


def test_a_dropout_layer_used_twice_in_a_step() -> None:
    """Each call of one layer has a mask of its own, in the order of the calls."""

    class Twice(Classifier):
        def __init__(self) -> None:
            super().__init__({"momentum": 0.9})
            self.drop = nn.Dropout(0.2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            images, labels = batch
            images = self.drop(self.drop(images) + 1)
            return nn.functional.cross_entropy(self.net(images), labels)

    tasks = [Twice(), Twice()]
    for mode, task in zip(("eager", "graph"), tasks):
        train(mode, task, image_batches([6, 4, 6]))
    assert_same_weights(*tasks)


def test_a_layer_used_twice_in_a_step(mode: str) -> None:
    """A siamese net: both calls' gradients count, once each."""

    class Siamese(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)
            fill_deterministically(self)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.layer(batch[0]) - self.layer(batch[1]) + 1).pow(2).mean()

        def configure_optimizers(self) -> Any:
            return flow.optim.SGD(self.param_groups(), lr=0.1)

    pairs = [(flow.ones(3, 4) * n, flow.ones(3, 4) / (n + 1)) for n in range(3)]
    task, net = Siamese(), Siamese()
    quiet_trainer(mode=mode, max_epochs=1).fit(task, pairs)
    optimizer = flow.optim.SGD(net.parameters(), lr=0.1)
    for pair in pairs:
        net.training_step(pair, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_weights(task, net)


# ---------------------------------------------------------------------- runs one after another


@pytest.mark.parametrize("modes", [("eager", "graph"), ("graph", "eager"), ("graph", "graph")])
def test_one_task_fitted_twice(modes: Tuple[str, str]) -> None:
    """A second ``fit`` goes on with the weights, and with a new optimizer, in either mode."""
    task = Classifier(OPTIMIZERS["momentum"])
    batches = image_batches([6, 4])
    for mode in modes:
        train(mode, task, batches)
    net = make_net()
    for _ in modes:
        fit_by_hand(net, batches)
    assert_same_weights(task.net, net)


def test_compiling_again_in_the_middle_of_a_run_loses_nothing(mode: str) -> None:
    """Epochs of unknown length make graph mode compile anew: momentum and masks go on."""
    batches = image_batches([4, 6, 4, 3, 6, 4, 6], seed=4)
    epochs = [batches[:3], batches[:7], batches[:2], batches[:5]]
    task = Classifier(OPTIMIZERS["momentum"])
    task.param_groups = (
        lambda: [  # type: ignore[method-assign]
            {"params": task.net[:2].parameters(), "lr": 0.1, "lr_decay_scale": 0.5},
            {"params": task.net[7].parameters(), "lr": 0.02, "lr_decay_scale": 0.75},
        ]
    )
    quiet_trainer(
        mode=mode,
        max_epochs=4,
        accumulate_grad_batches=2,
        gradient_clip_val=0.3,
        callbacks=[LRDecayCallback(every_n_batches=4)],
    ).fit(task, OfUnknownLength(*epochs))

    net = make_net()
    groups = [
        {"params": net[:2].parameters(), "lr": 0.1},
        {"params": net[7].parameters(), "lr": 0.02},
    ]
    optimizer = flow.optim.SGD(groups, momentum=0.9)
    for epoch in epochs:
        for start in range(0, len(epoch), 2):
            window = epoch[start : start + 2]
            for images, labels in window:
                (nn.functional.cross_entropy(net(images), labels) / len(window)).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if start % 4 == 0:
                optimizer.param_groups[0]["lr"] *= 0.5
                optimizer.param_groups[1]["lr"] *= 0.75
    assert_same_weights(task.net, net)


def test_gradients_from_before_a_run_do_not_count(mode: str) -> None:
    """Neither those of the user's own backward, nor those of a window that was broken off."""

    class Stop(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            trainer.should_stop = batch_idx == 0

    batches = image_batches([6, 4, 6])
    task = Classifier(OPTIMIZERS["momentum"], drop=0)
    task.training_step(batches[0], 0).backward()
    train(mode, task, batches, accumulate_grad_batches=3, callbacks=[Stop()])
    trained = weights_of(task)
    assert (trained["net.0.weight"] == weights_of(make_net())["0.weight"]).all()
    train(mode, task, batches, accumulate_grad_batches=3)
    other = Classifier(OPTIMIZERS["momentum"], drop=0)
    other.net.load_state_dict({k[4:]: flow.tensor(v) for k, v in trained.items()})
    train(mode, other, batches, accumulate_grad_batches=3)
    assert_same_weights(task, other)


def test_layers_that_a_hook_puts_into_eval_mode_stay_there(mode: str) -> None:
    """A batch norm frozen from the second epoch on keeps its statistics, in both modes."""
    seen: List[bytes] = []

    class Frozen(Classifier):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.net[1].eval()

        def on_train_epoch_end(self) -> None:
            seen.append(self.net[1].running_mean.numpy().tobytes())

    train(mode, Frozen({}), image_batches([6, 6]))
    assert seen[0] == seen[1]


def test_parameters_that_a_hook_freezes_and_unfreezes() -> None:
    """``requires_grad`` changed between epochs is obeyed alike in both modes."""

    class Thawing(Classifier):
        def on_train_epoch_start(self) -> None:
            for parameter in self.net[0].parameters():
                parameter.requires_grad_(self.current_epoch != 1)

    tasks = []
    for mode in ("eager", "graph"):
        task = Thawing({"momentum": 0.9})
        quiet_trainer(mode=mode, max_epochs=3).fit(task, image_batches([6, 4]))
        tasks.append(task)
    assert_same_weights(*tasks)


# ---------------------------------------------------------------------- lengths that are not true


@pytest.mark.parametrize("claimed", [2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_len_that_is_too_small_is_the_length_of_the_epoch(
    mode: str, claimed: int, accumulate: int
) -> None:
    """The batches that ``len`` promises are trained, in windows as they should be."""
    batches = image_batches([6, 6, 6, 6, 6])
    honest, task = Classifier({}, drop=0), Classifier({}, drop=0)
    train(mode, honest, batches[:claimed], accumulate_grad_batches=accumulate)
    train(mode, task, OfClaimedLength(claimed, batches), accumulate_grad_batches=accumulate)
    assert_same_weights(task, honest)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_len_that_is_too_large_is_an_error(mode: str, accumulate: int) -> None:
    """Else a window would stay open, or be averaged over batches that never came."""
    with pytest.raises(DataError, match=r"5 batches.*length is 6"):
        train(
            mode,
            Classifier({}),
            OfClaimedLength(6, image_batches([6, 6, 6, 6, 6])),
            accumulate_grad_batches=accumulate,
        )
