"""What the benchmarks share: taking turns, medians with their spread, children, JSON, tables.

Nothing here imports OneFlow or ofengine, so that it serves environments without them too.

A machine has slow and fast moments. So no number here stands alone: what is compared takes turns
within milliseconds (:class:`Turns`) or process by process (:func:`alternate`), each pair gives one
difference and one ratio, and what is printed is their median with the two quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

FOLDER = Path(__file__).resolve().parent
OUT = FOLDER.parent / "build" / "bench"
"""Where each script leaves its JSON."""

READ_EVERY = 50
"""Steps between two readings of the loss, by hand as by the engine's default."""


class Pair(NamedTuple):
    """One block of each loop, in microseconds a step."""

    hand_wall: float
    hand_cpu: float
    wall: float
    cpu: float


class Turns:
    """Batches for a training loop, between whose blocks a hand-written loop has its turn.

    The loop under test goes over this object. ``pairs`` times, ``block`` of its steps are timed,
    and next to them as many steps of the other loop, before or after in turns. "Wall" is the time
    from asking for the block's first batch until the device has done the last of it; "CPU" is what
    the thread that runs Python has computed meanwhile, which a busy machine disturbs far less.

    Args:
        batch: the batch, always the same one.
        reference: one step of the hand-written loop; returns the loss.
        synchronize: waits until the device has done everything.
        block: steps of a block.
        pairs: how many pairs of blocks.
        warm_up: steps of each loop before the first pair.
        length: what ``len`` says, where that is to be more than the steps really given.
    """

    def __init__(
        self,
        batch: Any,
        reference: Callable[[], Any],
        synchronize: Callable[[], None],
        block: int,
        pairs: int,
        warm_up: int = 20,
        length: Optional[int] = None,
    ) -> None:
        self.batch = batch
        self.reference = reference
        self.synchronize = synchronize
        self.block = block
        self.pairs = pairs
        self.warm_up = warm_up
        self.steps = warm_up + block * pairs
        self.length = self.steps if length is None else length
        self.measured: List[Pair] = []
        self.done: Callable[[], None] = lambda: None
        """Called before the last batch is given: where a run is to end before its length."""
        self.read: Callable[[Any], Any] = lambda loss: loss.item()
        """How the hand-written loop reads its loss every :data:`READ_EVERY` steps."""
        self._read = 0

    def __len__(self) -> int:
        return self.length

    def _hand(self, steps: int) -> None:
        for _ in range(steps):
            loss = self.reference()
            self._read += 1
            if self._read % READ_EVERY == 0:
                self.read(loss)
        self.synchronize()

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.warm_up):
            yield self.batch
        self._hand(self.warm_up)
        for index in range(self.pairs):
            hand_first = index % 2 == 0
            hand = (0.0, 0.0)
            if hand_first:
                hand = self._time_hand()
            self.synchronize()
            wall, cpu = time.perf_counter(), time.thread_time()
            for step in range(self.block):
                if index == self.pairs - 1 and step == self.block - 1:
                    self.done()
                yield self.batch
            self.synchronize()
            wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
            if not hand_first:
                hand = self._time_hand()
            scale = 1e6 / self.block
            self.measured.append(Pair(hand[0] * scale, hand[1] * scale, wall * scale, cpu * scale))

    def _time_hand(self) -> Any:
        self.synchronize()
        wall, cpu = time.perf_counter(), time.thread_time()
        self._hand(self.block)
        return time.perf_counter() - wall, time.thread_time() - cpu


# ---------------------------------------------------------------------- numbers


def quartiles(values: Sequence[float]) -> Sequence[float]:
    """Median, lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def show(values: Sequence[float], digits: int = 1) -> str:
    """The median, with the quartiles in brackets."""
    middle, low, high = quartiles(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def overhead(pairs: Sequence[Sequence[float]]) -> Dict[str, Any]:
    """What the loop under test costs over the hand-written one, from pairs of blocks.

    Keys: ``hand`` (microseconds a step), ``wall`` and ``cpu`` (differences in microseconds a
    step), ``ratio`` (of the wall times); lists with one number a pair.
    """
    measured = [Pair(*pair) for pair in pairs]
    return {
        "hand": [p.hand_wall for p in measured],
        "wall": [p.wall - p.hand_wall for p in measured],
        "cpu": [p.cpu - p.hand_cpu for p in measured],
        "ratio": [p.wall / p.hand_wall for p in measured],
    }


OVERHEAD_HEADER = ["by hand, us a step", "ratio", "overhead, us a step", "in Python's thread, us"]


def overhead_cells(pairs: Sequence[Sequence[float]]) -> List[str]:
    """The four cells of :data:`OVERHEAD_HEADER`."""
    found = overhead(pairs)
    hand = statistics.median(found["hand"])
    return [
        f"{hand:.0f}",
        show(found["ratio"], 3),
        show(found["wall"], 0 if hand > 5000 else 1),
        show(found["cpu"], 0 if hand > 5000 else 1),
    ]


def alternate(
    runs: Dict[str, Callable[[], Any]], rounds: int, tell: Callable[[str], None] = lambda _: None
) -> Dict[str, List[Any]]:
    """Call each of ``runs`` once a round, in an order that turns by one from round to round."""
    seen: Dict[str, List[Any]] = {name: [] for name in runs}
    names = list(runs)
    for index in range(rounds):
        at = index % len(names)
        for name in names[at:] + names[:at]:
            seen[name].append(runs[name]())
        tell(f"round {index + 1} of {rounds}")
    return seen


# ---------------------------------------------------------------------- children


def memory(field: str) -> float:
    """Megabytes of this process: "VmHWM", the most it ever had, or "VmRSS", what it has now.

    ``ru_maxrss`` of a child begins at what its parent had.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def child(
    arguments: Sequence[str],
    env: Optional[Dict[str, str]] = None,
    python: str = sys.executable,
    timeout: float = 600.0,
) -> Any:
    """Run ``python arguments`` in a process of its own; what its last line of JSON says.

    Raises:
        RuntimeError: it failed, or printed no JSON.
    """
    process = subprocess.run(
        [python, *arguments],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    lines = process.stdout.strip().splitlines()
    if process.returncode or not lines:
        raise RuntimeError(
            f"{' '.join(arguments)} ended with {process.returncode}:\n{process.stderr[-2000:]}"
        )
    return json.loads(lines[-1])


# ---------------------------------------------------------------------- reports


class Report:
    """What one script found: notes, tables, and the raw numbers in JSON.

    Args:
        name: the JSON file's name, without its ending.
        title: the section's title in RESULTS.md.
    """

    def __init__(self, name: str, title: str) -> None:
        self.name = name
        self.title = title
        self.parts: List[Dict[str, Any]] = []
        self.raw: Dict[str, Any] = {}

    def note(self, text: str) -> None:
        """Add a paragraph."""
        self.parts.append({"note": " ".join(text.split())})

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table."""
        self.parts.append({"header": list(header), "rows": [list(row) for row in rows]})

    def save(self, folder: Path) -> None:
        """Print it, and leave it as JSON in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {"title": self.title, "parts": self.parts, "raw": self.raw}
        (folder / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n")
        print(markdown(content), flush=True)


def markdown(report: Dict[str, Any]) -> str:
    """A report as a section of RESULTS.md."""
    lines = [f"## {report['title']}", ""]
    for part in report["parts"]:
        if "note" in part:
            lines += [*wrapped(part["note"]), ""]
            continue
        header, rows = part["header"], part["rows"]
        lines.append("| " + " | ".join(header) + " |")
        lines.append("|" + "---|" * len(header))
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def wrapped(text: str, width: int = 100) -> List[str]:
    """``text`` in lines of at most ``width``."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


def tell(text: str) -> None:
    """Say how far the script is, where it does not disturb what it prints."""
    print(f"  {text}", file=sys.stderr, flush=True)


def parser(doc: Optional[str]) -> argparse.ArgumentParser:
    """A parser with what every script takes."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.add_argument("--quick", action="store_true", help="fewer rounds: does it run at all")
    made.add_argument("--json", type=Path, default=OUT, help="the folder for the JSON")
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made
