"""What it costs that each batch of an accumulation window draws from a seed of its own.

With ``Trainer(seed=...)``, where an optimizer step averages several batches, the step of each batch
begins with a seeding of OneFlow's generator, which waits for all that the device has still to do.
The engine in eager mode and a loop by hand that accumulates as many batches, with a seed and
without, block by block in turns in one process::

    python benchmarks/seeds.py --rounds 25
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, Callable, List, Optional, Tuple

import oneflow as flow
from _cases import OFF, Task, linear, mlp, small_cnn
from oneflow import nn

from ofengine import Callback, Trainer
from ofengine._oneflow.session import synchronize

WINDOW, BLOCK = 4, 40


def by_hand(model: nn.Module, loss_fn: Any, batch: Any) -> Callable[[], None]:
    """A block of the loop without the engine."""
    optimizer = flow.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def block() -> None:
        for index in range(BLOCK):
            loss = loss_fn(model(batch[0]), batch[1]) / WINDOW
            loss.backward()
            if (index + 1) % WINDOW == 0:
                optimizer.step()
                optimizer.zero_grad()
        synchronize()

    return block


class InTurns(Callback):
    """Lets the loop by hand have its turn behind each block; both times of each, in seconds."""

    def __init__(self, other: Callable[[], None]) -> None:
        self.pairs: List[Tuple[float, float]] = []
        self._other, self._start = other, time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        """Time the block that ends here, and one of the other loop."""
        if (arguments[-1] + 1) % BLOCK:
            return
        synchronize()
        middle = time.perf_counter()
        self._other()
        end = time.perf_counter()
        self.pairs.append((end - middle, middle - self._start))
        self._start = time.perf_counter()


def measure(make: Callable[[], nn.Module], batch: Any, seed: Optional[int], rounds: int) -> str:
    """Microseconds a batch of both loops, and the ratio, medians over the rounds."""
    loss_fn: Any = nn.MSELoss() if make is linear else nn.CrossEntropyLoss()
    turns = InTurns(by_hand(make(), loss_fn, batch))
    given = {"accumulate_grad_batches": WINDOW, "seed": seed, "callbacks": [turns], **OFF}
    trainer = Trainer(device="cpu", max_epochs=1, **given)
    trainer.fit(Task(make(), loss_fn), [batch] * (BLOCK * (rounds + 2)))
    pairs = turns.pairs[2:]
    hand, own = (statistics.median(pair[i] for pair in pairs) * 1e6 / BLOCK for i in (0, 1))
    ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
    return f"by hand {hand:6.0f} us, engine {own:6.0f} us, ratio {ratio:.3f}"


def main() -> None:
    """Print a line for each network and seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    images, labels = flow.randn(32, 3, 32, 32), flow.randint(0, 10, (32,))
    cases = (
        ("linear", linear, (flow.randn(16, 32), flow.randn(16, 1))),
        ("MLP", mlp, (images, labels)),
        ("small CNN", small_cnn, (images[:8], labels[:8])),
    )
    for name, make, batch in cases:
        for seed in (None, 0, None, 0):
            print(f"{name}, seed {seed}: {measure(make, batch, seed, rounds)}", flush=True)


if __name__ == "__main__":
    main()
