"""What a step costs through ``Trainer.fit`` over a loop written by hand, eager and graph.

Both loops take turns within one process, a few steps each, and both read the loss every 50 steps.
"Defaults" is ``Trainer(mode=..., max_epochs=1)`` with its progress bar (to a buffer), CSV logger,
checkpointing and summary; "all off" is without these four. Then a step whose values are watched,
and two ranks; ``guards.py``, ``ranks_eager.py`` and ``ranks_graph.py`` say more of these::

    python benchmarks/step_overhead.py
"""

from __future__ import annotations

import json
import statistics
from typing import Any, Dict, List

from _measure import (
    FOLDER,
    OVERHEAD_HEADER,
    Report,
    child,
    overhead,
    overhead_cells,
    parser,
    show,
    tell,
)

VARIANTS = ("defaults", "all off")
BARS = {"eager": 10.0, "graph": 3.0}
"""Microseconds a step that the engine may add."""


def run_child(quick: bool) -> None:
    """All cases once, in this process."""
    from _cases import CASES, MODES, OFF, compare

    found = {}
    for name, case in CASES.items():
        for mode in MODES:
            for variant in VARIANTS:
                pairs = compare(mode, case, quick, **(OFF if variant == "all off" else {}))
                found[f"{name}|{mode}|{variant}"] = pairs
    found["100 layers, 20 watched values|graph|all off"] = watched(quick)
    print(json.dumps(found))


def watched(quick: bool) -> List[Any]:
    """A hundred layers and a step that reads twenty values, in graph mode; by hand, constants."""
    import oneflow as flow
    from _cases import OFF, Task, hand_step, measure
    from _measure import Turns
    from oneflow import nn

    from ofengine._oneflow.session import synchronize

    def network() -> nn.Module:
        return nn.Sequential(*[nn.Linear(2, 2) for _ in range(100)])

    class Watched(Task):
        def __init__(self) -> None:
            super().__init__(network(), nn.MSELoss())
            self.weights = {f"w{i}": 1.0 for i in range(10)}
            self.powers = [1.0] * 10

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            scale = sum(self.weights.values()) * sum(self.powers)
            return super().training_step(batch, batch_idx) * scale

    class Scaled(nn.Module):
        def forward(self, x: Any, y: Any) -> Any:
            return nn.functional.mse_loss(x, y) * 100.0

    batch = flow.randn(8, 2), flow.randn(8, 2)
    reference = hand_step("graph", network(), Scaled(), batch)
    turns = Turns(batch, reference, synchronize, 20, 6 if quick else 60, 20)
    return measure("graph", Watched(), turns, **OFF)


def of_ranks(quick: bool) -> Dict[str, Any]:
    """Pairs of milliseconds a step on rank 0 of two, by hand and through the engine."""
    arguments = ["--child", "small CNN, batch 8"] + ["--quick"] * quick
    launch = ["-m", "ofengine", "launch", "--nproc", "2"]
    found = child([*launch, str(FOLDER / "ranks_eager.py"), *arguments])
    pairs: Dict[str, Any] = {"eager": found["pairs"]}
    found = child([*launch, str(FOLDER / "ranks_graph.py"), "--rank", "4" if quick else "12"])
    pairs["graph"] = list(zip(found["0.8 M"]["hand"], found["0.8 M"]["own"]))
    return pairs


def main() -> None:
    """Run the processes and report."""
    options = parser(__doc__).parse_args()
    if options.child:
        run_child(options.quick)
        return
    arguments = [__file__, "--child", "all"] + (["--quick"] if options.quick else [])
    seen: Dict[str, List[List[float]]] = {}
    medians: Dict[str, List[float]] = {}
    rounds = 1 if options.quick else 3
    for index in range(rounds):
        for key, pairs in child(arguments).items():
            seen.setdefault(key, []).extend(pairs)
            medians.setdefault(key, []).append(statistics.median(overhead(pairs)["wall"]))
        tell(f"process {index + 1} of {rounds}")
    report = Report("step_overhead", "A step, against the loop written by hand")
    report.note(
        f"""SGD with momentum, 3x32x32 images. Each row: {rounds} process(es), in which blocks of
        3 to 100 steps of the engine and of the hand-written loop alternate. Median, and in brackets
        the quartiles, of the pairs of neighbouring blocks. The last column is the difference in the
        CPU time of the thread that runs Python, which other work on the machine disturbs less; the
        wall time of the big networks varies by far more than the engine adds. Two ranks share this
        machine's cores; by hand they are OneFlow's DDP, and a graph over global tensors."""
    )
    rows = []
    for key, pairs in seen.items():
        name, mode, variant = key.split("|")
        rows.append([name, mode, variant, *overhead_cells(pairs)])
    ranks = [of_ranks(options.quick) for _ in range(rounds)]
    for mode, name in (("eager", "small CNN, batch 8"), ("graph", "3 linear layers, 0.8 M")):
        both = [pair for each in ranks for pair in each[mode]]
        cells = [
            f"{statistics.median(hand * 1e3 for hand, _ in both):.0f}",
            show([own / hand for hand, own in both], 3),
            show([(own - hand) * 1e3 for hand, own in both], 0),
        ]
        rows.append([f"{name}, 2 ranks", mode, "all off", *cells, ""])
    report.table(["network", "mode", "Trainer", *OVERHEAD_HEADER], rows)
    for mode in ("eager", "graph"):
        key = next(key for key in seen if f"|{mode}|defaults" in key)
        found = statistics.median(overhead(seen[key])["wall"])
        each = ", ".join(f"{value:.1f}" for value in medians[key])
        report.note(
            f"""The bar of {BARS[mode]:.0f} us with defaults, linear layer, {mode}:
            {"met" if found <= BARS[mode] else "MISSED"} with {found:.1f} us (single processes:
            {each})."""
        )
    report.raw = {"pairs": seen, "medians": medians, "ranks": ranks}
    report.save(options.json)


if __name__ == "__main__":
    main()
