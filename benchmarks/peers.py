"""What PyTorch Lightning and Ignite add to a bare PyTorch loop, by the same measure.

They have an environment of their own, which the script makes once below ``build/bench``. Only
what is added to a step is comparable: PyTorch is another framework than OneFlow::

    python benchmarks/peers.py
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List

from _measure import OUT, OVERHEAD_HEADER, Report, Turns, child, overhead_cells, parser, tell

PACKAGES = ("torch", "lightning==2.5.5", "pytorch-ignite==0.5.*", "numpy<2.3")
KINDS = ("Lightning, defaults", "Lightning, barebones", "Ignite")


def environment() -> Path:
    """The Python of the peers' environment; made where it is not there."""
    folder = OUT / "peers"
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        ready.write_text("")
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
        print(json.dumps(run(options.child, options.quick)))
        return
    report = Report("peers", "Lightning and Ignite, against a bare PyTorch loop")
    try:
        python = environment()
    except (OSError, subprocess.CalledProcessError) as error:
        report.note(f"Not measured: their environment could not be installed ({error}).")
        report.save(options.json)
        return
    versions = child(
        [
            "-c",
            "import json, torch, lightning, ignite;"
            "print(json.dumps([torch.__version__, lightning.__version__, ignite.__version__]))",
        ],
        python=str(python),
    )
    seen: Dict[str, List[Any]] = {kind: [] for kind in KINDS}
    rounds = 1 if options.quick else 3
    env = {"PYTHONWARNINGS": "ignore", **({"TQDM_DISABLE": "1"} if os.environ.get("CI") else {})}
    for index in range(rounds):
        for kind in KINDS:
            arguments = [__file__, "--child", kind] + ["--quick"] * options.quick
            seen[kind].extend(child(arguments, env, str(python)))
        tell(f"round {index + 1} of {rounds}")
    report.note(
        f"""PyTorch {versions[0]}, Lightning {versions[1]}, Ignite {versions[2]}, in {rounds}
        process(es) of each kind. The same linear layer and the same way to measure as the first
        table of the engine; what is comparable between the frameworks is what is added, not the
        step by hand."""
    )
    report.table(
        ["trainer", *OVERHEAD_HEADER], [[kind, *overhead_cells(seen[kind])] for kind in KINDS]
    )
    report.raw = seen
    report.save(options.json)


if __name__ == "__main__":
    main()
