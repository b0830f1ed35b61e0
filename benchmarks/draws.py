"""What it costs to draw a compiled step's dropout masks eagerly, instead of inside the graph.

The same network in graph mode: through the engine, where each mask is drawn before the run and is
an input of the graph, and in a hand-written ``nn.Graph``, which draws by itself. For the
difference that is not the masks', both are measured without dropout too. Alternates between the
four in one process.

    python benchmarks/draws.py --rounds 15
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, Dict, List

import oneflow as flow
from oneflow import nn

from ofengine import Callback, TaskModule, Trainer


class Task(TaskModule):
    """A network of two hidden layers of ``width``, with a functional dropout behind each."""

    def __init__(self, width: int, p: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, 10)
        self.p = p

    def forward(self, x: Any) -> Any:
        """Logits."""
        for layer in self.layers:
            x = nn.functional.dropout(layer(x).relu(), self.p)
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Cross entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Plain SGD."""
        return flow.optim.SGD(self.param_groups(), lr=0.01)


class ByHand(nn.Graph):
    """The same step."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.add_optimizer(flow.optim.SGD(task.parameters(), lr=0.01))

    def build(self, x: Any, y: Any) -> Any:
        """Forward, backward, update."""
        loss = nn.functional.cross_entropy(self.task(x), y)
        loss.backward()
        return loss


class Clock(Callback):
    """The time of an epoch, the first steps of which are not counted."""

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin when what is compiled is compiled."""
        if trainer.global_step == 5:
            outputs["loss"].numpy()
            self.begun = time.perf_counter()
        self.loss = outputs["loss"]

    def on_train_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Wait for the last step."""
        self.loss.numpy()
        self.seconds = time.perf_counter() - self.begun


def engine(task: Task, batches: List[Any]) -> float:
    """Seconds a step through the engine."""
    clock = Clock()
    Trainer(
        mode="graph", device="cpu", max_epochs=1, callbacks=clock, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    ).fit(task, batches)  # fmt: skip
    return clock.seconds / (len(batches) - 5)


def by_hand(task: Task, batches: List[Any]) -> float:
    """Seconds a step of the hand-written graph."""
    graph = ByHand(task)
    for batch in batches[:5]:
        loss = graph(*batch)
    loss.numpy()
    begun = time.perf_counter()
    for batch in batches[5:]:
        loss = graph(*batch)
    loss.numpy()
    return (time.perf_counter() - begun) / (len(batches) - 5)


def main() -> None:
    """Print medians for some sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    for width, rows in ((128, 16), (512, 64), (1024, 256)):
        batch = flow.randn(rows, 64), flow.randint(0, 10, (rows,))
        batches = [batch] * arguments.steps
        seconds: Dict[str, List[float]] = {}
        for _ in range(arguments.rounds):
            for p in (0.5, 0.0):
                for way in (engine, by_hand):
                    key = f"{way.__name__} {p}"
                    seconds.setdefault(key, []).append(way(Task(width, p), batches))
        median = {key: 1e6 * statistics.median(each) for key, each in seconds.items()}
        ours = median["engine 0.5"] - median["engine 0.0"]
        theirs = median["by_hand 0.5"] - median["by_hand 0.0"]
        print(
            f"two masks of {rows} x {width}: {ours:.0f} us drawn before the run, {theirs:.0f} us "
            f"inside the graph; a step of {median['engine 0.5']:.0f} us and "
            f"{median['by_hand 0.5']:.0f} us"
        )


if __name__ == "__main__":
    main()
