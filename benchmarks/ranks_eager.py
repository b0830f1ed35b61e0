"""Several ranks in eager mode: a step against OneFlow's own DDP, the exchange, its memory.

On each rank the engine's loop and a hand-written loop over ``DistributedDataParallel`` take turns,
block by block; with one rank the loop by hand is a plain one. Then the exchange of the gradients
alone, by the number of parameters, and what it adds to the peak of the memory. All ranks share
this machine's cores, so efficiency over ranks is that of these cores and not of the exchange::

    python benchmarks/ranks_eager.py
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

from _measure import Report, alternate, child, parser, quartiles, show, tell

NETWORKS = ("small CNN, batch 8", "MLP, batch 32", "wide MLP, batch 32", "MobileNetV2, batch 8")
RANKS = (1, 2, 4)
SIZES = (10_000, 100_000, 1_000_000, 8_000_000)


def network(name: str) -> Tuple[Any, Any, int]:
    """The model, a batch, and how many steps a block has."""
    import oneflow as flow
    from _cases import mlp, mobilenet_v2, small_cnn
    from oneflow import nn

    images = 32 if "MLP" in name else 8
    batch = flow.randn(images, 3, 32, 32), flow.randint(0, 10, (images,))
    if "CNN" in name:
        return small_cnn(), batch, 20
    if "MobileNet" in name:
        return mobilenet_v2(), batch, 2
    if "wide" not in name:
        return mlp(), batch, 20
    wide = nn.Sequential(nn.Flatten(), nn.Linear(3072, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return wide, batch, 5


def steps(name: str, pairs: int) -> Dict[str, Any]:
    """Milliseconds a step of both loops, pair by pair; how many parameters there are."""
    import oneflow as flow
    from _cases import OFF, Task, hand_step
    from oneflow import nn

    from ofengine import Callback, Trainer
    from ofengine._oneflow.session import synchronize

    flow.manual_seed(0)
    model, batch, block = network(name)
    by_hand = network(name)[0]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        by_hand = nn.parallel.DistributedDataParallel(by_hand)
    hand = hand_step("eager", by_hand, nn.CrossEntropyLoss(), batch)
    measured: List[Tuple[float, float]] = []

    def time_by_hand() -> float:
        start = time.perf_counter()
        for _ in range(block):
            loss = hand()
        loss.numpy()
        synchronize()
        return time.perf_counter() - start

    class Turns(Callback):
        """Times its own blocks; at their ends, the other loop's."""

        def __init__(self) -> None:
            self.start = 0.0

        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            batch_idx = arguments[-1]
            if (batch_idx + 1) % block:
                return
            synchronize()
            own = time.perf_counter() - self.start
            by_hand = time_by_hand()
            if batch_idx > block:  # the first ones are a warm-up
                measured.append((by_hand * 1e3 / block, own * 1e3 / block))
            synchronize()
            self.start = time.perf_counter()

    batches = [batch] * (block * (pairs + 2) * world)
    task = Task(model, nn.CrossEntropyLoss())
    Trainer(device="cpu", max_epochs=1, callbacks=[Turns()], **OFF).fit(task, batches)
    count = sum(int(each.numel()) for each in model.parameters())
    return {"pairs": measured, "parameters": count}


def exchanges(rounds: int) -> Dict[str, Any]:
    """Milliseconds of one exchange by the number of parameters; what the largest adds to memory."""
    import oneflow as flow

    from ofengine._oneflow.session import synchronize
    from ofengine.launch.environment import read
    from ofengine.ranks.gradients import GradientExchange
    from ofengine.ranks.meetings import Meetings

    world = read()
    assert world is not None
    found: Dict[str, Any] = {}
    for size in SIZES:
        parameter = flow.nn.Parameter(flow.zeros(size))
        gradient = flow.ones(size)
        exchange = GradientExchange(Meetings(world), [parameter])
        before, taken = peak_memory(), []
        for _ in range(rounds):
            parameter.grad = gradient
            synchronize()
            start = time.perf_counter()
            exchange.add()
            synchronize()  # the device adds while the ranks go on
            taken.append((time.perf_counter() - start) * 1e3)
            exchange.clear()
        found[str(size)] = {"ms": statistics.median(taken[1:]), "MB": peak_memory() - before}
    return found


def peak_memory() -> float:
    """The most that this process has had in memory, in MB."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) / 1024


def run_child(what: str, quick: bool) -> None:
    """Carry it out; rank 0 prints what it found."""
    few = quick * 8
    found = exchanges(12 - few) if what == "exchange" else steps(what, 12 - few)
    if int(os.environ.get("RANK", "0")) <= 0:
        print(json.dumps(found), flush=True)


def main() -> int:
    """Measure, and leave the report."""
    options = parser(__doc__).parse_args()
    if options.child:
        run_child(options.child, options.quick)
        return 0
    quick = ["--quick"] * options.quick

    def started(ranks: int, what: str) -> Any:
        arguments = [__file__, "--child", what, *quick]
        launch = ["-m", "ofengine", "launch", "--nproc", str(ranks)] if ranks > 1 else []
        return child([*launch, *arguments])

    report = Report("ranks_eager", "Several ranks in eager mode")
    report.note(
        f"`benchmarks/ranks_eager.py`: {os.cpu_count()} cores for all ranks together. Milliseconds "
        "a step on rank 0; by hand: OneFlow's DistributedDataParallel, with one rank a plain loop. "
        "Ratio: the engine's block over the hand-written one beside it. Efficiency: samples a "
        "second over those of as many single processes, which would be 1 on as many machines."
    )
    rows, rounds = [], 1 if options.quick else 3
    for name in NETWORKS:
        runs = {str(n): (lambda n=n, name=name: started(n, name)) for n in RANKS}
        seen = alternate(runs, rounds, lambda text, name=name: tell(f"{name}: {text}"))
        report.raw[name] = seen
        alone = 0.0
        for ranks in RANKS:
            pairs = [pair for each in seen[str(ranks)] for pair in each["pairs"]]
            own = quartiles([pair[1] for pair in pairs])[0]
            alone = alone or own
            rows.append(
                [
                    f"{name}, {seen[str(ranks)][0]['parameters']:,} parameters",
                    str(ranks),
                    show([pair[0] for pair in pairs], 2),
                    show([pair[1] for pair in pairs], 2),
                    show([pair[1] / pair[0] for pair in pairs], 3),
                    f"{alone / own:.2f}",
                ]
            )
    report.table(["network", "ranks", "by hand", "engine", "ratio", "efficiency"], rows)
    report.note(
        "The exchange alone, of float32 gradients that are there already: milliseconds, and what "
        "it adds to the peak of a rank's memory, in MB, where each size is tried after the smaller."
    )
    several = [n for n in RANKS if n > 1]
    seen = alternate({str(n): (lambda n=n: started(n, "exchange")) for n in several}, rounds, tell)
    report.raw["exchange"] = seen
    rows = []
    for size in SIZES:
        cells = [f"{size:,}"]
        for ranks in several:
            found = [each[str(size)] for each in seen[str(ranks)]]
            cells += [show([each["ms"] for each in found]), show([each["MB"] for each in found], 0)]
        rows.append(cells)
    header = ["parameters", *(f"{n} ranks, {what}" for n in several for what in ("ms", "MB"))]
    report.table(header, rows)
    report.save(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
