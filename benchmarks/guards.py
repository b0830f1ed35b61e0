"""What it costs a step of graph mode that what its trace read is watched.

Blocks of steps with and without the look at what can change in place take turns: over a network of
a hundred layers whose step reads nothing of the kind, and over the same with twenty values in a
dict, a list, an object and globals. The barrier of the writes cannot be left out; it is one look at
a flag::

    python benchmarks/guards.py
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any, Dict, List

from _measure import Report, child, parser, tell

LIMIT = 0.125
"""A global that the step reads."""
BAR = 3.0
"""Microseconds a step that twenty watched values in a hundred layers may add."""


def measured(values: bool, quick: bool) -> Dict[str, List[float]]:
    """Microseconds a step of each block, with the look and without."""
    import types

    import oneflow as flow
    from oneflow import nn

    from ofengine import Callback, TaskModule, Trainer
    from ofengine._oneflow.session import synchronize

    class Net(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*[nn.Linear(2, 2) for _ in range(100)])
            self.weights = {f"w{i}": 1.0 for i in range(10)}
            self.powers = [1.0] * 4
            self.space = types.SimpleNamespace(a=1.0, b=1.0, c=1.0, d=1.0, e=1.0)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.layers(batch).mean()
            if values:
                loss = loss * sum(self.weights.values()) * sum(self.powers) * LIMIT
                loss = loss * sum(vars(self.space).values())
            return loss

        def configure_optimizers(self) -> Any:
            return flow.optim.SGD(self.param_groups(), lr=1e-12)  # the loss is never bounded

    found: Dict[str, List[float]] = {"look": [], "no look": []}
    block = 20

    class Turns(Callback):
        begun = 0.0

        def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx % block == 0:
                synchronize()
                (compiled,) = trainer._run.mode._steps.active.values() or (None,)
                turn = batch_idx // block
                if compiled is not None and turn >= 2:
                    if turn > 2:
                        spent = (time.perf_counter() - self.begun) / block * 1e6
                        found["look" if compiled.looks else "no look"].append(spent)
                    compiled.looks = values and turn % 2 == 0
                self.begun = time.perf_counter()

    trainer = Trainer(
        mode="graph", device="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=Turns(),
    )  # fmt: skip
    steps = block * (20 if quick else 200)
    trainer.fit(Net(), [flow.ones(2, 2)] * steps)
    return found


def looks(quick: bool) -> float:
    """Microseconds of the look alone, over the twenty values."""
    import timeit

    import oneflow as flow
    from oneflow import nn

    from ofengine import TaskModule
    from ofengine.modes.guards import Guards

    class Holder(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*[nn.Linear(2, 2) for _ in range(100)])
            self.weights = {f"w{i}": 1.0 for i in range(10)}
            self.powers = [1.0] * 10

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            scale = sum(self.weights.values()) * sum(self.powers) * LIMIT
            return self.layers(batch).mean() * scale

    task, guards = Holder(), Guards()
    with guards.reading():
        task.training_step(flow.ones(2, 2), 0)
    watch = guards.watch(task)
    number = 1_000 if quick else 20_000
    spent = timeit.repeat(watch.may_differ, timer=time.thread_time, number=number, repeat=7)
    return min(spent) / number * 1e6


def main() -> None:
    """Run in a process of its own and report."""
    options = parser(__doc__).parse_args()
    if options.child:
        found = {name: measured(name == "values", options.quick) for name in ("none", "values")}
        print(json.dumps({"steps": found, "alone": looks(options.quick)}))
        return
    arguments = [__file__, "--child", "all"] + (["--quick"] if options.quick else [])
    seen = child(arguments)
    tell("measured")
    report = Report("guards", "What is watched of a compiled step")
    both = seen["steps"]["values"]
    medians = {name: statistics.median(times) for name, times in both.items()}
    added = medians["look"] - medians["no look"]
    report.note(
        f"""A hundred layers, twenty values in a dict, a list, an object, a global: the look alone
        takes {seen["alone"]:.2f} us; blocks of steps in turns: {medians["look"]:.0f} us with it,
        {medians["no look"]:.0f} without, {added:+.1f}. The bar of {BAR:.0f} us:
        {"met" if seen["alone"] <= BAR else "MISSED"}. A task that reads no such value has no look:
        one flag is asked."""
    )
    report.raw = seen
    report.save(options.json)


if __name__ == "__main__":
    main()
