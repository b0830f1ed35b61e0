"""Kills real training processes and starts them again until they end.

``python tests/checkpoint/kill_harness.py --kills 200`` is the long form: random instants in all
scenarios, by SIGKILL, SIGTERM, SIGINT or SIGHUP, to the process or to its whole group; workers that
hang when the signal comes; and before the next start the newest checkpoint may be damaged, the
folder renamed, or copied, when the copy is run to its end first. ``test_kill.py`` uses the same
pieces for its chosen ones.

A kill is written ``point:number:signal:whom``: what passes that point for the number-th time sends
the signal (SIGKILL by default) to itself, or to its ``group``. The point ``after`` takes seconds,
and ``hang`` a batch behind which the workers stand still, a second before the signal. Words before
it say what happens to the folder afterwards: ``damage``, ``move``, ``copy``.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

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
    "shuffled validation": {"shuffle_validation": True, "stopping": True, "top": 2},
    "persistent workers": {"workers": 2, "persistent": True, "shuffle_validation": True},
    "two optimizers": {"several": True, "optimizer": "Adam"},
    "two at once": {"beside": True, "version": "first"},
}
"""By name; ``beside``: each start has another run beside it, in the same folder."""
ENDS = {
    signal.SIGKILL: -signal.SIGKILL,
    signal.SIGTERM: 128 + signal.SIGTERM,
    signal.SIGINT: -signal.SIGINT,  # which a shell calls 130
    signal.SIGHUP: 128 + signal.SIGHUP,
}
"""What a process exits with that was stopped by a signal."""
RESTARTED = {"restarts": 9}
"""What the Trainer starts again by itself, after a crash."""
OVER = "fit is over"
HANGING_ENDS = 5.0
"""Seconds within which a run is to end that is told to while its workers hang."""
hanging_took: List[float] = []
"""How long those took."""
EPOCHS, SAMPLES, BATCH = 4, 37, 5
MOST_SECONDS = 300
"""A process that takes longer hangs, on a machine that is not much too busy."""


# ---------------------------------------------------------------------- the child


class Kill(NamedTuple):
    """One of the kills as they are written, taken apart."""

    point: str
    number: float
    by: signal.Signals
    group: bool

    @classmethod
    def of(cls, text: str) -> Kill:
        """See the module's docstring; without the words before it."""
        point, number, by, whom = [*text.split(":"), "", "", ""][:4]
        return cls(point, float(number), signal.Signals(int(by or signal.SIGKILL)), whom == "group")

    def strike(self) -> None:
        """Send the signal."""
        os.killpg(0, self.by) if self.group else os.kill(os.getpid(), self.by)

    def strike_in(self, seconds: float, note: Optional[Path] = None) -> None:
        """Send it from a thread, after so many seconds; leave the time of day in ``note``."""

        def wait() -> None:
            time.sleep(seconds)
            if note is not None:
                note.write_text(repr(time.time()))
            self.strike()

        threading.Thread(target=wait, daemon=True).start()


def _die_at(kill: Kill, strike: Callable[[], None]) -> None:
    """Let this process ``strike`` when the point is passed for the wanted time."""
    count, point = 0, kill.point

    def passed() -> None:
        nonlocal count
        count += 1
        if count == kill.number:
            strike()

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


def _beside(root: Path, ending: str) -> Path:
    """A file of the harness's own about the run in ``root``, beside that folder."""
    return root.parent / f"{root.name}.{ending}"


_POINTS: Dict[str, Any] = {}


def _passes(point: str) -> None:
    _POINTS.get(point, lambda: None)()


class Noisy:
    """A dataset whose every look at a sample draws random noise.

    Its worker processes stand still while there is a file ``hang``, but not for ever.
    """

    def __init__(self, hang: Optional[Path] = None) -> None:
        self.hang = hang
        generator = np.random.RandomState(0)
        self.inputs = generator.randn(SAMPLES, 8).astype("float32")
        self.labels = generator.randint(0, 3, SAMPLES)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        if self.hang is not None and multiprocessing.parent_process() is not None:
            until = time.monotonic() + MOST_SECONDS
            while self.hang.exists() and time.monotonic() < until:
                time.sleep(0.05)
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
    from ofengine.loggers import CSVLogger

    class Net(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            flow.manual_seed(0)
            self.body, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
            self.drop, self.head = nn.Dropout(0.3), nn.Linear(16, 3)

        def training_step(self, batch: Any, batch_idx: int, *of_several: str) -> Any:
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
            own = groups[:1] if scenario.get("several") else groups
            optimizer = getattr(flow.optim, kind)(own, lr=0.02, **options)
            cosine = flow.optim.lr_scheduler.CosineDecayLR(optimizer, 40)
            warm = flow.optim.lr_scheduler.WarmUpLR(
                cosine, warmup_iters=5, warmup_method="constant"
            )
            made = {"optimizer": optimizer, "lr_scheduler": warm}
            if scenario.get("several"):
                of_head = flow.optim.SGD(groups[1:], momentum=0.9)
                return {"body": made, "head": {"optimizer": of_head, "every_n_batches": 2}}
            return made

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

    killed = Kill.of(kill) if kill else None
    hang, struck = _beside(Path(root), "hang"), _beside(Path(root), "struck")

    class Strikes(Callback):
        def setup(self, *_: Any) -> None:
            if killed is not None and killed.point == "after":
                killed.strike_in(killed.number)

    def hangs() -> None:
        assert killed is not None
        hang.touch()
        killed.strike_in(1.0, struck)

    if killed is not None and killed.point == "hang":
        _die_at(killed._replace(point="batch"), hangs)
    elif killed is not None and killed.point != "after":
        _die_at(killed, killed.strike)
    np.random.seed(5)
    generator = flow.Generator("cpu")
    generator.manual_seed(3)
    workers = scenario.get("workers", 0)
    persistent = scenario.get("persistent", False)
    options = {"collate_fn": collate, "persistent_workers": persistent}
    train = DataLoader(
        Noisy(hang), BATCH, shuffle=True, num_workers=workers, generator=generator, **options
    )
    if scenario.get("shuffle_validation"):
        options["generator"] = flow.Generator("cpu")
        options["generator"].manual_seed(4)
        options.update(shuffle=True, num_workers=int(persistent))
    else:
        options["persistent_workers"] = False
    validation = DataLoader(Noisy(), 20, **options)
    callbacks: List[Callback] = [Points(), Compiles(), Strikes()]
    if scenario.get("ema"):
        callbacks.append(EMAWeightAveraging(decay=0.9))
    if scenario.get("stopping"):
        callbacks.append(EarlyStopping("val_loss", min_delta=0.2, patience=2))
    background, version = scenario.get("background", False), scenario.get("version")
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
        logger=CSVLogger(root, version=version) if version else True,
        enable_progress_bar=False,
        enable_model_summary=False,
        restart_on_crash=scenario.get("restarts", 0),
    )
    task = Net()
    trainer.fit(task, train, validation, ckpt_path="last")
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
        for each in state.get("several", {"": state}).values()
        for name, states in each["optimizer"]["states"].items()
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


class Ended(NamedTuple):
    """How a run ended that was started again and again."""

    outcome: Dict[str, Any]
    hits: int
    """So many kills came before its end."""
    others: List[Tuple[str, Dict[str, Any]]]
    """(mode, outcome) of the copies that were run to their end, and of the runs beside it."""


def run(mode: str, root: Path, scenario: Dict[str, Any], kill: str) -> Any:
    """Run one process, the first of a group of its own, to its end."""
    given = [mode, str(root), json.dumps(scenario), kill]
    return subprocess.run(
        [sys.executable, __file__, "--child", *given],
        capture_output=True,
        text=True,
        timeout=MOST_SECONDS,
        start_new_session=True,
    )


def start(
    mode: str, root: Path, scenario: Dict[str, Any], kill: Optional[str]
) -> Optional[Dict[str, Any]]:
    """Run one process to its end; what came out, None where a signal stopped it.

    Raises AssertionError where it ended in any other way.
    """
    done = run(mode, root, scenario, kill or "")
    ended_at = time.time()
    with open(_beside(root, "log"), "a") as log:  # to be read where it ends otherwise
        log.write(f"--- {mode} {kill or 'to the end'}: {done.returncode}\n{done.stderr}\n")
    if kill:
        by, struck = Kill.of(kill).by, _beside(root, "struck")
        _beside(root, "hang").unlink(missing_ok=True)
        if struck.exists():
            hanging_took.append(ended_at - float(struck.read_text()))
            struck.unlink()
        if done.returncode == ENDS[by]:
            return None
        if done.returncode == -by and OVER in done.stdout:
            return None  # the handler of ``fit`` is gone when it is over
    assert done.returncode == 0, f"{done.args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    outcome: Dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def until_the_end(modes: List[str], root: Path, scenario: str, kills: List[str]) -> Ended:
    """Start again and again, in ``modes`` by turns, with the next of ``kills``."""
    options, others = SCENARIOS[scenario], []
    for number, text in enumerate([*kills, ""]):
        *words, kill = text.split(" ")
        mode = modes[number % len(modes)]
        with _another_beside(modes[0], root, options, number) as another:
            outcome = start(mode, root, options, kill)
        others += [(modes[0], each) for each in another]
        if outcome is not None:
            return Ended(outcome, number, others)
        if "damage" in words:
            _damage_newest(root)
        if "copy" in words:
            others.append((modes[0], _end_of_a_copy(modes[number % len(modes)], root, options)))
        if "move" in words:
            moved = root.parent / f"{root.name}m"
            root.rename(moved)
            _beside(root, "log").rename(_beside(moved, "log"))
            root = moved
    raise AssertionError("the last start has no kill")


@contextlib.contextmanager
def _another_beside(
    mode: str, root: Path, options: Dict[str, Any], number: int
) -> Iterator[List[Any]]:
    """Run another run in the same folder meanwhile, where the scenario says so; its outcome."""
    outcomes: List[Any] = []
    if not options.get("beside"):
        yield outcomes
        return
    own = {**options, "version": f"other_{number}"}
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(run, mode, root, own, "")
        yield outcomes
        done = other.result()
    assert done.returncode == 0, f"the run beside it: {done.returncode}\n{done.stderr}"
    outcomes.append(json.loads(done.stdout.splitlines()[-1]))


def _end_of_a_copy(mode: str, root: Path, options: Dict[str, Any]) -> Dict[str, Any]:
    """Run a copy of the folder, without the files' times, to its end; what came out.

    Raises AssertionError where that has touched a file of the original.
    """
    copy = root.parent / f"{root.name}c"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy, copy_function=shutil.copyfile)
    before = _contents(root)
    outcome = start(mode, copy, options, None)
    assert outcome is not None
    assert _contents(root) == before, "a run of a copy has touched the original"
    return outcome


def _contents(root: Path) -> Dict[str, Any]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def _damage_newest(root: Path) -> None:
    found = sorted(root.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    if len(found) > 1:
        content = bytearray(found[-1].read_bytes())
        content[len(content) // 3] ^= 4
        found[-1].write_bytes(content)


def random_kill(chance: random.Random, workers: bool) -> str:
    """One of the long form's kills."""
    ending = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    if workers and chance.random() < 0.2:
        return f"hang:{chance.randint(1, 8)}:{int(chance.choice(ending))}:" + _whom(chance)
    by = int(chance.choice([signal.SIGKILL] * 5 + ending))
    words = "".join(
        word for word, share in (("damage ", 0.15), ("copy ", 0.1), ("move ", 0.15))
        if chance.random() < share
    )  # fmt: skip
    return f"{words}after:{chance.uniform(0.0, 2.5):.3f}:{by}:{_whom(chance)}"


def _whom(chance: random.Random) -> str:
    return "group" if chance.random() < 0.4 else ""


def _one_run(chance: random.Random, references: Dict[Tuple[str, str], Any]) -> Tuple[str, int]:
    """A run with some kills at random instants: how it ended, and how many hit."""
    scenario = chance.choice(sorted({name for name, _ in references}))
    modes = chance.choice([["eager"], ["graph"], ["eager", "graph"], ["graph", "eager"]])
    if scenario == "adamw":
        modes = modes[:1]  # its kernels differ between the modes in the last digits
    workers = "workers" in SCENARIOS[scenario]
    kills = [random_kill(chance, workers) for _ in range(chance.randint(1, 8))]
    what = f"{scenario}, {'/'.join(modes)}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            ended = until_the_end(modes, Path(folder, "run"), scenario, kills)
        except subprocess.TimeoutExpired as error:
            where = (error.stderr or b"").decode(errors="replace")
            return f"OTHER: {what} with {kills}: {error}\n{where}", 0
        except AssertionError as error:
            logs = "\n".join(each.read_text() for each in Path(folder).glob("*.log"))
            return f"OTHER: {what} with {kills}: {error}\n{logs}", 0
        logs = "\n".join(each.read_text() for each in Path(folder).glob("*.log"))
    unequal = [
        f"{key}: {outcome[key]}, not {expected}"
        for mode, outcome in [(modes[0], ended.outcome), *ended.others]
        for key, expected in references[scenario, mode].items()
        if outcome[key] != expected
    ]
    if unequal:
        return "\n".join([f"OTHER: {what} with {kills}", *unequal, logs]), ended.hits
    more = f", and {len(ended.others)} beside it" if ended.others else ""
    return f"same: {what}{more}", ended.hits


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
            references[key] = start(key[1], Path(folder, *key), SCENARIOS[key[0]], None)

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
    late = [seconds for seconds in hanging_took if seconds > HANGING_ENDS]
    if hanging_took:
        longest = f"the slowest took {max(hanging_took):.1f} s"
        print(f"{len(hanging_took)} of the kills found workers that hang: {longest}")
    return 1 if bad or late else 0


if __name__ == "__main__":
    if "--child" in sys.argv:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and by nohup
        faulthandler.dump_traceback_later(MOST_SECONDS - 20)  # where one hangs
        a = sys.argv[sys.argv.index("--child") + 1 :]
        child(a[0], a[1], json.loads(a[2]), a[3] or None)
    else:
        sys.exit(main())
