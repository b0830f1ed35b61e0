"""What a step costs through the engine over a loop written by hand, eager and graph.

A linear layer, SGD with momentum, the loss read every 50 steps by both. The four kinds of run
take turns in one process; medians of the rounds are printed, in microseconds a step::

    python benchmarks/step_overhead.py --rounds 7
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, Callable, Dict, List

import oneflow as flow
from oneflow import nn

from ofengine import Callback, TaskModule, Trainer

WARM_UP = 50


def network() -> Any:
    """A linear layer of 32 inputs."""
    return nn.Linear(32, 1)


def by_hand(step: Callable[[], Any], steps: int) -> float:
    """Microseconds a step of a loop around ``step``, which returns the loss."""
    for _ in range(WARM_UP):
        loss = step()
    loss.item()
    began = time.perf_counter()
    for index in range(steps):
        loss = step()
        if index % 50 == 0:
            loss.item()
    loss.item()
    return (time.perf_counter() - began) / steps * 1e6


def eager_by_hand(x: Any, y: Any, steps: int) -> float:
    """The eager loop."""
    model, loss_fn = network(), nn.MSELoss()
    optimizer = flow.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> Any:
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return by_hand(step, steps)


def graph_by_hand(x: Any, y: Any, steps: int) -> float:
    """The graph loop."""
    model, loss_fn = network(), nn.MSELoss()
    optimizer = flow.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    class Graph(nn.Graph):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.loss_fn = loss_fn
            self.add_optimizer(optimizer)

        def build(self, x: Any, y: Any) -> Any:
            loss = self.loss_fn(self.model(x), y)
            loss.backward()
            return loss

    graph = Graph()
    return by_hand(lambda: graph(x, y), steps)


class Line(TaskModule):
    """The same, as a task."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()
        self.loss_fn = nn.MSELoss()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss."""
        x, y = batch
        return self.loss_fn(self.model(x), y)

    def configure_optimizers(self) -> Any:
        """As by hand."""
        return flow.optim.SGD(self.param_groups(), lr=1e-3, momentum=0.9)


class Clock(Callback):
    """Measures the steps after the warm-up."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.microseconds = 0.0
        self._began = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start and stop at a step that has really been computed."""
        if batch_idx == WARM_UP - 1:
            outputs["loss"].item()
            self._began = time.perf_counter()
        elif batch_idx == WARM_UP - 1 + self.steps:
            outputs["loss"].item()
            self.microseconds = (time.perf_counter() - self._began) / self.steps * 1e6


def engine(mode: str, x: Any, y: Any, steps: int) -> float:
    """Through ``Trainer.fit``, with its defaults but for what writes files and the summary."""
    clock = Clock(steps)
    trainer = Trainer(
        mode=mode,
        device="cpu",
        max_epochs=1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Line(), [(x, y)] * (steps + WARM_UP + 1))
    return clock.microseconds


def main() -> None:
    """Run the rounds and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    x, y = flow.randn(32, 32), flow.randn(32, 1)
    runs: Dict[str, Callable[[], float]] = {
        "eager by hand": lambda: eager_by_hand(x, y, options.steps),
        "eager engine": lambda: engine("eager", x, y, options.steps),
        "graph by hand": lambda: graph_by_hand(x, y, options.steps),
        "graph engine": lambda: engine("graph", x, y, options.steps),
    }
    seen: Dict[str, List[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            seen[name].append(run())
    for name, values in seen.items():
        print(
            f"{name:14} {statistics.median(values):8.1f} us a step "
            f"({min(values):.1f} to {max(values):.1f})"
        )
    for mode in ("eager", "graph"):
        pairs = zip(seen[f"{mode} engine"], seen[f"{mode} by hand"])
        print(f"{mode} overhead {statistics.median(a - b for a, b in pairs):6.1f} us a step")


if __name__ == "__main__":
    main()
