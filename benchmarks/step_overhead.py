"""What a step costs through ``Trainer.fit`` over a loop written by hand, eager and graph.

Both loops take turns within one process, a few steps each, and both read the loss every 50 steps.
"Defaults" is ``Trainer(mode=..., max_epochs=1)`` with its progress bar (to a buffer), CSV logger,
checkpointing and summary; "all off" is without these four::

    python benchmarks/step_overhead.py
"""

from __future__ import annotations

import json
import statistics
from typing import Dict, List

from _measure import OVERHEAD_HEADER, Report, child, overhead, overhead_cells, parser, tell

VARIANTS = ("defaults", "all off")
BAR = 20.0
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
    print(json.dumps(found))


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
        wall time of the big networks varies by far more than the engine adds."""
    )
    rows = []
    for key, pairs in seen.items():
        name, mode, variant = key.split("|")
        rows.append([name, mode, variant, *overhead_cells(pairs)])
    report.table(["network", "mode", "Trainer", *OVERHEAD_HEADER], rows)
    for mode in ("eager", "graph"):
        key = next(key for key in seen if f"|{mode}|defaults" in key)
        found = statistics.median(overhead(seen[key])["wall"])
        each = ", ".join(f"{value:.1f}" for value in medians[key])
        report.note(
            f"""The bar of {BAR:.0f} us with defaults, linear layer, {mode}:
            {"met" if found <= BAR else "MISSED"} with {found:.1f} us (single processes: {each})."""
        )
    report.raw = {"pairs": seen, "medians": medians}
    report.save(options.json)


if __name__ == "__main__":
    main()
