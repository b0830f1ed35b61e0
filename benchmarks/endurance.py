"""What a process keeps of the fits it has made, and what hundreds of logged names cost.

Memory: graphs by hand and fits of the engine, in processes of their own that take turns; each makes
many, and the second half of them is looked at: what the process has more of its own memory after
it, for each fit. Both compile the same number of graphs::

    python benchmarks/endurance.py
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

from _measure import Report, alternate, child, parser, quartiles, show, tell

NETWORKS = ("perceptron", "with dropout", "with validation", "the same task again", "eager mode")
NAMES = 500
STEPS = 300


def own_memory() -> float:
    """Megabytes that are this process's alone."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (anonymous,) = [line.split()[1] for line in lines if line.startswith("Anonymous:")]
    return int(anonymous) / 1024


def kept_by(kind: str, who: str, fits: int) -> float:
    """Megabytes a fit, over the second half of ``fits``, that the process keeps."""
    import oneflow as flow
    from oneflow import nn

    from ofengine import TaskModule, Trainer
    from ofengine._oneflow.launch_race import mend_or_tell

    x, y = flow.randn(8, 32), flow.randn(8, 1)
    batches = [(x, y)] * 4
    validates = kind == "with validation"

    def network() -> Any:
        layers = [nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)]
        if kind == "with dropout":
            layers.insert(2, nn.Dropout(0.5))
        return nn.Sequential(*layers)

    def loss_of(model: Any, batch: Any) -> Any:
        return (model(batch[0]) - batch[1]).square().mean()

    class Task(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = loss_of(self.model, batch)
            self.log("loss_again", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", loss_of(self.model, batch))

        def configure_optimizers(self) -> Any:
            return flow.optim.SGD(self.param_groups(), lr=1e-3, momentum=0.9)

    class Trains(nn.Graph):
        def __init__(self, model: Any, optimizer: Any) -> None:
            super().__init__()
            self.model = model
            self.add_optimizer(optimizer)

        def build(self, *batch: Any) -> Any:
            loss = loss_of(self.model, batch)
            loss.backward()
            return loss

    class Evaluates(nn.Graph):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def build(self, *batch: Any) -> Any:
            return loss_of(self.model, batch)

    def by_hand() -> None:
        model = network()
        optimizer = flow.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        graph = Trains(model, optimizer)
        for batch in batches:
            loss = graph(*batch)
        loss.numpy()
        if validates:
            model.eval()
            with flow.no_grad():
                Evaluates(model)(x, y).numpy()

    same = Task()

    def ours() -> None:
        task = same if kind == "the same task again" else Task()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            mode = "eager" if kind == "eager mode" else "graph"
            trainer = Trainer(mode=mode, device="cpu", max_epochs=1, default_root_dir=folder)
            trainer.fit(task, batches, batches[:1] if validates else None)

    mend_or_tell()  # or graphs by hand that are as small as these crash now and then
    before = 0.0
    for number in range(fits):
        if number == fits // 2:
            gc.collect()
            before = own_memory()
        by_hand() if who == "by hand" else ours()
    gc.collect()
    return (own_memory() - before) / (fits - fits // 2)


def seconds_of_fit(mode: str, names: int, means: bool) -> float:
    """Seconds that a fit takes whose step computes one loss and logs it under so many names."""
    import oneflow as flow
    from _cases import CASES, OFF

    from ofengine import TaskModule, Trainer

    case = CASES["small CNN, batch 8"]

    class Task(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss = case.network(), case.loss()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(self.model(batch[0]), batch[1])
            for number in range(names):
                self.log(f"metric{number}", loss, on_epoch=means)
            return loss

        def configure_optimizers(self) -> Any:
            return flow.optim.SGD(self.param_groups(), lr=1e-3)

    batch = case.batch()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options = {**OFF, "logger": True, "default_root_dir": folder, "max_epochs": 1}
        trainer = Trainer(mode=mode, device="cpu", **options)
        begun = time.perf_counter()
        trainer.fit(Task(), [batch] * STEPS)
        return time.perf_counter() - begun


def memory(report: Report, quick: bool) -> None:
    """The first table."""
    fits, rounds = (12, 1) if quick else (100, 3)
    rows: List[List[str]] = []
    for kind in NETWORKS:
        who = ["the engine"] if kind == "eager mode" else ["by hand", "the engine"]

        def one(name: str, kind: str = kind) -> float:
            return float(child([__file__, "--child", f"memory|{kind}|{name}|{fits}"]))

        runs = {name: (lambda name=name: one(name)) for name in who}
        seen: Dict[str, List[float]] = alternate(runs, rounds, tell)
        report.raw[f"memory|{kind}"] = seen
        by_hand, ours = seen.get("by hand"), seen["the engine"]
        more = "" if by_hand is None else f"{quartiles(ours)[0] - quartiles(by_hand)[0]:.2f}"
        rows.append([kind, "" if by_hand is None else show(by_hand, 2), show(ours, 2), more])
        tell(" ".join(rows[-1]))
    report.note(
        f"""Megabytes of its own that a process keeps of each fit (4 steps, 8 rows of 32 numbers),
        over the second half of {fits} fits; {rounds} process(es) of each kind in turns, the
        median with quartiles. By hand: as many bare `nn.Graph`s, each with a new network and
        optimizer. OneFlow keeps what it has compiled; the engine's own share is the difference."""
    )
    report.table(["fits", "bare graphs, MB a fit", "the engine, MB a fit", "difference"], rows)


def logged_names(report: Report, quick: bool) -> None:
    """The second table."""
    rounds = 1 if quick else 5
    rows: List[List[str]] = []
    for mode in ("eager", "graph"):
        for means in (False, True):

            def one(names: int, mode: str = mode, means: bool = means) -> float:
                return float(child([__file__, "--child", f"names|{mode}|{names}|{int(means)}"]))

            runs = {"one": lambda one=one: one(1), "many": lambda one=one: one(NAMES)}
            seen = alternate(runs, rounds, tell)
            report.raw[f"names|{mode}|{means}"] = seen
            ratios = [many / single for single, many in zip(seen["one"], seen["many"])]
            what = "steps and means of the epoch" if means else "steps"
            median = statistics.median
            row = [mode, what, f"{median(seen['one']):.2f}", f"{median(seen['many']):.2f}"]
            rows.append([*row, show(ratios, 2)])
            tell(" ".join(rows[-1]))
    report.note(
        f"""Seconds of a whole fit of {STEPS} steps, compiling included, that logs its loss under
        one name and under {NAMES}: a small CNN at batch 8, a CSVLogger, {rounds} process(es) of
        each kind in turns. The ratio is of neighbouring processes, the median with quartiles."""
    )
    report.table(["mode", "logged", "one name, s", f"{NAMES} names, s", "ratio"], rows)


def main() -> None:
    """Run the points, each in a process of its own, and report."""
    options = parser(__doc__).parse_args()
    if options.child:
        what, *given = options.child.split("|")
        if what == "memory":
            print(json.dumps(kept_by(given[0], given[1], int(given[2]))))
        else:
            print(json.dumps(seconds_of_fit(given[0], int(given[1]), given[2] == "1")))
        return
    report = Report("endurance", "Many fits, many names")
    memory(report, options.quick)
    logged_names(report, options.quick)
    report.save(options.json)


if __name__ == "__main__":
    main()
