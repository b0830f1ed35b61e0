"""What it costs that each batch of an accumulation window draws from a seed of its own.

With ``Trainer(seed=...)``, where an optimizer step averages several batches, the step of each batch
begins with a seeding of OneFlow's generator and of each dropout layer's, in the device's turn.
The engine in eager mode and a loop by hand that accumulates as many batches, with a seed and
without, block by block in turns in one process::

    python benchmarks/seeds.py --rounds 25
"""

from __future__ import annotations

import argparse
from typing import Any, Callable, Optional

import oneflow as flow
from _cases import OFF, Task, linear, mlp, sgd, small_cnn
from _measure import Turns, show
from oneflow import nn

from ofengine import Trainer
from ofengine._oneflow.session import synchronize

WINDOW, BLOCK = 4, 40


def mlp_with_dropout() -> nn.Module:
    """Four layers of dropout in the MLP."""
    first, *rest = mlp()
    return nn.Sequential(first, *(nn.Dropout(0.1) for _ in range(4)), *rest)


def by_hand(model: nn.Module, loss_fn: Any, batch: Any) -> Callable[[], Any]:
    """The step of a batch without the engine; each fourth call updates."""
    optimizer, done = sgd(model.parameters()), 0

    def step() -> Any:
        nonlocal done
        loss = loss_fn(model(batch[0]), batch[1]) / WINDOW
        loss.backward()
        done += 1
        if done % WINDOW == 0:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return step


def measure(make: Callable[[], nn.Module], batch: Any, seed: Optional[int], rounds: int) -> str:
    """Microseconds a batch of both loops, and the ratio, with quartiles."""
    loss_fn: Any = nn.MSELoss() if make is linear else nn.CrossEntropyLoss()
    step = by_hand(make(), loss_fn, batch)
    turns = Turns(batch, step, synchronize, BLOCK, rounds, 2 * BLOCK)
    trainer = Trainer(device="cpu", max_epochs=1, accumulate_grad_batches=WINDOW, seed=seed, **OFF)
    trainer.fit(Task(make(), loss_fn), turns)
    hand, own = ([getattr(pair, of) for pair in turns.measured] for of in ("hand_wall", "wall"))
    ratio = show([b / a for a, b in zip(hand, own)], 3)
    return f"by hand {show(hand, 0)} us, engine {show(own, 0)} us, ratio {ratio}"


def main() -> None:
    """Print a line for each network and seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    images, labels = flow.randn(32, 3, 32, 32), flow.randint(0, 10, (32,))
    cases = (
        ("linear", linear, (flow.randn(16, 32), flow.randn(16, 1))),
        ("MLP", mlp, (images, labels)),
        ("MLP with four dropout layers", mlp_with_dropout, (images, labels)),
        ("small CNN", small_cnn, (images[:8], labels[:8])),
    )
    for name, make, batch in cases:
        for seed in (None, 0, None, 0):
            print(f"{name}, seed {seed}: {measure(make, batch, seed, rounds)}", flush=True)


if __name__ == "__main__":
    main()
