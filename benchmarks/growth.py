"""How what the engine adds to a step grows: groups, callbacks, logged names, schedule, parameters.

As in ``step_overhead.py``, blocks of the engine's steps and of a hand-written loop's alternate. The
loop by hand has the same parameter groups and schedule, but logs nothing and calls nothing back::

    python benchmarks/growth.py
"""

from __future__ import annotations

import json
import statistics
from typing import Any, Dict, List, Optional

from _measure import Report, Turns, child, overhead, parser, show, tell

AXES: Dict[str, List[int]] = {
    "parameter groups": [1, 10, 100, 1000],
    "groups under a schedule": [1, 10, 100, 1000],
    "callbacks": [0, 10, 50],
    "logged names": [0, 10, 50],
    "steps of a schedule": [100, 10_000, 1_000_000],
    "parameters": [2, 40, 200],
}


def measured(mode: str, axis: str, size: int, quick: bool) -> Any:
    """The pairs of one point."""
    import oneflow as flow
    from _cases import OFF, Idle, Task, hand_step, measure, sgd
    from oneflow import nn

    from ofengine._oneflow.session import synchronize

    grouped = "groups" in axis
    scheduled = axis in ("groups under a schedule", "steps of a schedule")
    steps = size if axis == "steps of a schedule" else 1000

    class Scales(nn.Module):
        """A linear layer, and numbers that scale its input: a parameter for each group."""

        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.ParameterList(
                [nn.Parameter(flow.ones(1)) for _ in range(size if grouped else 1)]
            )
            self.last = nn.Linear(32, 1)

        def forward(self, x: Any) -> Any:
            return self.last(x * self.scales[0])

    def network() -> Any:
        if axis == "parameters":
            return nn.Sequential(
                *[nn.Linear(32, 32) for _ in range(size // 2 - 1)], nn.Linear(32, 1)
            )
        return Scales()

    def groups(model: Any) -> Optional[List[Dict[str, Any]]]:
        if not grouped:
            return None
        rest = [{"params": list(model.last.parameters()), "lr": 1e-3}]
        return [{"params": [p], "lr": 1e-3} for p in model.scales][: size - 1] + rest

    def schedule(optimizer: Any) -> Any:
        return flow.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    batch = flow.randn(32, 32), flow.randn(32, 1)
    loss_fn, by_hand, ours = nn.MSELoss(), network(), network()
    if grouped:  # a parameter in no group is refused, so the last scale stands still
        for model in (by_hand, ours):
            model.scales[size - 1].requires_grad_(False)
    optimizer = sgd(groups(by_hand) or [p for p in by_hand.parameters() if p.requires_grad])
    reference = hand_step(
        mode, by_hand, loss_fn, batch, optimizer, schedule(optimizer) if scheduled else None
    )
    block, pairs = (20, 3) if quick else (40, 12)
    if size >= 1000 and grouped:
        block = 5
    warm_up = 10 if axis == "steps of a schedule" and size <= 100 else 20
    if axis == "steps of a schedule" and size <= 100:
        block, pairs = 10, 9
    turns = Turns(
        batch, reference, synchronize, block, pairs, warm_up, length=steps if scheduled else None
    )
    logs = size if axis == "logged names" else 0
    callbacks = [Idle() for _ in range(size)] if axis == "callbacks" else []
    task = Task(ours, loss_fn, logs, groups(ours), schedule if scheduled else None)
    return measure(mode, task, turns, callbacks=callbacks, log_every_n_steps=50, **OFF)


def main() -> None:
    """Run the points, each in a process of its own, and report."""
    options = parser(__doc__).parse_args()
    if options.child:
        mode, axis, size = options.child.split("|")
        print(json.dumps(measured(mode, axis, int(size), options.quick)))
        return
    report = Report("growth", "How the overhead grows")
    report.note(
        """What the engine adds to a step over a loop by hand with the same groups and schedule, in
        microseconds of the thread that runs Python: median of the pairs of blocks, and quartiles.
        A small linear layer; all defaults off; each point is a process of its own. In graph mode a
        logged name is one output of the graph more, which is copied out of its buffer. Where a step
        takes Python milliseconds (many groups or parameters by hand), the difference of two such
        numbers is noise; a number below zero says no more than that."""
    )
    rows = []
    for axis, sizes in AXES.items():
        for size in sizes[:: len(sizes) - 1] if options.quick else sizes:
            row = [axis, f"{size:,}"]
            for mode in ("eager", "graph"):
                argument = f"{mode}|{axis}|{size}"
                quick = ["--quick"] if options.quick else []
                try:
                    pairs = child([__file__, "--child", argument, *quick])
                except RuntimeError as error:
                    tell(str(error))
                    row += ["failed", "", ""]
                    continue
                found = overhead(pairs)
                report.raw[argument] = pairs
                row += [f"{statistics.median(found['hand']):.0f}", show(found["cpu"])]
            rows.append(row)
            tell(" ".join(row))
    report.table(
        ["what grows", "to", "eager by hand, us", "eager adds", "graph by hand, us", "graph adds"],
        rows,
    )
    report.save(options.json)


if __name__ == "__main__":
    main()
