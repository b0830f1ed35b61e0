"""What ``cpu_speedups`` does to a training step, in both modes: flowvision's models, text models.

In one process a model with and one without take turns, step by step; loops by hand, SGD with
momentum::

    python benchmarks/cpu_speedups.py
"""

from __future__ import annotations

import copy
import json
import sys
import time
from typing import Any, Callable, Dict, List, Tuple

from _measure import Report, child, parser, show, tell
from _models import LENGTH, MODELS, SENTENCES, TEXT, WIDTH, network

NAMES = (*MODELS, *TEXT)


def steps(name: str, mode: str, pairs: int) -> Dict[str, Any]:
    """Milliseconds of each step, by the clock and of all threads; how far the losses are apart."""
    import oneflow as flow
    from _cases import hand_step
    from oneflow import nn

    from ofengine import cpu_speedups
    from ofengine._oneflow.launch_race import mend_launch_race
    from ofengine._oneflow.session import synchronize

    mend_launch_race()
    flow.manual_seed(0)
    own, *batch = network(name)
    faster = copy.deepcopy(own)
    speedups = cpu_speedups(faster)
    made = [hand_step(mode, each, nn.CrossEntropyLoss(), batch) for each in (own, faster)]

    def timed(step: Callable[[], Any]) -> Tuple[float, float]:
        synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        synchronize()
        return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3

    losses = []
    for step in made:
        flow.manual_seed(1)  # for dropout
        losses.append(float(step().numpy()))
    measured = [[timed(step) for step in made] for _ in range(pairs)]
    return {"pairs": measured, "layers": speedups.layers, "losses": losses}


def main() -> int:
    """Run the processes and report."""
    options = parser(__doc__).parse_args()
    if options.child:
        name, mode, pairs = options.child.split("|")
        print(json.dumps(steps(name, mode, int(pairs))))
        return 0
    report = Report("cpu_speedups", "Faster operators on a CPU")
    report.note(
        f"""A training step in milliseconds, OneFlow's own operators and those of `cpu_speedups` in
        turns, step by step; ratios pair by pair, of the time by the clock and of what all threads
        of the process have computed, which a busy machine disturbs less. The last column is how far
        the losses of the first step are apart, as a share. LSTM and transformer: two layers of
        width {WIDTH}, sentences of {LENGTH} words."""
    )
    rows: List[List[str]] = []
    for name in NAMES if not options.quick else TEXT:
        for mode in ("eager", "graph"):
            tell(f"{name}, {mode}")
            pairs = 1 if options.quick else 7
            found = child([__file__, "--child", f"{name}|{mode}|{pairs}"], timeout=1800)
            report.raw[f"{name}|{mode}"] = found
            walls = [[each[0] for each in pair] for pair in found["pairs"]]
            processor = [[each[1] for each in pair] for pair in found["pairs"]]
            first, second = found["losses"]
            layers = ", ".join(f"{count} {kind}" for kind, count in found["layers"].items())
            rows.append(
                [
                    f"{name}, batch {MODELS[name][1] if name in MODELS else SENTENCES} ({layers})",
                    mode,
                    show([own for own, _ in walls], 0),
                    show([faster for _, faster in walls], 0),
                    show([faster / own for own, faster in walls], 2),
                    show([faster / own for own, faster in processor], 2),
                    f"{abs(first - second) / abs(first):.0e}",
                ]
            )
    header = ["model", "mode", "own, ms", "faster, ms", "ratio", "of the processor's time", "loss"]
    report.table(header, rows)
    report.save(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
