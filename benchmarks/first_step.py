"""Time to the first step, time to compile, and peak memory: the engine against a loop by hand.

Each run is a process of its own, engine and loop by hand in turns::

    python benchmarks/first_step.py
"""

from __future__ import annotations

import json
import statistics
import time
from functools import partial
from typing import Any, Dict, List

from _measure import Report, alternate, child, memory, parser, show, tell

NETWORKS = ("small CNN", "MobileNetV2")
STEPS = 12
"""Steps until the memory is read: by then everything that stays was allocated."""


def run(kind: str, mode: str, network: str) -> Dict[str, float]:
    """One run: seconds to the first step, and to the second; peak memory in MB."""
    import oneflow as flow
    from _cases import CASES, OFF, Task, hand_step
    from oneflow import nn

    from ofengine import Callback, Trainer
    from ofengine._oneflow.session import synchronize

    case = next(case for name, case in CASES.items() if name.startswith(network))
    batch = flow.randn(32, 3, 32, 32), flow.randint(0, 10, (32,))
    model, loss_fn = case.network(), nn.CrossEntropyLoss()
    synchronize()
    before = memory("VmHWM")
    moments: List[float] = [time.perf_counter()]

    if kind == "by hand":
        step = hand_step(mode, model, loss_fn, batch)
        for _ in range(STEPS):
            step().item()
            synchronize()
            moments.append(time.perf_counter())
    else:

        class Clock(Callback):
            def on_train_batch_end(
                self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
            ) -> None:
                outputs["loss"].item()
                synchronize()
                moments.append(time.perf_counter())

        trainer = Trainer(mode=mode, device="cpu", max_epochs=1, callbacks=[Clock()], **OFF)
        trainer.fit(Task(model, loss_fn), [batch] * STEPS)
    peak = memory("VmHWM")
    steps = [b - a for a, b in zip(moments, moments[1:])]
    return {
        "first": steps[0],
        "compile": steps[0] - statistics.median(steps[2:]),
        "peak": peak,
        "grown": peak - before,
    }


def main() -> None:
    """Run the processes and report."""
    options = parser(__doc__).parse_args()
    if options.child:
        print(json.dumps(run(*options.child.split("|"))))
        return
    rounds = 1 if options.quick else 3
    rows, memory = [], []
    report = Report("first_step", "Compile time, time to the first step, peak memory")
    for network in NETWORKS[:1] if options.quick else NETWORKS:
        for mode in ("eager", "graph"):
            runs = {
                kind: partial(child, [__file__, "--child", f"{kind}|{mode}|{network}"])
                for kind in ("by hand", "engine")
            }
            seen = alternate(runs, rounds)
            tell(f"{network}, {mode}")
            report.raw[f"{network}|{mode}"] = seen
            hand, ours = seen["by hand"], seen["engine"]

            def ratio(key: str, hand: Any = hand, ours: Any = ours) -> str:
                return show([b[key] / a[key] for a, b in zip(hand, ours)], 2)

            def values(of: Any, key: str, digits: int) -> str:
                return show([each[key] for each in of], digits)

            rows.append(
                [
                    network,
                    mode,
                    *(values(of, "first", 2) for of in (hand, ours)),
                    ratio("first"),
                    *(
                        (values(of, "compile", 2) for of in (hand, ours))
                        if mode == "graph"
                        else "--"
                    ),
                ]
            )
            memory.append(
                [network, mode, *(values(of, "peak", 0) for of in (hand, ours)), ratio("peak")]
            )
    report.note(
        f"""32 images of 3x32x32. {rounds} process(es) of each kind, in turns; median and
        quartiles. The first step counts from the call of fit(), or from the making of the
        optimizer, to the end of the first update; compiling is the first step less a later one."""
    )
    report.table(
        [
            "network",
            "mode",
            "first step by hand, s",
            "engine, s",
            "ratio",
            "compiling by hand, s",
            "engine, s",
        ],
        rows,
    )
    report.note(f"The largest resident memory of the process, after {STEPS} steps.")
    report.table(["network", "mode", "by hand, MB", "engine, MB", "ratio"], memory)
    report.save(options.json)


if __name__ == "__main__":
    main()
