"""``clip_grad_max_norm`` of a group: the same bits in both modes and in a loop by hand."""

from __future__ import annotations

import itertools
from typing import Any, Callable, Dict, List, Sequence

import numpy as np
import oneflow as flow
import pytest
from helpers import (
    assert_same_arrays,
    fill_deterministically,
    image_batches,
    quiet_trainer,
    refused,
    weights_of,
)
from helpers.resuming import some_slow
from oneflow import nn

from ofengine import Callback, RateError, TaskModule

F = np.float32
INF = float("inf")
Options = Sequence[Dict[str, Any]]
BATCHES = image_batches([6, 6, 4, 6, 6])


def limit(norm: float, norm_type: Any = 2.0) -> Dict[str, Any]:
    return {"clip_grad_max_norm": norm, "clip_grad_norm_type": norm_type}


class Classifier(TaskModule):
    """A small net in two groups, with a parameter of no dimension and one that is not used."""

    def __init__(self, options: Options, make: Any = None) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Linear(36, 5)
        self.unused = nn.Linear(2, 2)
        fill_deterministically(self, spread=0.3)
        self.scale = nn.Parameter(flow.tensor(1.5))
        self.options = options
        self.make = make or (lambda groups: flow.optim.SGD(groups, lr=0.1, momentum=0.9))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        logits = self.head(self.body(images)) * self.scale
        return nn.functional.cross_entropy(logits, labels)

    def configure_optimizers(self) -> Any:
        others = [*self.head.parameters(), *self.unused.parameters(), self.scale]
        return self.make(
            [{"params": p, **o} for p, o in zip((self.body.parameters(), others), self.options)]
        )


def by_hand(task: Classifier, epochs: int = 3) -> Dict[str, np.ndarray]:
    """The weights after OneFlow's own eager loop with ``optimizer.clip_grad()``'s function."""
    optimizer = task.configure_optimizers()
    for batch in BATCHES * epochs:
        task.training_step(batch, 0).backward()
        for group in optimizer.param_groups:
            if "clip_grad_max_norm" in group:
                nn.utils.clip_grad_norm_(
                    group.parameters, group["clip_grad_max_norm"], group["clip_grad_norm_type"]
                )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return weights_of(task)


def fitted(mode: str, task: Classifier, **asked: Any) -> Dict[str, np.ndarray]:
    quiet_trainer(mode=mode, max_epochs=3, **asked).fit(task, BATCHES)
    return weights_of(task)


@pytest.mark.parametrize(
    "norm_type", some_slow([2, 2.0, 1.0, 0.5, 3, INF, -INF], 2, 3, INF), ids=str
)
def test_as_by_hand_to_the_bit(mode: str, norm_type: float) -> None:
    norm = 0.05 if norm_type > 0 else 1e-6  # the smallest gradient is small
    both: Options = [limit(norm, norm_type), limit(2 * norm, norm_type)]
    for options in (both, [both[0], {}]):
        assert_same_arrays(fitted(mode, Classifier(options)), by_hand(Classifier(options)))
    unclipped = by_hand(Classifier([{}, {}]))
    assert any((unclipped[n] != array).any() for n, array in by_hand(Classifier(both)).items())


@pytest.mark.parametrize(
    "asked",
    [{"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 2}, {"accumulate_grad_batches": 3}],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "LAMB"])
def test_the_modes_are_equal_with_all_else(optimizer: str, asked: Dict[str, Any]) -> None:
    make = lambda groups: getattr(flow.optim, optimizer)(groups, lr=0.01)  # noqa: E731
    eager, graph = (
        fitted(mode, Classifier([limit(0.05), limit(0.1)], make), **asked)
        for mode in ("eager", "graph")
    )
    assert_same_arrays(eager, graph)


def test_the_group_s_clipping_comes_after_that_of_all(mode: str) -> None:
    """2 of 4 gradients of 1, cut to a length of 1 together and of 0.5 by themselves."""

    class Task(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Parameter(flow.zeros(2)) for _ in range(2))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return ((self.one + self.two) * batch).sum()

        def configure_optimizers(self) -> Any:
            return flow.optim.SGD([{"params": [self.one], **limit(0.5)}, {"params": [self.two]}], 1)

    task = Task()
    quiet_trainer(mode=mode, max_epochs=1, gradient_clip_val=1.0).fit(task, [flow.ones(2)])
    np.testing.assert_allclose(task.one.numpy(), -(0.5**0.5) / 2, rtol=1e-5)
    np.testing.assert_allclose(task.two.numpy(), -0.5, rtol=1e-5)


class Limits(Callback):
    """A limit from the second step on."""

    def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
        trainer.optimizer.param_groups[0]["clip_grad_max_norm"] = 0.0
        trainer.optimizer.param_groups[0]["clip_grad_norm_type"] = 2.0


def test_a_limit_that_a_hook_sets_counts_from_then_on(mode: str) -> None:
    one, all_of_them = (Classifier([{}, {}]) for _ in range(2))
    for task, batches in ((one, BATCHES[:1]), (all_of_them, BATCHES)):
        task.make = lambda groups: flow.optim.SGD(groups, lr=0.1)
        quiet_trainer(mode=mode, max_epochs=1, callbacks=[Limits()]).fit(task, batches)
    for a, b in zip(one.body.parameters(), all_of_them.body.parameters()):
        assert a.numpy().tobytes() == b.numpy().tobytes()
    assert (one.head.weight.numpy() != all_of_them.head.weight.numpy()).any()


def test_the_optimizer_can_clip_by_itself_again_after_a_run(mode: str) -> None:
    """What graphs are compiled without is left as it was."""
    task = Classifier([limit(0.0), limit(0.0)])
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(task, BATCHES[:1])
    task.training_step(BATCHES[0], 0).backward()
    trainer.optimizer.clip_grad()
    assert not task.head.weight.grad.numpy().any()


def test_a_graph_of_one_s_own_clips_as_oneflow_does() -> None:
    """It has OneFlow's pass, and is clipped once."""

    class Graph(nn.Graph):
        def __init__(self, task: Any) -> None:
            super().__init__()
            self.task = task
            self.add_optimizer(task.trainer.optimizer)

        def build(self, images: Any, labels: Any) -> Any:
            loss = self.task.training_step((images, labels), 0)
            loss.backward()
            return loss

    class Task(Classifier):
        def build_graph(self) -> Any:
            return Graph(self)

    options = [limit(0.05), limit(0.1)]
    ours = fitted("graph", Task(options))
    for name, array in by_hand(Classifier(options)).items():
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=1e-4, err_msg=name)


# ---------------------------------------------------------------------- OneFlow's own pass


class Sums(nn.Module):
    """Parameters whose gradients are what is given."""

    def __init__(self, gradients: Sequence[np.ndarray]) -> None:
        super().__init__()
        self.one, self.two = (nn.Parameter(flow.zeros(len(each))) for each in gradients)

    def forward(self, first: Any, second: Any) -> Any:
        return (self.one * first).sum() + (self.two * second).sum()


def added_up(gradients: Sequence[np.ndarray]) -> np.float32:
    """All squares in one float32 number, one after the other."""
    squares = np.concatenate([each * each for each in gradients])
    return np.add.accumulate(squares, dtype=F)[-1]


def test_oneflow_s_own_pass_adds_up_in_one_float32_number() -> None:
    """In some order of the parameters, that of a hash: why graphs here are compiled without it."""
    random = np.random.RandomState(0)
    gradients = [random.standard_normal(count).astype(F) for count in (7_000, 20_000)]

    def clipped(run: Callable[[Sums, Any, List[Any]], None]) -> List[bytes]:
        model = Sums(gradients)
        optimizer = flow.optim.SGD([{"params": list(model.parameters()), **limit(1.0)}], lr=1.0)
        run(model, optimizer, [flow.tensor(each) for each in gradients])
        return [(-p).numpy().tobytes() for p in (model.one, model.two)]

    def as_graph(model: Sums, optimizer: Any, inputs: List[Any]) -> None:
        class Graph(nn.Graph):
            def __init__(self) -> None:
                super().__init__()
                self.model = model
                self.add_optimizer(optimizer)

            def build(self, first: Any, second: Any) -> Any:
                loss = self.model(first, second)
                loss.backward()
                return loss

        Graph()(*inputs)

    def eagerly(model: Sums, optimizer: Any, inputs: List[Any]) -> None:
        model(*inputs).backward()
        optimizer.clip_grad()
        optimizer.step()

    retraced = []
    for order in itertools.permutations(gradients):
        factor = F(1) / (np.sqrt(added_up(order)) + F(1e-6))
        retraced.append([(factor * each).tobytes() for each in gradients])
    assert clipped(as_graph) in retraced
    assert clipped(eagerly) not in retraced


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "options, text",
    [
        ({"clip_grad_max_norm": 1.0}, r"'clip_grad_max_norm' alone.*write both"),
        ({"clip_grad_norm_type": 2.0}, r"'clip_grad_norm_type' alone.*write both"),
        (limit(-1.0), r"clip_grad_max_norm=-1.0: it must be finite and not negative"),
        (limit("1"), r"clip_grad_max_norm='1', a str: write a number"),  # type: ignore[arg-type]
        (limit(1.0, "inf"), r"clip_grad_norm_type='inf': write 2.0"),
        (limit(1.0, 0), r"clip_grad_norm_type=0: write 2.0"),
        (limit(1.0, float("nan")), r"clip_grad_norm_type=nan: write 2.0"),
    ],
    ids=str,
)
def test_half_a_limit_is_refused(mode: str, options: Dict[str, Any], text: str) -> None:
    """With one key of the two OneFlow clips nothing, in either mode, without a word."""
    task = Classifier([{"name": "body", **options}, {}])
    refused(task, RateError, r"^group 'body' has " + text, mode=mode, train=BATCHES)
