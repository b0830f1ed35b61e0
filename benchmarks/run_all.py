"""Run every benchmark and write ``benchmarks/RESULTS.md``: what ``make bench`` does.

    python benchmarks/run_all.py            # an hour on two idle cores
    python benchmarks/run_all.py --quick    # does everything run; writes no RESULTS.md
    python benchmarks/run_all.py --only growth threads   # these anew, the others as they were

What stands between the two marks ``findings`` in RESULTS.md is written by hand and is kept.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Dict, List

from _measure import FOLDER, markdown, parser, tell

SCRIPTS = (
    "step_overhead",
    "cookbook",
    "data",
    "peers",
    "first_step",
    "startup",
    "growth",
    "endurance",
    "threads",
    "blas",
    "cpu_speedups",
    "operators",
    "guards",
    "ranks_eager",
    "ranks_graph",
)
RESULTS = FOLDER / "RESULTS.md"
BEGIN, END = "<!-- findings -->", "<!-- /findings -->"


def processor() -> str:
    """The CPU's name, as Linux calls it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def findings() -> str:
    """What was written by hand, out of the RESULTS.md that is there."""
    if not RESULTS.exists():
        return ""
    _, _, rest = RESULTS.read_text().partition(BEGIN)
    return rest.partition(END)[0].strip()


def sections() -> Dict[str, str]:
    """What each script wrote into the RESULTS.md that is there."""
    if not RESULTS.exists():
        return {}
    _, _, rest = RESULTS.read_text().partition(END)
    found: Dict[str, str] = {}
    for part in f"\n{rest}".split("\n## ")[1:]:
        for script in SCRIPTS:
            if f"\n`benchmarks/{script}.py`" in part:
                found[script] = "## " + part.strip()
    return found


def main() -> int:
    """Run them, one after the other; 1 where one failed."""
    made = parser(__doc__)
    made.add_argument("--only", nargs="*", choices=SCRIPTS, default=list(SCRIPTS))
    options = made.parse_args()
    failed: List[str] = []
    for script in options.only:
        tell(f"{script} ...")
        load = os.getloadavg()[0]
        arguments = [sys.executable, str(FOLDER / f"{script}.py"), "--json", str(options.json)]
        if subprocess.run(arguments + ["--quick"] * options.quick).returncode:
            failed.append(script)
            continue
        path = options.json / f"{script}.json"
        report = json.loads(path.read_text())
        report["when"] = datetime.date.today().isoformat()
        report["load"] = [load, os.getloadavg()[0]]
        path.write_text(json.dumps(report, indent=1) + "\n")
    if not options.quick:
        write(options.json, [script for script in options.only if script not in failed])
    if failed:
        tell(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def write(folder: Path, made: List[str]) -> None:
    """Write RESULTS.md: the reports in ``folder`` of those ``made``, the others as they stood."""
    versions = ", ".join(
        f"{name} {metadata.version(name)}"
        for name in ("ofengine", "oneflow", "flowvision", "numpy")
    )
    lines = [
        "# Results of the benchmarks",
        "",
        "Written by `make bench`, but for the findings, which are written by hand.",
        "",
        f"{processor()}, {os.cpu_count()} cores, Linux, CPython {platform.python_version()},",
        f"{versions}.",
        "No number stands alone: what is compared took turns, and each cell has the median of the",
        "pairs with their quartiles. Only ratios and differences mean anything on another machine.",
        "",
        BEGIN,
        "",
        findings(),
        "",
        END,
        "",
    ]
    kept = sections()
    for script in SCRIPTS:
        path = folder / f"{script}.json"
        if script in made:
            report = json.loads(path.read_text())
            before, after = report["load"]
            kept[script] = (
                f"{markdown(report).rstrip()}\n\n`benchmarks/{script}.py`, {report['when']}; "
                f"load of the machine before: {before:.1f}, after: {after:.1f}."
            )
        if script in kept:
            lines += [kept[script], ""]
    RESULTS.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
