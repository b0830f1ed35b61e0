"""Sums of three and more tensors are added up in eager mode's order in graph mode too.

OneFlow's compiler makes one operation of ``a + (b + c)``, which computes ``(a + b) + c``.
"""

from __future__ import annotations

from typing import Any, Callable, Dict

import oneflow as flow
import pytest
from helpers import (
    MODES,
    ByStep,
    bits,
    fill_deterministically,
    quiet_trainer,
    random_rows,
    weights_of,
)
from oneflow import nn

from ofengine._oneflow import graphs


class Sums(ByStep):
    def __init__(self, step: Callable[[Any, Any], Any]) -> None:
        super().__init__(step)
        self.layer = nn.Linear(7, 7)
        self.others = nn.ModuleList([nn.Linear(7, 7) for _ in range(4)])
        fill_deterministically(self, spread=0.4)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return sum(other(batch) for other in self.others)

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.05, momentum=0.9)


def chain(uses: int) -> Callable[[Any, Any], Any]:
    def step(task: Any, x: Any) -> Any:
        for _ in range(uses):
            x = task.layer(x).tanh()
        return x.pow(2).mean()

    return step


def terms(task: Any, x: Any) -> Any:
    return sum(other(x).pow(2).mean() for other in task.others)


def embeddings(task: Any, x: Any) -> Any:
    first, second, third, _ = task.others
    return task.layer(first(x) + second(x) + third(x)).tanh().pow(2).mean()


def nested(task: Any, x: Any) -> Any:
    first, second, third, fourth = (other(x) for other in task.others)
    return ((first + (second + third)) + (fourth + first)).tanh().pow(2).mean()


def doubled(task: Any, x: Any) -> Any:
    pair = task.others[0](x) + task.others[1](x)
    return (pair + pair).tanh().pow(2).mean()


def seen_on_the_way(task: Any, x: Any) -> Any:
    pair = task.others[0](x) + task.others[1](x)
    task.log("pair", pair.mean())
    return (pair + task.others[2](x)).tanh().pow(2).mean()


def at_once(task: Any, x: Any) -> Any:
    """A sum that the user has made one operation already."""
    return (
        flow.add(*[other(x) for other in task.others][:2]).pow(2).mean()
        + flow.stack([other(x) for other in task.others]).sum(0).pow(2).mean()
    )


def residual(task: Any, x: Any) -> Any:
    for other in task.others:
        x = x + other(x).tanh()
    return (x + task.layer(x) + x * x).pow(2).mean()


STEPS: Dict[str, Callable[[Any, Any], Any]] = {
    **{f"{uses} uses": chain(uses) for uses in (2, 3, 4, 7, 40)},
    **{each.__name__: each for each in (terms, embeddings, nested, doubled, seen_on_the_way)},
    **{each.__name__: each for each in (at_once, residual)},
}


def trained(step: Callable[[Any, Any], Any], mode: str, **arguments: Any) -> Any:
    """All weights after training, the metrics, and predictions, bit by bit."""
    task = Sums(step)
    trainer = quiet_trainer(mode=mode, max_epochs=2, log_every_n_steps=1, **arguments)
    trainer.fit(task, random_rows([5] * 5, 7), random_rows([5] * 2, 7, seed=1))
    predicted = trainer.predict(task, random_rows([5] * 2, 7, seed=2))
    return (
        bits(task),
        trainer.callback_metrics,
        [each.numpy().tobytes() for each in predicted],
    )


@pytest.mark.parametrize(
    "arguments", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}]
)
@pytest.mark.parametrize("name", list(STEPS))
def test_sums_are_equal_in_both_modes(name: str, arguments: Dict[str, Any]) -> None:
    eager, graph = (trained(STEPS[name], mode, **arguments) for mode in MODES)
    assert eager == graph


def test_without_it_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above would see a difference, in the weights as in what is predicted."""
    monkeypatch.setattr(graphs, "put_back", lambda before, after: 0)
    eager, graph = (trained(chain(3), mode) for mode in MODES)
    assert eager[0] != graph[0]
    assert eager[2] != graph[2]


class OwnGraph(nn.Graph):
    def __init__(self, task: Any, optimizer: Any) -> None:
        super().__init__()
        self.task = task
        self.add_optimizer(optimizer)

    def build(self, batch: Any) -> Any:
        loss = chain(4)(self.task, batch)
        loss.backward()
        return loss


def test_a_graph_of_one_s_own_is_left_as_oneflow_makes_it() -> None:
    """It computes what it computes in a loop by hand."""

    class Own(Sums):
        def build_graph(self) -> Any:
            return OwnGraph(self, self.optimizer)

    task, by_hand = Own(chain(4)), Sums(chain(4))
    quiet_trainer(mode="graph", max_epochs=2).fit(task, random_rows([5] * 5, 7))
    graph = OwnGraph(by_hand, by_hand.configure_optimizers())
    for batch in random_rows([5] * 5, 7) * 2:
        graph(batch)
    ours, theirs = weights_of(task), weights_of(by_hand)
    assert [ours[name].tobytes() for name in ours] == [theirs[name].tobytes() for name in ours]
