"""How often training through ``Trainer(mode="graph")`` dies on a loaded machine, mended and not.

Each run is a process that fits a small perceptron, whose steps take well under a millisecond,
in graph mode. Runs of both kinds are interleaved, several at a time, so that the machine is
loaded. A run dies where a signal ends it; every other end but 0 is counted apart::

    python benchmarks/launch_race_trainer.py --mended 200 --plain 60 --out results.jsonl

"plain" is the same program with ``OFENGINE_MEND_LAUNCH=0``. Each result is written to ``--out``
at once, so a benchmark that is cut off has lost nothing; ``--mended 0 --plain 0`` only counts
what is in it. With ``--cores FOLDER`` a mended run that dies leaves its output and its core file
there, where the kernel writes core files into the working folder (``kernel.core_pattern``).
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Counter, Dict, List, Optional, Tuple

from launch_race import describe

RUN = """
import sys
import oneflow as flow
from oneflow import nn
from ofengine import TaskModule, Trainer, _oneflow

class Task(TaskModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
        self.loss_fn = nn.MSELoss()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss_fn(self.model(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return flow.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        outputs["loss"].item()

steps, wanted = int(sys.argv[1]), sys.argv[2]
batches = [(flow.randn(8, 16), flow.randn(8, 1)) for _ in range(500)]
trainer = Trainer(
    mode="graph", device="cpu", max_steps=steps, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(Task(), batches, batches[:5])
assert trainer.global_step == steps
mended = _launch_race.mend_launch_race()
assert (mended == "mended") == (wanted == "mended"), mended
"""

KINDS = ("mended", "plain")


def interval(deaths: int, runs: int) -> Tuple[float, float]:
    """The 95 % interval of Clopper and Pearson for the share of runs that die."""

    def at_most(share: float, count: int) -> float:
        return sum(
            math.comb(runs, k) * share**k * (1.0 - share) ** (runs - k) for k in range(count + 1)
        )

    def solve(count: int, level: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):  # at_most falls as the share rises
            middle = (low + high) / 2
            low, high = (middle, high) if at_most(middle, count) > level else (low, middle)
        return low

    lower = 0.0 if deaths == 0 else solve(deaths - 1, 0.975)
    upper = 1.0 if deaths == runs else solve(deaths, 0.025)
    return lower, upper


def interleave(mended: int, plain: int) -> List[str]:
    """So many runs of each kind, spread evenly over each other."""
    places = [((i + 0.5) / mended, "mended") for i in range(mended)]
    places += [((i + 0.5) / plain, "plain") for i in range(plain)]
    return [kind for _, kind in sorted(places)]


def run_one(number: int, kind: str, steps: int, cores: Optional[Path]) -> Dict[str, object]:
    """One run; what became of it."""
    environment = {**os.environ, "OFENGINE_MEND_LAUNCH": "1" if kind == "mended" else "0"}
    folder = cores / f"{number}-{kind}" if cores is not None and kind == "mended" else None
    if folder is not None:
        folder.mkdir()
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(steps), kind],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=None if folder is None else allow_core_files,
    )
    end = describe(done.returncode)
    if folder is not None:
        (folder / f"{end}.txt").write_text(done.stdout)
        if end == "ok":
            shutil.rmtree(folder)
    seconds = round(time.monotonic() - begun, 1)
    return {"number": number, "kind": kind, "end": end, "seconds": seconds}


def allow_core_files() -> None:
    """Lift the limit on the size of core files as far as it goes."""
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (most, most))


def report(path: Path) -> None:
    """Print the counts of all results in ``path``."""
    ends: Dict[str, Counter[str]] = collections.defaultdict(collections.Counter)
    for line in path.read_text().splitlines():
        result = json.loads(line)
        ends[result["kind"]][result["end"]] += 1
    for kind, counts in ends.items():
        runs = sum(counts.values())
        deaths = sum(n for end, n in counts.items() if end in signal.Signals.__members__)
        low, high = interval(deaths, runs)
        print(
            f"{kind}: {deaths} of {runs} runs died = {deaths / runs:.1%} "
            f"(95 %: {low:.1%} to {high:.1%}); {dict(counts)}"
        )


def main() -> None:
    """Run them and count how they end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mended", type=int, default=200)
    parser.add_argument("--plain", type=int, default=60)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--at-a-time", type=int, default=2 * (os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=Path("launch_race_trainer.jsonl"))
    parser.add_argument("--cores", type=Path, help="a folder")
    options = parser.parse_args()
    if options.cores:
        options.cores.mkdir(parents=True)
    with ThreadPoolExecutor(options.at_a_time) as pool, options.out.open("a") as out:
        started = [
            pool.submit(run_one, number, kind, options.steps, options.cores)
            for number, kind in enumerate(interleave(options.mended, options.plain))
        ]
        for each in started:
            print(json.dumps(each.result()), file=out, flush=True)
    report(options.out)


if __name__ == "__main__":
    main()
