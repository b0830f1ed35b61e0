"""Kills real training processes and starts them again until they end.

``python tests/kill_harness.py --kills 200`` is the long form: random instants in all scenarios.
``test_kill.py`` uses the same pieces for its chosen ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

SCENARIOS: Dict[str, Dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate": 3},
    "workers": {"workers": 2},
    "seeded": {"seed": 7, "accumulate": 2},
    "background": {"background": True},
    "averaged": {"ema": True},
    "adamw": {"optimizer": "AdamW"},
}
RESTARTED = {"restarts": 9, "signal": signal.SIGSEGV}
"""What the Trainer starts again by itself, after a crash."""
EPOCHS, SAMPLES, BATCH = 4, 37, 5


# ---------------------------------------------------------------------- the child


def _die_at(point: str, number: int, by: int) -> None:
    """Let this process kill itself when ``point`` is passed for the ``number``-th time."""
    count = 0

    def passed() -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), by)

    if point in ("fsync", "replace"):
        real = getattr(os, point)

        def replaced(*arguments: Any) -> Any:
            passed()
            return real(*arguments)

        setattr(os, point, replaced)
    elif point == "replaced":
        rename = os.replace

        def renamed(*arguments: Any) -> None:
            rename(*arguments)
            passed()

        os.replace = renamed  # type: ignore[assignment]
    else:
        _POINTS[point] = passed


_POINTS: Dict[str, Any] = {}


def _passes(point: str) -> None:
    _POINTS.get(point, lambda: None)()


class Noisy:
    """A dataset whose every look at a sample draws random noise."""

    def __init__(self) -> None:
        generator = np.random.RandomState(0)
        self.inputs = generator.randn(SAMPLES, 8).astype("float32")
        self.labels = generator.randint(0, 3, SAMPLES)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        noise = np.random.randn(8).astype("float32") * np.float32(0.1)
        return self.inputs[index] + noise, self.labels[index]


def collate(samples: List[Tuple[Any, Any]]) -> Tuple[Any, Any]:
    """A batch, put together by numpy."""
    import oneflow as flow

    inputs, labels = zip(*samples)
    return flow.tensor(np.stack(inputs)), flow.tensor(np.array(labels))


def child(mode: str, root: str, scenario: Dict[str, Any], kill: Optional[str]) -> None:
    """Train in ``root``, going on from what is there; print what came out."""
    import oneflow as flow
    from oneflow import nn
    from oneflow.utils.data import DataLoader

    from ofengine import Callback, TaskModule, Trainer
    from ofengine.callbacks import EMAWeightAveraging, ModelCheckpoint

    class Net(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            flow.manual_seed(0)
            self.body, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
            self.drop, self.head = nn.Dropout(0.3), nn.Linear(16, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            _passes("step")
            loss = self.loss(batch)
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

        def loss(self, batch: Any) -> Any:
            hidden = self.drop(self.norm(self.body(batch[0])).relu())
            return nn.functional.cross_entropy(self.head(hidden), batch[1])

        def configure_optimizers(self) -> Any:
            body = [*self.body.parameters(), *self.norm.parameters()]
            groups = [
                {"name": "body", "params": body, "lr_scale": 0.5, "lr_decay_scale": 0.9},
                {"name": "head", "params": self.head.parameters(), "lr": 0.05},
            ]
            kind = scenario.get("optimizer", "SGD")
            options = {"momentum": 0.9} if kind == "SGD" else {}
            optimizer = getattr(flow.optim, kind)(groups, lr=0.02, **options)
            cosine = flow.optim.lr_scheduler.CosineDecayLR(optimizer, 40)
            warm = flow.optim.lr_scheduler.WarmUpLR(
                cosine, warmup_iters=5, warmup_method="constant"
            )
            return {"optimizer": optimizer, "lr_scheduler": warm}

    class Points(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            _passes("batch")

        def on_validation_batch_end(self, *_: Any) -> None:
            _passes("validation")

        def teardown(self, *_: Any) -> None:
            _passes("teardown")

    class Compiles(Callback):
        def on_before_graph_compile(self, *_: Any) -> None:
            _passes("compile")

    point, _, number = (kill or "").partition(":")
    if point == "after":
        seconds = float(number)

        def strike() -> None:
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=strike, daemon=True).start()
    elif point:
        _die_at(point, int(number), scenario.get("signal", signal.SIGKILL))
    np.random.seed(5)
    generator = flow.Generator("cpu")
    generator.manual_seed(3)
    workers = scenario.get("workers", 0)
    train = DataLoader(
        Noisy(), BATCH, shuffle=True, num_workers=workers, collate_fn=collate, generator=generator
    )
    callbacks: List[Callback] = [Points(), Compiles()]
    if scenario.get("ema"):
        callbacks.append(EMAWeightAveraging(decay=0.9))
    background = scenario.get("background", False)
    callbacks.append(
        ModelCheckpoint(every_n_train_steps=2, save_last=True, in_background=background)
    )
    trainer = Trainer(
        mode=mode,
        device="cpu",
        max_epochs=EPOCHS,
        seed=scenario.get("seed"),
        accumulate_grad_batches=scenario.get("accumulate", 1),
        val_check_interval=4,
        log_every_n_steps=3,
        callbacks=callbacks,
        default_root_dir=root,
        enable_progress_bar=False,
        enable_model_summary=False,
        restart_on_crash=scenario.get("restarts", 0),
    )
    task = Net()
    trainer.fit(task, train, DataLoader(Noisy(), 20, collate_fn=collate), ckpt_path="last")
    print(json.dumps(_outcome(trainer, task)))


def _outcome(trainer: Any, task: Any) -> Dict[str, Any]:
    from ofengine.checkpoint import arrays_of, read

    def digest(arrays: Dict[str, Any]) -> str:
        parts = [name.encode() + array.tobytes() for name, array in sorted(arrays.items())]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    folder = Path(trainer.log_dir, "checkpoints")
    files = sorted(each.name for each in folder.iterdir())
    state = read(folder / "last.safetensors").state
    assert state is not None
    kept = {
        f"{name}/{key}": array
        for name, states in state["optimizer"]["states"].items()
        for key, array in states.items()
    }
    return {
        "weights": digest(arrays_of(task)),
        "optimizer": digest(kept),
        "metrics": Path(trainer.log_dir, "metrics.csv").read_text(),
        "files": files,
        "folder": os.path.relpath(trainer.log_dir, trainer.default_root_dir),
    }


# ---------------------------------------------------------------------- the parent


def run(mode: str, root: Path, scenario: str, kill: str) -> subprocess.CompletedProcess[str]:
    """Run one process to its end."""
    command = [sys.executable, __file__, "--child", mode, str(root), scenario, kill]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def start(mode: str, root: Path, scenario: str, kill: Optional[str]) -> Optional[Dict[str, Any]]:
    """Run one process to its end; what came out, None where it was killed.

    Raises AssertionError where it ended in any other way.
    """
    done = run(mode, root, scenario, kill or "")
    if done.returncode == -signal.SIGKILL:
        return None
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    outcome: Dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def until_the_end(modes: List[str], root: Path, scenario: str, kills: List[str]) -> Tuple[Any, int]:
    """Start again and again, in ``modes`` by turns, with the next of ``kills``.

    Returns what came out at the end, and how many kills came before it.
    """
    for number, kill in enumerate([*kills, ""]):
        outcome = start(modes[number % len(modes)], root, scenario, kill)
        if outcome is not None:
            return outcome, number
    raise AssertionError("the last start has no kill")


def main() -> int:
    """The long form; exit status 1 where any run ended otherwise than one that never stopped."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kills", type=int, default=200, help="stop after so many that hit")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    references: Dict[Tuple[str, str], Any] = {}
    hits = runs = bad = 0
    while hits < arguments.kills:
        scenario = chance.choice(sorted(SCENARIOS))
        modes = chance.choice([["eager"], ["graph"], ["eager", "graph"], ["graph", "eager"]])
        if scenario == "adamw":
            modes = modes[:1]  # its kernels differ between the modes in the last digits
        with tempfile.TemporaryDirectory() as folder:
            if (scenario, modes[0]) not in references:
                reference = start(modes[0], Path(folder, "reference"), scenario, None)
                references[scenario, modes[0]] = reference
            kills = [f"after:{chance.uniform(0.6, 3.0):.3f}" for _ in range(chance.randint(1, 6))]
            outcome, hit = until_the_end(modes, Path(folder, "killed"), scenario, kills)
        hits, runs = hits + hit, runs + 1
        same = outcome == references[scenario, modes[0]]
        bad += not same
        verdict = "same" if same else f"OTHER, after {kills}"
        print(f"{hits:4} kills, {runs:3} runs: {scenario} {'/'.join(modes)} {verdict}", flush=True)
    print(f"{hits} kills in {runs} runs, {bad} ended otherwise")
    return 1 if bad else 0


if __name__ == "__main__":
    if "--child" in sys.argv:
        a = sys.argv[sys.argv.index("--child") + 1 :]
        child(a[0], a[1], {**SCENARIOS, "restarted": RESTARTED}[a[2]], a[3] or None)
    else:
        sys.exit(main())
