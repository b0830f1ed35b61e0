"""``ofengine set-lr``: a rate that is changed while a run trains, at one step, for good."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import oneflow as flow
import pytest
from helpers import bits, quiet_trainer, weights_of
from helpers.processes import run_python
from helpers.resuming import some_slow
from helpers.tiny import Tiny, tiny_batches
from helpers.trainers import MODES
from oneflow.optim.lr_scheduler import CosineAnnealingLR

from ofengine import Callback, ConfigurationError, OFEngineError, RateError, Trainer
from ofengine.callbacks import ModelCheckpoint
from ofengine.cli import main
from ofengine.cli.set_lr import change_rates
from ofengine.loggers import CSVLogger
from ofengine.processes import requests

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 4  # of three batches


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_PAUSE", 0.005)


class Asks(Callback):
    """Asks for rates as the command does, after so many batches; waits until the run has heard."""

    def __init__(self, wanted: Dict[int, Dict[str, float]]) -> None:
        self.wanted = wanted

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, i: int) -> None:
        if trainer.batches_seen in self.wanted:
            rates = self.wanted[trainer.batches_seen]
            assert change_rates(Path(trainer.log_dir), rates, None) == []
            until = time.monotonic() + 30
            while not trainer._run.orders.agreed:
                assert time.monotonic() < until, "the run does not hear"
                time.sleep(0.005)


class Saves(Callback):
    """Saves after each batch, after each epoch's last hook but its own, and at the end."""

    fires_last = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: List[Path] = []

    def save(self, trainer: Trainer, name: str) -> None:
        path = self.folder / f"{trainer.batches_seen:02}-{name}.safetensors"
        self.files.append(trainer.save_checkpoint(path))

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, i: int) -> None:
        self.save(trainer, "batch")

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        self.save(trainer, "epoch")


class Cosine(Tiny):
    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.param_groups(), momentum=0.5)
        return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, 12)}


def train(
    mode: str,
    folder: Path,
    *callbacks: Callback,
    task: Any = Tiny,
    ckpt: Any = None,
    epochs: int = EPOCHS,
    policy: str = "checkpoint",
    **arguments: Any,
) -> Trainer:
    """A fit whose folder is a version below ``folder``."""
    trainer = quiet_trainer(
        mode=mode, max_epochs=epochs, logger=CSVLogger(folder), callbacks=[*callbacks],
        default_root_dir=folder, **arguments,
    )  # fmt: skip
    trainer.fit(task(), tiny_batches(), ckpt_path=ckpt, rates_on_resume=policy)
    return trainer


def by_hand(changes: Dict[int, Dict[str, float]]) -> Dict[str, np.ndarray]:
    """A loop over OneFlow alone, with rates that are written before the step of each number."""
    task = Tiny()
    groups = [
        {"params": list(task.body.parameters()), "lr": 0.125 * 0.5},
        {"params": list(task.head.parameters()), "lr": 0.125},
    ]
    optimizer = flow.optim.SGD(groups, momentum=0.5)
    scales, names = {"body": 0.5, "head": 1.0}, ["body", "head"]
    for step, (inputs, targets) in enumerate(tiny_batches() * EPOCHS):
        for name, lr in changes.get(step, {}).items():
            optimizer.param_groups[names.index(name)]["lr"] = lr * scales[name]
        ((task.head(task.body(inputs)) - targets) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(task)


CHANGES = {5: {"head": 0.01}, 8: {"head": 0.25, "body": 0.0625}}


@pytest.mark.parametrize("mode", some_slow(MODES, "eager"))
def test_it_takes_effect_at_the_next_step_and_a_resume_repeats_it(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ofengine")
    saves = Saves(tmp_path / "saved")
    trainer = train(mode, tmp_path, Asks(CHANGES), saves)
    whole = weights_of(trainer.task)
    assert bits(whole) == bits(by_hand(CHANGES))
    assert bits(whole) != bits(by_hand({})), "the change changes nothing"
    assert "step 5: head: 0.125 -> 0.01, by ofengine set-lr." in caplog.messages
    for path in saves.files:
        resumed = train(mode, tmp_path, ckpt=path)
        assert bits(weights_of(resumed.task)) == bits(whole), path.name
    with (tmp_path / "ofengine_logs/version_0/set_lr.jsonl").open() as file:
        kept = [json.loads(line) for line in file]
    assert [(each["step"], each["rates"]) for each in kept] == [*CHANGES.items()]
    # A run that goes on from one that was resumed has them from that one's folder.
    resumed = train(mode, tmp_path, Saves(tmp_path / "again"), ckpt=saves.files[0])
    assert Path(resumed.log_dir, "set_lr.jsonl").exists()
    left = [each for each in Path(resumed.log_dir).iterdir() if each.name.startswith(".")]
    assert not left, "a run that is over leaves nothing in its folder"


@pytest.mark.parametrize("mode", MODES)
def test_a_schedule_goes_on_over_it_within_a_window_too(mode: str, tmp_path: Path) -> None:
    """As ``trainer.set_lr`` at the same place, which has tests of its own."""

    class Sets(Callback):
        def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, *_: Any) -> None:
            if trainer.batches_seen == 5:
                trainer.set_lr("head", 0.5)
                trainer.set_lr("body", 0.25)

    saves, options = Saves(tmp_path / "saved"), {"task": Cosine, "accumulate_grad_batches": 2}
    asked = train(mode, tmp_path, Asks({5: {"head": 0.5, "all": 0.25}}), saves, **options)
    other = train(mode, tmp_path, Sets(), **options)
    assert bits(weights_of(asked.task)) == bits(weights_of(other.task))
    assert sorted(asked.rates.changes) == sorted(other.rates.changes)
    for path in saves.files[2:7]:  # before it, at it, and behind it
        resumed = train(mode, tmp_path, ckpt=path, **options)
        assert bits(weights_of(resumed.task)) == bits(weights_of(other.task)), path.name


class Two(Tiny):
    """The head has an optimizer of its own, which steps in every second batch."""

    def training_step(self, batch: Any, batch_idx: int, optimizer_name: str) -> Any:  # type: ignore[override]
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        body, head = (flow.optim.SGD([each], momentum=0.5) for each in self.param_groups())
        return {"outer": body, "inner": {"optimizer": head, "every_n_batches": 2}}


def test_with_several_optimizers(tmp_path: Path) -> None:
    class Sets(Callback):
        def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, *_: Any) -> None:
            if trainer.batches_seen == 5:
                trainer.set_lr("inner/head", 0.01)

    saves = Saves(tmp_path / "saved")
    asked = train("eager", tmp_path, Asks({5: {"inner/head": 0.01}}), saves, task=Two)
    other = train("eager", tmp_path, Sets(), task=Two)
    plain = train("eager", tmp_path, task=Two)
    assert bits(weights_of(asked.task)) == bits(weights_of(other.task))
    assert bits(weights_of(asked.task)) != bits(weights_of(plain.task))
    for path in saves.files[3:8]:
        resumed = train("eager", tmp_path, ckpt=path, task=Two)
        assert bits(weights_of(resumed.task)) == bits(weights_of(other.task)), path.name
    with pytest.raises(RateError, match=r"no group 'head'; .*: did you mean 'inner/head'\?"):
        requests.check_rates({"head": 0.1}, asked.rates.names)


def test_the_code_s_rates_forget_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ofengine")
    saves = Saves(tmp_path / "saved")
    train("eager", tmp_path, Asks(CHANGES), saves)
    again = Saves(tmp_path / "again")
    resumed = train("eager", tmp_path, again, ckpt=saves.files[0], policy="config")
    assert bits(weights_of(resumed.task)) == bits(by_hand({}))
    assert "resume: 2 changes by ofengine set-lr are forgotten." in caplog.messages
    third = train("eager", tmp_path, ckpt=again.files[1])  # of a run that has forgotten them
    assert bits(weights_of(third.task)) == bits(by_hand({}))


def test_a_second_run_in_the_folder_takes_nothing_of_the_first(tmp_path: Path) -> None:
    """Without a logger, a folder of checkpoints is the folder of all runs that save there."""
    trainer = quiet_trainer(
        max_epochs=EPOCHS, callbacks=[ModelCheckpoint(tmp_path / "ck"), AsksIn(tmp_path / "ck")]
    )
    trainer.fit(Tiny(), tiny_batches())
    assert bits(weights_of(trainer.task)) == bits(by_hand({5: {"head": 0.01}}))
    other = quiet_trainer(max_epochs=EPOCHS, callbacks=[ModelCheckpoint(tmp_path / "ck")])
    other.fit(Tiny(), tiny_batches())
    assert bits(weights_of(other.task)) == bits(by_hand({}))


class AsksIn(Callback):
    """Asks after five batches, and hears what became of it when it is over."""

    def __init__(self, folder: Path, rates: Optional[Dict[str, float]] = None) -> None:
        self.folder, self.rates = folder, rates or {"head": 0.01}
        self.answer: List[str] = []
        self.error: Optional[BaseException] = None

    def _ask(self) -> None:
        try:
            self.answer = change_rates(self.folder, self.rates, 30)
        except OFEngineError as error:
            self.error = error

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, i: int) -> None:
        if trainer.batches_seen == 5:
            self.thread = threading.Thread(target=self._ask)
            self.thread.start()
            until = time.monotonic() + 30
            while not trainer._run.orders.agreed and self.thread.is_alive():
                assert time.monotonic() < until
                time.sleep(0.005)

    def teardown(self, trainer: Any, task: Any, stage: str) -> None:
        self.thread.join()


def asked(tmp_path: Path, rates: Dict[str, float], **arguments: Any) -> AsksIn:
    callback = AsksIn(tmp_path / "ck", rates)
    trainer = quiet_trainer(
        callbacks=[ModelCheckpoint(tmp_path / "ck"), callback], **{"max_epochs": 2, **arguments}
    )
    trainer.fit(Cosine(), tiny_batches())
    return callback


def test_the_command_hears_what_was_changed(tmp_path: Path) -> None:
    callback = asked(tmp_path, {"body": 0.25})
    effective = [0.5 * base * (1 + math.cos(math.pi * 5 / 12)) / 2 for base in (0.125, 0.25)]
    assert callback.error is None
    assert callback.answer == [
        "body: 0.125 -> 0.25 (with schedule, scale and decay "
        f"{effective[0]:.6g} -> {effective[1]:.6g}), from step 5 on"
    ]


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"haed": 0.1}, "no group 'haed'; the groups are 'body' and 'head': did you mean 'head'?"),
        ({"other": 0.1, "all": 1.0}, "no group 'other'; the groups are 'body' and 'head'."),
        ({"head": -0.1}, "head=-0.1: a rate is finite and not negative."),
        ({"head": math.nan}, "head=nan: a rate is finite and not negative."),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, rates: Any, message: str) -> None:
    error = asked(tmp_path, rates).error
    assert isinstance(error, RateError) and message in str(error)


def test_behind_the_last_step_nothing_is_changed(tmp_path: Path) -> None:
    error = asked(tmp_path, {"head": 0.1}, max_epochs=-1, max_steps=5).error
    assert "the run has made its last step, 5 in all; nothing was changed." in str(error)


def test_what_cannot_be_recorded_is_not_done(tmp_path: Path) -> None:
    (tmp_path / "ck" / "set_lr.jsonl").mkdir(parents=True)
    callback = asked(tmp_path, {"head": 0.1})
    assert "it cannot be recorded in" in str(callback.error)


# ---------------------------------------------------------------------- the files alone


def listener(folder: Path, told: List[int], *groups: str) -> requests.Listener:
    return requests.Listener(folder, groups or ("body", "head"), lambda: told.append(1))


def test_where_no_run_runs_the_command_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no run .*nowhere: no such folder\.$"):
        change_rates(tmp_path / "nowhere", {"head": 0.1}, 1)
    with pytest.raises(ConfigurationError, match=r"no run is training in .* while it trains\.$"):
        change_rates(tmp_path, {"head": 0.1}, 1)
    (tmp_path / requests.RUN).write_text(json.dumps({"token": "x", "groups": ["head"]}))
    with pytest.raises(ConfigurationError, match="no run is training in"):
        change_rates(tmp_path, {"head": 0.1}, 1)  # that process was killed
    assert not (tmp_path / requests.REQUEST).exists()
    live = listener(tmp_path / "logs" / "version_3", [])
    for near in (tmp_path, tmp_path / "logs", tmp_path / "logs" / "version_2"):
        with pytest.raises(ConfigurationError, match=r"There is one in .*version_3\.$"):
            change_rates(near, {"head": 0.1}, 1)
    live.close()
    assert not (tmp_path / "logs" / "version_3").exists(), "the listener has made it"


def test_a_request_that_nobody_takes_is_taken_back(tmp_path: Path) -> None:
    told: List[int] = []
    run = listener(tmp_path, told)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigurationError, match=r"came to no step within 0\.1 s; nothing was"):
        change_rates(tmp_path / "checkpoints", {"head": 0.1}, 0.1)
    assert run.take() is None
    assert not (tmp_path / requests.REQUEST).exists()
    run.close()


def test_a_request_to_a_run_that_died_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = listener(tmp_path, [])
    change_rates(tmp_path, {"head": 0.5}, None)
    lies = (tmp_path / requests.REQUEST).read_bytes()
    run.close()
    (tmp_path / requests.REQUEST).write_bytes(lies)  # as a process that is killed leaves it
    told: List[int] = []
    run = listener(tmp_path, told)
    assert not told and run.take() is None
    assert not (tmp_path / requests.REQUEST).exists()
    assert "had asked a run that is over" in caplog.text and "head=0.5" in caplog.text
    run.close()


def test_two_runs_are_not_reached_by_one_folder(tmp_path: Path) -> None:
    run = listener(tmp_path, [])
    with pytest.raises(BlockingIOError):
        listener(tmp_path, [])
    run.close()


@pytest.mark.parametrize(
    "content",
    [
        b"[]", b"{", b"[" * 100_000, b'{"to": 1}', b"\xff\xfe",
        b'{"to": "TOKEN", "id": "../../../x", "rates": {"head": 1.0}, "answer": true}',
        b'{"to": "TOKEN", "id": "0123456789abcdef", "rates": {"head": "1"}, "answer": true}',
    ],
)  # fmt: skip
def test_what_is_no_request_does_nothing(tmp_path: Path, content: bytes) -> None:
    told: List[int] = []
    run = listener(tmp_path, told)
    token = json.loads((tmp_path / requests.RUN).read_text())["token"]
    (tmp_path / "new").write_bytes(content.replace(b"TOKEN", token.encode()))
    (tmp_path / "new").rename(tmp_path / requests.REQUEST)
    until = time.monotonic() + 30
    while (tmp_path / requests.REQUEST).exists():
        assert time.monotonic() < until
        time.sleep(0.005)
    assert not told
    run.close()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["head"], "'head': write NAME=RATE, as in head=1e-4."),
        (["=1"], "'=1': write NAME=RATE, as in head=1e-4."),
        (["head=fast"], "head=fast: 'fast' is no number."),
        (["head=1", "--wait", "nan"], "--wait nan: give a number of seconds."),
        (["head=1", "head=2"], "head=2: group 'head' was given a rate already."),
    ],
)
def test_words_that_are_no_rates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Sequence[str], message: str
) -> None:
    assert main(["set-lr", str(tmp_path), *words]) == 1
    assert capsys.readouterr().err == f"ofengine set-lr: {message}\n"


# ---------------------------------------------------------------------- killed, in a process


SCRIPT = """
import sys, time
from pathlib import Path
from helpers.tiny import Tiny, tiny_batches
from ofengine import Callback, Trainer
from ofengine.callbacks import ModelCheckpoint

class Waits(Callback):
    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.resumed_from is None and trainer.batches_seen > 3:
            Path("steps").write_text(str(trainer.global_step))
            time.sleep(0.05)

trainer = Trainer(
    device="cpu", mode=sys.argv[1], max_epochs=2000 if len(sys.argv) < 3 else int(sys.argv[2]),
    callbacks=[Waits(), ModelCheckpoint(every_n_train_steps=3, save_top_k=-1)],
    enable_progress_bar=False, enable_model_summary=False,
)
task = Tiny()
trainer.fit(task, tiny_batches(), ckpt_path=None if len(sys.argv) < 3 else sys.argv[3])
print(trainer.rates.changes, [p.numpy().tobytes().hex() for p in task.parameters()])
"""


@pytest.mark.parametrize("mode", ["eager", pytest.param("graph", marks=pytest.mark.slow)])
def test_killed_after_it_and_resumed_from_before_it(mode: str, tmp_path: Path) -> None:
    """The change is repeated at its step, told by the record alone."""
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "script.py", mode]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "steps").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        run = tmp_path / "ofengine_logs" / "version_0"
        done = run_python(
            "-m", "ofengine", "set-lr", run, "head=0.01", "--wait", 60, env=environment
        )
    finally:
        process.kill()
        process.wait()
    assert done.returncode == 0 and not done.stderr, done.stderr
    step = int(re.fullmatch(r"head: 0\.125 -> 0\.01, from step (\d+) on\n", done.stdout)[1])  # type: ignore[index]
    again = run_python("-m", "ofengine", "set-lr", run, "head=1", env=environment)
    assert again.returncode == 1 and "no run is training in" in again.stderr

    first = run / "checkpoints" / "epoch=0-step=3.safetensors"
    epochs = step // 3 + 2
    other = run_python("script.py", mode, epochs, first, cwd=tmp_path, env=environment)
    changes, weights = other.stdout.strip().split("] [")
    assert changes == f"[({step}, 'head', 0.01)"

    class Sets(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == step:
                trainer.set_lr("head", 0.01)

    whole = train(mode, tmp_path / "whole", Sets(), epochs=epochs)
    own = [each.numpy().tobytes().hex() for each in whole.task.parameters()]
    assert weights.strip("]") == str(own).strip("[]")
