"""The peers: what their trainers add to a step, and a whole training beside OneFlow's.

PyTorch, Lightning and Ignite have an environment of their own, which the script makes once below
``build/bench``. First what Lightning and Ignite add to a bare PyTorch loop, by the same measure as
the engine's first table. Then an epoch of three networks, each in a process of its own: PyTorch by
hand, Lightning, OneFlow by hand and the engine, in turns; and what a step's layers take in either
framework, one by one, which says what the rest between the two is made of::

    python benchmarks/peers.py             # six minutes on two idle cores
    python benchmarks/peers.py --quick     # does it run
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from typing import Any, Callable, Dict, List

import _peer_layers
import _peers
from _measure import (
    OUT,
    OVERHEAD_HEADER,
    Report,
    Turns,
    alternate,
    child,
    overhead_cells,
    parser,
    show,
    tell,
)

PACKAGES = (
    "torch==2.13.0",
    "lightning==2.5.5",
    "pytorch-ignite==0.5.*",
    "numpy<2.3",
    "pillow",
)
KINDS = ("Lightning, defaults", "Lightning, barebones", "Ignite")


def environment() -> str:
    """The Python of the peers' environment; made where it is not there, or has other packages.

    PyTorch needs no Python as old as OneFlow's, so 3.11 is taken where there is one.
    """
    folder = OUT / "peers"
    python = str(folder / "bin" / "python")
    ready = folder / ".ready"
    wanted = "\n".join(PACKAGES)
    if not ready.exists() or ready.read_text() != wanted:
        base = shutil.which("python3.11") or sys.executable
        subprocess.run([base, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        ready.write_text(wanted)
    return python


def run(kind: str, quick: bool) -> List[Any]:
    """The pairs of one kind, in the peers' environment."""
    import torch

    x, y = torch.randn(32, 32), torch.randn(32, 1)
    loss_fn = torch.nn.MSELoss()

    def sgd(model: Any) -> Any:
        return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def stepper(model: Any) -> Callable[..., Any]:
        optimizer = sgd(model)

        def step(x: Any = x, y: Any = y) -> Any:
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        return step

    reference = stepper(torch.nn.Linear(32, 1))
    turns = Turns((x, y), reference, lambda: None, 100, 6 if quick else 60)
    if kind == "Ignite":
        from ignite.engine import Engine

        step = stepper(torch.nn.Linear(32, 1))
        Engine(lambda engine, batch: step(*batch).detach()).run(
            turns, max_epochs=1, epoch_length=turns.steps
        )
        return turns.measured

    import lightning

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Linear(32, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return loss_fn(self.model(x), y)

        def configure_optimizers(self) -> Any:
            return sgd(self.model)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments: Dict[str, Any] = {"default_root_dir": folder}
        if "barebones" in kind:
            arguments = {"barebones": True}
        trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, **arguments)
        trainer.fit(Task(), turns)
    return turns.measured


def main() -> None:
    """Make the environment, run the processes and report."""
    options = parser(__doc__).parse_args()
    if options.child:
        print(json.dumps(_child(options.child, options.quick)))
        return
    report = Report("peers", "Peers: PyTorch, Lightning and Ignite")
    try:
        python = environment()
    except (OSError, subprocess.CalledProcessError) as error:
        report.note(f"Not measured: their environment could not be installed ({error}).")
        report.save(options.json)
        return
    tell_overhead(report, python, options.quick)
    tell_epochs(report, python, options.quick)
    tell_operators(report, python, options.quick)
    report.save(options.json)


def _child(argument: str, quick: bool) -> Any:
    """What one process measures: ``argument`` is a kind, or what it is and its parts."""
    what, *parts = argument.split("|")
    if what == "epoch":
        return _peers.epoch(parts[0], parts[1], int(parts[2]))
    if what == "operators":
        return _peer_layers.operators(parts[0], parts[1], 1 if quick else 5)
    return run(argument, quick)


def _process(argument: str, quick: bool, python: str = sys.executable) -> Any:
    env = {"PYTHONWARNINGS": "ignore", **({"TQDM_DISABLE": "1"} if os.environ.get("CI") else {})}
    return child([__file__, "--child", argument] + ["--quick"] * quick, env, python)


def tell_overhead(report: Report, python: str, quick: bool) -> None:
    """What Lightning and Ignite add to a step."""
    ask = (
        "import json, torch, lightning, ignite;"
        "print(json.dumps([torch.__version__, lightning.__version__, ignite.__version__]))"
    )
    versions = child(["-c", ask], python=python)
    rounds = 1 if quick else 3
    seen: Dict[str, List[Any]] = {kind: [] for kind in KINDS}
    for index in range(rounds):
        for kind in KINDS:
            seen[kind].extend(_process(kind, quick, python))
        tell(f"round {index + 1} of {rounds}")
    report.note(
        f"""PyTorch {versions[0]}, Lightning {versions[1]}, Ignite {versions[2]}. What their
        trainers add to a bare PyTorch loop, in {rounds} process(es) of each kind: the same linear
        layer and the same way to measure as the first table of the engine."""
    )
    report.table(
        ["trainer", *OVERHEAD_HEADER], [[kind, *overhead_cells(seen[kind])] for kind in KINDS]
    )
    report.raw["overhead"] = seen


def tell_epochs(report: Report, python: str, quick: bool) -> None:
    """A whole epoch, in PyTorch and in OneFlow."""
    rounds = 1 if quick else 3
    rows: List[List[str]] = []
    remaining: List[List[str]] = []
    for name, batches in _peers.BATCHES.items():
        batches = 4 if quick else batches
        runs = {
            kind: partial(
                _process,
                f"epoch|{kind}|{name}|{batches}",
                quick,
                python if kind in _peers.PYTORCH else sys.executable,
            )
            for kind in _peers.KINDS
        }
        seen = alternate(runs, rounds, lambda text, name=name: tell(f"{name}: {text}"))  # type: ignore[misc]
        report.raw[f"epoch|{name}"] = seen
        (parameters,) = {each["parameters"] for measured in seen.values() for each in measured}
        for kind, measured in seen.items():
            values = {key: [each[key] for each in measured] for key in measured[0]}
            rows.append(
                [
                    f"{name}, {parameters:,} parameters",
                    kind,
                    show(values["epoch"], 2),
                    show(_ratios(seen, kind, "PyTorch by hand", "epoch"), 2),
                    show(values["first"], 2),
                    show([each * 1e3 for each in values["later"]], 1),
                    show(values["imports"], 2),
                    f"{max(values['peak']):.0f} ({max(values['before']):.0f})",
                    f"{values['loss'][0]:.4f}",
                ]
            )
        remaining.append([name, *_remaining(seen)])
    report.note(
        f"""A training of one epoch: batches of {_peers.BATCH} images of 3x32x32, read one by one
        as from CIFAR-10 (PIL image, ToTensor, Normalize), {_counts(quick)}; SGD with momentum.
        Networks, first weights, images and their order are the same in both frameworks: the loss
        of the last batch tells (MobileNetV2 draws its dropout's masks from each framework's own
        generator). {rounds} process(es) of each kind, in turns; median and quartiles, ratios
        round by round. Loops by hand read the loss at each step, as the tutorials of either
        framework do{_kernels()}; the trainers have their defaults, checkpoint, logger and
        progress bar included. An epoch is the whole call of fit(), or from the making of the
        optimizer to the last update; the first step is in it, and compiles in graph mode. "Later"
        is the mean of the other steps, with their data. Memory is the largest of the process, and
        in brackets what it had before training: imports, images, network."""
    )
    report.table(
        [
            "network",
            "loop",
            "seconds an epoch",
            "to PyTorch by hand",
            "first step, s",
            "later steps, ms",
            "imports, s",
            "peak memory, MB",
            "last loss",
        ],
        rows,
    )
    report.note(
        """How much remains, by later steps. What OneFlow takes by hand against PyTorch by hand is
        the framework's; what ofengine takes against OneFlow by hand is the engine's; the product
        of the two is ofengine against PyTorch. With in_memory_loader the loading of the data is
        the engine's, too."""
    )
    header = ["network", "Lightning / PyTorch"]
    for mode in ("eager", "graph"):
        header += [f"OneFlow, {mode} / PyTorch", f"ofengine / OneFlow, {mode}"]
        header += [f"with in_memory_loader / OneFlow, {mode}"]
    report.table([*header, "best of ofengine / Lightning"], remaining)


def _kernels() -> str:
    """What the loops of OneFlow by hand have from the environment, and ofengine takes by itself."""
    chosen = os.environ.get("OPENBLAS_CORETYPE")
    return f", with OPENBLAS_CORETYPE={chosen} in the environment" if chosen else ""


def _counts(quick: bool) -> str:
    if quick:
        return "4 batches"
    return ", ".join(f"{batches} batches of the {name}" for name, batches in _peers.BATCHES.items())


def _ratios(seen: Dict[str, List[Any]], kind: str, to: str, key: str) -> List[float]:
    return [b[key] / a[key] for a, b in zip(seen[to], seen[kind])]


def _remaining(seen: Dict[str, List[Any]]) -> List[str]:
    by_hand = "PyTorch by hand"
    cells = [show(_ratios(seen, "Lightning", by_hand, "later"), 2)]
    best: List[List[float]] = []
    for mode in ("eager", "graph"):
        ours, oneflow = f"ofengine, {mode}", f"OneFlow by hand, {mode}"
        in_memory = f"{ours}, in_memory_loader"
        cells.append(show(_ratios(seen, oneflow, by_hand, "later"), 2))
        cells += [show(_ratios(seen, each, oneflow, "later"), 2) for each in (ours, in_memory)]
        best.append(_ratios(seen, in_memory, "Lightning", "later"))
    return [*cells, show([min(pair) for pair in zip(*best)], 2)]


def tell_operators(report: Report, python: str, quick: bool) -> None:
    """What the layers of a step take in either framework."""
    rows: List[List[str]] = []
    for name in _peers.BATCHES:
        ours = _process(f"operators|oneflow|{name}", quick)
        theirs = _process(f"operators|torch|{name}", quick, python)
        tell(f"{name}: layers")
        report.raw[f"operators|{name}"] = {"OneFlow": ours, "PyTorch": theirs}
        # flowvision flattens by a function, which is no layer.
        both = {kind: (row[1], theirs[kind][1]) for kind, row in ours.items()}
        rest = sum(a - b for a, b in both.values())
        both["together"] = (sum(a for a, _ in both.values()), sum(b for _, b in both.values()))
        for kind, (a, b) in both.items():
            count = f"{ours[kind][0]:.0f}" if kind in ours else ""
            share = f"{100 * (a - b) / rest:.0f}"
            rows.append([name, kind, count, f"{a:.2f}", f"{b:.2f}", f"{a / b:.1f}", share])
    report.note(
        f"""Of what the framework's part is made: forward and backward of each layer of a step by
        itself, {_peers.BATCH} images, on numbers of the shapes that it sees in the network, eagerly
        and with a wait after each, which a whole step has not; the loss, and the optimizer's step.
        The median of {1 if quick else 5} runs, in one process of each framework."""
    )
    header = ["network", "layers", "how many", "OneFlow, ms", "PyTorch, ms", "ratio"]
    report.table([*header, "share of the difference, %"], rows)


if __name__ == "__main__":
    main()
