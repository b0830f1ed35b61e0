"""What a step of graph mode costs on one and two ranks, over a graph that one writes by hand.

By hand means a graph over global tensors, parameters broadcast and batches split. Both loops take
turns within the same processes::

    python benchmarks/ranks_graph.py

Bytes are those that a rank reads and writes by system calls, its exchange with the other rank among
them; there is no figure for the kernel's own work.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any, Callable, Dict, List, Tuple

from _measure import Report, child, parser, show, tell

SIZES = {"370": (6, 12, 12), "0.8 M": (64, 880, 832), "8.3 M": (256, 2800, 2700)}
"""Three-layer networks by their number of parameters: inputs, and the two hidden layers."""
ROWS, CLASSES = 32, 10
BLOCK = {"370": 20, "0.8 M": 10, "8.3 M": 5}


def _transferred() -> int:
    """Bytes that this process has read and written so far, by system calls."""
    with open("/proc/self/io", encoding="ascii") as file:
        counts = dict(line.split(": ") for line in file.read().splitlines())
    return int(counts["rchar"]) + int(counts["wchar"])


def _network(size: str) -> Any:
    from oneflow import nn

    inputs, first, second = SIZES[size]
    layers = [nn.Linear(inputs, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(second, CLASSES))


def _by_hand(size: str, ranks: int, batch: Any) -> Callable[[], Any]:
    """One step of the loop by hand; returns the loss, a local tensor."""
    import oneflow as flow
    from oneflow import nn

    model, criterion = _network(size), nn.CrossEntropyLoss()
    placement, split = flow.placement("cpu", list(range(ranks))), flow.sbp.split(0)
    whole = flow.sbp.broadcast
    if ranks > 1:
        model = model.to_global(placement, whole)
    optimizer = flow.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    class Graph(nn.Graph):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.add_optimizer(optimizer)

        def build(self, x: Any, y: Any) -> Any:
            loss = criterion(self.model(x), y)
            loss.backward()
            return loss.to_global(placement, whole) if ranks > 1 else loss

    graph = Graph()
    if ranks == 1:
        return lambda: graph(*batch)
    return lambda: graph(*(each.to_global(placement, split) for each in batch)).to_local()


def _compare(size: str, ranks: int, pairs: int) -> Dict[str, Any]:
    """Milliseconds a step of blocks in turns, by hand and by the engine, and bytes a step."""
    import oneflow as flow

    from ofengine import Callback, TaskModule, Trainer

    batch = (flow.randn(ROWS, SIZES[size][0]), flow.randint(0, CLASSES, (ROWS,)))
    by_hand, block = _by_hand(size, ranks, batch), BLOCK[size]
    found: Dict[str, List[float]] = {key: [] for key in ("hand", "own", "hand_bytes", "own_bytes")}

    class Task(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = _network(size)

        def training_step(self, given: Any, batch_idx: int) -> Any:
            return flow.nn.functional.cross_entropy(self.network(given[0]), given[1])

        def configure_optimizers(self) -> Any:
            return flow.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    class InTurns(Callback):
        """After each block of the engine's steps, as many by hand."""

        began: Tuple[float, int] = (0.0, 0)

        def on_train_batch_end(
            self, trainer: Any, task: Any, outputs: Any, given: Any, batch_idx: int
        ) -> None:
            if (batch_idx + 1) % block:
                return
            outputs["loss"].numpy()
            self.note("own", self.began)
            began = time.perf_counter(), _transferred()
            for _ in range(block):
                loss = by_hand()
            loss.numpy()
            self.note("hand", began)
            self.began = time.perf_counter(), _transferred()

        def note(self, key: str, began: Tuple[float, int]) -> None:
            found[key].append((time.perf_counter() - began[0]) / block * 1e3)
            found[f"{key}_bytes"].append((_transferred() - began[1]) / block)

    trainer = Trainer(
        mode="graph", device="cpu", max_epochs=1, seed=1, logger=False, callbacks=[InTurns()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Task(), [batch] * (block * (pairs + 2) * ranks))
    return {key: values[2:] for key, values in found.items()}  # both are warm by then


def run_child(pairs: int) -> None:
    """All cases, on this rank."""
    from ofengine.launch.environment import read

    world = read()
    ranks = 1 if world is None else world.world_size
    found = {size: _compare(size, ranks, pairs) for size in SIZES}
    if world is None or world.rank == 0:
        print(json.dumps(found), flush=True)


def main() -> None:
    """Start one process, then two ranks, and report."""
    if "--rank" in sys.argv:
        run_child(int(sys.argv[-1]))
        return
    options = parser(__doc__).parse_args()
    pairs = 3 if options.quick else 25
    report = Report("ranks_graph", "Ranks in graph mode, against a graph written by hand")
    report.note(
        f"""Three linear layers, SGD with momentum, {ROWS} rows a rank; by hand a graph over global
        tensors. Median and quartiles of {pairs} blocks that take turns; the last column is the
        median of the blocks' ratios."""
    )
    rows = []
    for ranks in (1, 2):
        launch = ["-m", "ofengine", "launch", "--nproc", str(ranks)] if ranks > 1 else []
        seen = child([*launch, __file__, "--rank", str(pairs)], timeout=1800.0)
        report.raw[str(ranks)] = seen
        for key, blocks in seen.items():
            ratios = [own / hand for own, hand in zip(blocks["own"], blocks["hand"])]
            moved = [f"{statistics.median(blocks[k]):,.0f}" for k in ("hand_bytes", "own_bytes")]
            rows.append(
                [str(ranks), key, show(blocks["hand"], 2), show(blocks["own"], 2),
                 *moved, show(ratios, 3)]
            )  # fmt: skip
        tell(f"{ranks} rank(s)")
    header = ["ranks", "parameters", "by hand, ms", "ofengine, ms", "bytes by hand",
              "bytes", "ratio"]  # fmt: skip
    report.table(header, rows)
    report.save(options.json)


if __name__ == "__main__":
    main()
