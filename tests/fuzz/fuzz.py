"""Random configurations, each run in both modes, resumed across them and by hand, to the bit.

``python tests/fuzz/fuzz.py --configurations 1000 --seed 0`` takes the seeds 0 to 999, some in each
process, and prints a line for each that fails: that line runs it again.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import attrs
import by_hand
import oneflow as flow
from helpers import quiet_trainer
from subject import Configuration, Subject, change, data_of, draw, subject_of, validation_of

from ofengine import Callback
from ofengine.callbacks import EarlyStopping, LRDecayCallback

Rows = List[Dict[str, bytes]]
IN_A_PROCESS = 50
"""So many configurations compile far fewer graphs than a process may."""


class Watcher(Callback):
    """Changes what the hook changes, notes what there is to compare, saves on the way."""

    fires_last = True

    def __init__(self, drawn: Configuration, save_to: Optional[Path] = None) -> None:
        self.drawn, self.save_to = drawn, save_to
        self.rows: Rows = []
        self.batches: List[Any] = []
        self.rates: List[Any] = []
        self.validated: List[Any] = []
        """(batches seen, the metrics) of each validation."""
        self.verbs: List[Any] = []
        """What the verbs after the run gave, and a second run."""

    def on_validation_end(self, trainer: Any, task: Any) -> None:
        if not trainer.sanity_checking:
            metrics = {k: v for k, v in trainer.callback_metrics.items() if k[:3] == "mon"}
            self.validated.append((trainer.batches_seen, metrics))

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        seen = trainer.batches_seen
        change(task, trainer.optimizer.param_groups, seen)
        if self.drawn.hook == "set_lr" and seen == self.drawn.hook_at:
            trainer.set_lr(list(trainer.rates.groups)[-1].name, by_hand.NEW_LR)
        self.batches.append(copied(batch))

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, i: int) -> None:
        trainer.settle()
        self.rows.append(by_hand.bits_of(task, outputs["loss"]))
        self.rates.append(trainer.rates.rates(max(trainer.global_step - 1, 0)))
        if self.save_to is not None and trainer.batches_seen == self.drawn.save_at:
            trainer.save_checkpoint(self.save_to)


def copied(batch: Any) -> Any:
    """``batch`` with tensors of its own, of the same strides."""
    if isinstance(batch, flow.Tensor):
        return flow.tensor(batch.numpy())
    if isinstance(batch, dict):
        return {key: copied(value) for key, value in batch.items()}
    return type(batch)(map(copied, batch)) if isinstance(batch, (list, tuple)) else batch


def train(
    drawn: Configuration, mode: str, save_to: Optional[Path] = None, ckpt: Optional[Path] = None
) -> Watcher:
    """One run; a resumed one begins with other weights."""
    watcher = Watcher(drawn, save_to)
    clip: Dict[str, Any] = {}
    if drawn.clip != "none":
        clip = {"norm": {"gradient_clip_val": 0.5}, "value": {"gradient_clip_val": 0.05}}[
            drawn.clip
        ]
        clip["gradient_clip_algorithm"] = drawn.clip
    decay = [LRDecayCallback(drawn.every)] if drawn.groups == "scaled" else []
    stops = [EarlyStopping(drawn.monitor, patience=0)] if drawn.stops_early else []
    trainer = quiet_trainer(
        mode=mode,
        max_epochs=2,
        seed=drawn.seed,
        accumulate_grad_batches=drawn.accumulate,
        callbacks=[*decay, *stops, watcher],
        eval_mode=drawn.evaluates,
        num_sanity_val_steps=drawn.seed % 2,
        val_check_interval=drawn.validates_every or 1.0,
        log_every_n_steps=2,
        **clip,
    )
    task = subject_of(drawn, start=0 if ckpt is None else 99)
    trainer.fit(task, data_of(drawn), validation_of(drawn), ckpt_path=ckpt)
    watcher.save_to = None
    validated, watcher.validated = watcher.validated, []
    watcher.verbs = [_do(verb, trainer, task, watcher) for verb in drawn.verbs]
    watcher.verbs.append(watcher.validated)
    watcher.validated = validated
    return watcher


def _do(verb: str, trainer: Any, task: Subject, watcher: Watcher) -> Any:
    """Carry out a verb after the run; what it gives."""
    batches = validation_of(attrs.evolve(task.drawn, validation="list"))
    if verb == "fit":
        before = len(watcher.rows)
        trainer.fit(task, data_of(task.drawn), validation_of(task.drawn))
        rows = watcher.rows[before:]
        del watcher.rows[before:], watcher.batches[before:], watcher.rates[before:]
        return rows
    given = getattr(trainer, verb)(task, batches)
    return [each.numpy().tobytes() for each in given] if verb == "predict" else given


def differences(name: str, ours: Rows, theirs: Rows, first: int = 0) -> List[str]:
    """A sentence where two runs are not the same."""
    if len(ours) != len(theirs):
        return [f"{name}: {len(ours)} batches, not {len(theirs)}"]
    for number, (one, other) in enumerate(zip(ours, theirs), first):
        apart = [key for key in other if one.get(key) != other[key]]
        if apart or set(one) != set(other):
            return [f"{name}: batch {number}: {', '.join(apart[:4])}"]
    return []


def others(name: str, ours: Watcher, theirs: Watcher, first: int = 0) -> List[str]:
    """The same of what they validated to, and of the verbs after it."""
    found = []
    if ours.validated != [each for each in theirs.validated if each[0] >= first]:
        found.append(f"{name}: the validations are others")
    verbs = [*ours.drawn.verbs, "what was validated"]
    for number, (verb, one, other) in enumerate(zip(verbs, ours.verbs, theirs.verbs)):
        if one != other:
            found.append(f"{name}: {verb}, {number} after the run, gives something else")
    return found


def check(drawn: Configuration) -> List[str]:
    """What is not the same of a configuration; nothing where all is."""
    with tempfile.TemporaryDirectory(prefix="ofengine-fuzz-") as folder:
        paths = {mode: Path(folder) / f"{mode}.safetensors" for mode in ("eager", "graph")}
        runs = {mode: train(drawn, mode, paths[mode]) for mode in paths}
        saved = paths[drawn.saves].exists()  # it may have stopped before
        resumed = train(drawn, drawn.resumes, ckpt=paths[drawn.saves]) if saved else None
    eager, graph = runs["eager"], runs["graph"]
    found = differences("graph", graph.rows, eager.rows)
    if eager.rates != graph.rates:
        found.append("graph: the rates are others")
    found += others("graph", graph, eager)
    if resumed is not None:
        name, whole = f"{drawn.resumes} resumed from {drawn.saves}", runs[drawn.saves]
        found += differences(name, resumed.rows, whole.rows[drawn.save_at :], drawn.save_at)
        found += others(name, resumed, whole, drawn.save_at)
    if by_hand.can_be_done(drawn):
        found += differences("by hand", eager.rows, by_hand.train(drawn, eager.batches))
    return found


def here(seeds: Sequence[int]) -> int:
    """Check configurations in this process; print those that fail. The number of them."""
    failed = 0
    for seed in seeds:
        drawn = draw(seed)
        print(f"begin {seed}", flush=True)
        try:
            found = check(drawn)
        except Exception as error:
            text = " ".join(str(error).split())
            found = [f"{type(error).__name__}: {text}"]
            if os.environ.get("FUZZ_TRACEBACK"):
                traceback.print_exc()
        failed += bool(found)
        for each in found:
            print(f"fail {seed} {each}", flush=True)
    return failed


def tell(seed: int, what: str) -> None:
    """Print a failing configuration as the line that runs it again."""
    print(f"python tests/fuzz/fuzz.py --configurations 1 --seed {seed}  # {what}", flush=True)
    print(f"    {draw(seed)}", flush=True)


def apart(seeds: Sequence[int]) -> List[int]:
    """Check configurations in a process of its own; the seeds that failed."""
    command = [sys.executable, __file__, "--here", *map(str, seeds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
    begun, failed = -1, []
    for line in done.stdout.splitlines():
        word, _, rest = line.partition(" ")
        number, _, what = rest.partition(" ")
        if word == "begin":
            begun = int(number)
        elif word == "fail":
            failed.append(int(number))
            tell(int(number), what)
    if done.returncode not in (0, 1):  # it died: the others go on in another
        tell(begun, f"the process ended with {done.returncode}")
        left = [seed for seed in seeds if seed > begun]
        return [*failed, begun, *(apart(left) if left and begun >= 0 else [])]
    return failed


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """0 where no configuration failed, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configurations", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed")
    parser.add_argument("--here", type=int, nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.here:
        warnings.simplefilter("ignore")
        logging.getLogger("ofengine").setLevel(logging.ERROR)
        return int(here(asked.here) > 0)
    seeds = range(asked.seed, asked.seed + asked.configurations)
    failed = set()
    for first in range(0, len(seeds), IN_A_PROCESS):
        failed.update(apart(seeds[first : first + IN_A_PROCESS]))
    print(f"{len(seeds)} configurations, {len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
