"""How often OneFlow's graph mode dies of its launch race on a loaded machine, mended and not.

Each run is a process that trains a small perceptron as a static graph, reading the loss at every
step. Runs of both kinds take turns, several at a time, so that the machine is loaded::

    python benchmarks/launch_race.py --runs 100

"plain" does not use the engine at all; "mended" only calls the mend that graph mode applies.
"""

from __future__ import annotations

import argparse
import collections
import os
import signal
import subprocess
import sys
from typing import Counter, Dict, List

RUN = """
import sys
import oneflow as flow
from oneflow import nn
if sys.argv[1] == "mended":
    from ofengine._oneflow.launch_race import mend_launch_race
    assert mend_launch_race() == "mended", mend_launch_race()
model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
optimizer = flow.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
class Graph(nn.Graph):
    def __init__(self):
        super().__init__()
        self.model, self.loss_fn = model, nn.MSELoss()
        self.add_optimizer(optimizer)
    def build(self, x, y):
        loss = self.loss_fn(self.model(x), y)
        loss.backward()
        return loss
graph, x, y = Graph(), flow.randn(8, 16), flow.randn(8, 1)
for _ in range(int(sys.argv[2])):
    graph(x, y).item()
"""


def describe(code: int) -> str:
    """An exit code in words."""
    return "ok" if code == 0 else signal.Signals(-code).name if code < 0 else f"exit {code}"


def main() -> None:
    """Run them and count how they end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="of each kind")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--at-a-time", type=int, default=2 * (os.cpu_count() or 1))
    options = parser.parse_args()
    ends: Dict[str, Counter[str]] = collections.defaultdict(collections.Counter)
    waiting: List[str] = ["plain", "mended"] * options.runs
    while waiting:
        batch, waiting = waiting[: options.at_a_time], waiting[options.at_a_time :]
        running = [
            (
                kind,
                subprocess.Popen(
                    [sys.executable, "-c", RUN, kind, str(options.steps)],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                ),
            )
            for kind in batch
        ]
        for kind, process in running:
            ends[kind][describe(process.wait())] += 1
    for kind, counts in ends.items():
        print(kind, dict(counts))


if __name__ == "__main__":
    main()
