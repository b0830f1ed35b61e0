"""Kills real training processes and starts them again until they end.

``python tests/checkpoint/kill_harness.py --kills 200`` is the long form: random instants in all
scenarios, by SIGKILL, SIGTERM or SIGINT, and now and then the newest checkpoint is damaged before
the next start. ``test_kill.py`` uses the same pieces for its chosen ones.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
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
    "stopped early": {"stopping": True, "top": 2},
    "functional": {"functional": True, "accumulate": 2},
}
ENDS = {
    signal.SIGKILL: -signal.SIGKILL,
    signal.SIGTERM: 128 + signal.SIGTERM,
    signal.SIGINT: -signal.SIGINT,  # which a shell calls 130
}
"""What a process exits with that was stopped by a signal."""
RESTARTED = {"restarts": 9, "signal": signal.SIGSEGV}
"""What the Trainer starts again by itself, after a crash."""
OVER = "fit is over"
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

    def with_kill(real: Any, before: bool) -> Any:
        def call(*arguments: Any) -> Any:
            if before:
                passed()
            result = real(*arguments)
            if not before:
                passed()
            return result

        return call

    if point == "fsync":
        os.fsync = with_kill(os.fsync, before=True)
    elif point in ("replace", "replaced"):  # a file gets its name, a new one or one that was there
        os.replace = with_kill(os.replace, before=point == "replace")
        os.link = with_kill(os.link, before=point == "replace")
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
    from ofengine.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint

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
            if scenario.get("functional"):
                hidden = nn.functional.dropout(hidden, 0.2) + 0.1 * flow.rand(16)
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
    number, _, given = number.partition(":")
    by = int(given or scenario.get("signal", signal.SIGKILL))
    if point == "after":

        def strike() -> None:
            time.sleep(float(number))
            os.kill(os.getpid(), by)

        class Strikes(Callback):
            def setup(self, *_: Any) -> None:
                threading.Thread(target=strike, daemon=True).start()

    elif point:
        _die_at(point, int(number), by)
    np.random.seed(5)
    generator = flow.Generator("cpu")
    generator.manual_seed(3)
    workers = scenario.get("workers", 0)
    train = DataLoader(
        Noisy(), BATCH, shuffle=True, num_workers=workers, collate_fn=collate, generator=generator
    )
    callbacks: List[Callback] = [Points(), Compiles()]
    if point == "after":
        callbacks.append(Strikes())
    if scenario.get("ema"):
        callbacks.append(EMAWeightAveraging(decay=0.9))
    if scenario.get("stopping"):
        callbacks.append(EarlyStopping("val_loss", min_delta=0.2, patience=2))
    background = scenario.get("background", False)
    callbacks.append(
        ModelCheckpoint(every_n_train_steps=2, save_last=True, in_background=background)
    )
    if scenario.get("top"):
        callbacks.append(
            ModelCheckpoint(Path(root, "best"), monitor="val_loss", save_top_k=scenario["top"])
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
    print(OVER, flush=True)
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
        "best": sorted(each.name for each in Path(trainer.default_root_dir).glob("best/*")),
        "steps": trainer.global_step,
    }


# ---------------------------------------------------------------------- the parent


def run(mode: str, root: Path, scenario: str, kill: str) -> subprocess.CompletedProcess[str]:
    """Run one process to its end."""
    command = [sys.executable, __file__, "--child", mode, str(root), scenario, kill]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def start(mode: str, root: Path, scenario: str, kill: Optional[str]) -> Optional[Dict[str, Any]]:
    """Run one process to its end; what came out, None where a signal stopped it.

    Raises AssertionError where it ended in any other way.
    """
    done = run(mode, root, scenario, kill or "")
    with open(root.parent / f"{root.name}.log", "a") as log:  # to be read where it ends otherwise
        log.write(f"--- {mode} {kill or 'to the end'}: {done.returncode}\n{done.stderr}\n")
    if kill and done.returncode == ENDS[_signal_of(kill)]:
        return None
    if kill and done.returncode == -_signal_of(kill) and OVER in done.stdout:
        return None  # the handler of ``fit`` is gone when it is over
    assert done.returncode == 0, f"{done.args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    outcome: Dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def _signal_of(kill: str) -> signal.Signals:
    parts = kill.split(":")
    return signal.Signals(int(parts[2])) if len(parts) == 3 else signal.SIGKILL


def until_the_end(modes: List[str], root: Path, scenario: str, kills: List[str]) -> Tuple[Any, int]:
    """Start again and again, in ``modes`` by turns, with the next of ``kills``.

    A kill that begins with "damage " is followed by damage to the newest checkpoint, where there
    is another. Returns what came out at the end, and how many kills came before it.
    """
    for number, kill in enumerate([*kills, ""]):
        damage, kill = kill.startswith("damage "), kill.replace("damage ", "")
        outcome = start(modes[number % len(modes)], root, scenario, kill)
        if outcome is not None:
            return outcome, number
        if damage:
            _damage_newest(root)
    raise AssertionError("the last start has no kill")


def _damage_newest(root: Path) -> None:
    found = sorted(root.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    if len(found) > 1:
        content = bytearray(found[-1].read_bytes())
        content[len(content) // 3] ^= 4
        found[-1].write_bytes(content)


def _one_run(chance: random.Random, references: Dict[Tuple[str, str], Any]) -> Tuple[str, int]:
    """A run with some kills at random instants: how it ended, and how many hit."""
    scenario = chance.choice(sorted({name for name, _ in references}))
    modes = chance.choice([["eager"], ["graph"], ["eager", "graph"], ["graph", "eager"]])
    if scenario == "adamw":
        modes = modes[:1]  # its kernels differ between the modes in the last digits
    kills = []
    for _ in range(chance.randint(1, 8)):
        by = chance.choice([signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT])
        damage = "damage " if chance.random() < 0.15 else ""
        kills.append(f"{damage}after:{chance.uniform(0.0, 1.2):.3f}:{int(by)}")
    what = f"{scenario}, {'/'.join(modes)}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome, hits = until_the_end(modes, Path(folder, "run"), scenario, kills)
        except AssertionError as error:
            return f"OTHER: {what}: {error}", 0
        log = Path(folder, "run.log").read_text()
    expected = references[scenario, modes[0]]
    if outcome == expected:
        return f"same: {what}", hits
    pairs = [f"{key}: {outcome[key]}, not {expected[key]}" for key in expected]
    unequal = [pair for key, pair in zip(expected, pairs) if outcome[key] != expected[key]]
    return "\n".join([f"OTHER: {what} after {kills}", *unequal, log]), hits


def main() -> int:
    """The long form; exit status 1 where any run ended otherwise than one that never stopped."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kills", type=int, default=200, help="stop after so many that hit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), help="only this one")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    arguments = parser.parse_args()
    references: Dict[Tuple[str, str], Any] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:

        def reference(key: Tuple[str, str]) -> None:
            references[key] = start(key[1], Path(folder, *key), key[0], None)

        names = [arguments.scenario] if arguments.scenario else list(SCENARIOS)
        list(pool.map(reference, itertools.product(names, ("eager", "graph"))))
    hits = runs = bad = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        while hits < arguments.kills:
            seeds = range(runs, runs + 8 * arguments.jobs)
            chances = [random.Random(f"{arguments.seed} {number}") for number in seeds]
            for verdict, hit in pool.map(lambda chance: _one_run(chance, references), chances):
                hits, runs, bad = hits + hit, runs + 1, bad + verdict.startswith("OTHER")
                print(f"{hits:4} kills, {runs:3} runs: {verdict}", flush=True)
    print(f"{hits} kills in {runs} runs, {bad} ended otherwise")
    return 1 if bad else 0


if __name__ == "__main__":
    if "--child" in sys.argv:
        a = sys.argv[sys.argv.index("--child") + 1 :]
        child(a[0], a[1], {**SCENARIOS, "restarted": RESTARTED}[a[2]], a[3] or None)
    else:
        sys.exit(main())
