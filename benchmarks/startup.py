"""What importing ofengine costs over importing OneFlow alone, in processes that take turns.

python benchmarks/startup.py
"""

from __future__ import annotations

from functools import partial
from typing import Dict, List

from _measure import Report, alternate, child, parser, show

TIMED = """
import json, time
began = time.perf_counter()
{statement}
print(json.dumps(time.perf_counter() - began))
"""
KINDS: Dict[str, List[str]] = {
    "import oneflow": ["import oneflow", "1"],
    "import ofengine": ["import ofengine", ""],
    "import oneflow, noise filtered": ["import oneflow", ""],
    "from ofengine import Trainer, TaskModule": ["from ofengine import Trainer, TaskModule", ""],
    "import ofengine.callbacks": ["import ofengine.callbacks", ""],
}


def main() -> None:
    """Run the processes and report."""
    options = parser(__doc__).parse_args()
    rounds = 2 if options.quick else 9
    runs = {
        name: partial(
            child, ["-c", TIMED.format(statement=statement)], {"OFENGINE_KEEP_NOISE": noise}
        )
        for name, (statement, noise) in KINDS.items()
    }
    seen = alternate(runs, rounds)
    report = Report("startup", "Start-up")
    report.note(
        f"""{rounds} processes of each kind, in turns; median and quartiles. `import ofengine` alone
        does not import OneFlow: names are looked up when first used. The first row is OneFlow as it
        is, with its lines of noise; differences are to it, round by round."""
    )
    plain = seen["import oneflow"]
    report.table(
        ["what", "seconds", "more than `import oneflow`, s"],
        [
            [f"`{name}`", show(values, 3), show([b - a for a, b in zip(plain, values)], 3)]
            for name, values in seen.items()
        ],
    )
    report.raw = seen
    report.save(options.json)


if __name__ == "__main__":
    main()
