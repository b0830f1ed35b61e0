"""ProgressBar: readable in a terminal, in a log file and when something goes wrong, for nothing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional

import oneflow as flow
import pytest
from helpers import OfUnknownLength, quiet_trainer
from oneflow import nn

from ofengine import ConfigurationError, TaskModule, Trainer
from ofengine.callbacks import ProgressBar, _progress_display as display, progress_bar as module

TIME = r"(\d+ms|\d+\.\ds)"
SPEED = r"(, \d+\.\d+(it/s|s/it))?"
BATCHES = [flow.ones(2, 3)] * 4


class Task(TaskModule):
    """Weights and rate are 0, so that the loss is 1 at every step; validation logs 0.25."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        for parameter in self.layer.parameters():
            parameter.data.fill_(0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.layer(batch) - 1).pow(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", self.layer(batch).mean() + 0.25, prog_bar=True)
        self.log("hidden", self.layer(batch).mean() + 3.0)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_acc", 0.75)

    def forward(self, batch: Any) -> Any:
        return self.layer(batch)

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.parameters(), lr=0.0)


class Terminal:
    """A terminal in place of stdout, that keeps all that is written.

    No fixture: pytest puts a stdout of its own in place before each test is called.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, columns: int = 120) -> None:
        self._ours, theirs = pty.openpty()
        size = struct.pack("HHHH", 40, columns, 0, 0)
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
        self._stdout = os.fdopen(theirs, "w", encoding="utf-8")
        monkeypatch.setattr(sys, "stdout", self._stdout)
        self._written: List[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # how the end of a terminal shows
            while True:
                self._written.append(os.read(self._ours, 65536))

    def text(self) -> str:
        """All that was written. The terminal is closed by this."""
        if not self._stdout.closed:
            sys.stdout = sys.__stdout__
            self._stdout.close()
            self._reader.join()
            os.close(self._ours)
        return b"".join(self._written).decode()

    def frames(self) -> List[str]:
        """Each thing that was written on a line, in order, without the blanks that wipe it."""
        frames = re.split(r"[\r\n]|\x1b\[A", self.text())
        return [frame.rstrip() for frame in frames if frame.strip()]

    def stays(self) -> List[str]:
        """The lines that stay when all is over (one that the terminal wraps is one line)."""
        rows, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[A|\r|\n|[^\r\n\x1b]+", self.text()):
            if part == "\x1b[A":
                row -= 1
            elif part == "\r":
                column = 0
            elif part == "\n":
                row, column = row + 1, 0
                rows.extend([""] * (row + 1 - len(rows)))
            else:
                line = rows[row].ljust(column)
                rows[row] = line[:column] + part + line[column + len(part) :]
                column += len(part)
        return [line.rstrip() for line in rows if line.strip()]


@pytest.fixture
def _no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars are redrawn after each batch."""
    monkeypatch.setattr(display.Bars, "interval", 0.0)


def bar_trainer(bar: Optional[ProgressBar] = None, **arguments: Any) -> Trainer:
    return quiet_trainer(callbacks=bar or ProgressBar(), **{"max_epochs": 2, **arguments})


# ---------------------------------------------------------------------- log files


def check_lines(lines: List[str], patterns: List[str]) -> None:
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns):
        assert re.fullmatch(pattern, line), line


def test_a_log_file_gets_one_line_for_each_epoch(
    mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bar_trainer(mode=mode).fit(Task(), BATCHES, BATCHES)
    out = capsys.readouterr().out
    assert "\r" not in out
    compiling = rf" \+ {TIME} compiling" if mode == "graph" else ""
    metrics = r", loss=1\.0000, val_acc=0\.2500"
    check_lines(
        out.splitlines(),
        [
            rf"Epoch 1/2: 4 batches in {TIME}{compiling}{SPEED}{metrics}",
            rf"Epoch 2/2: 4 batches in {TIME}{SPEED}{metrics}",
        ],
    )
    assert "hidden" not in out


def test_epochs_are_aligned_and_counted_from_1(capsys: pytest.CaptureFixture[str]) -> None:
    bar_trainer(max_epochs=10).fit(Task(), BATCHES)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *(f"Epoch  {epoch}/10" for epoch in range(1, 10)),
        "Epoch 10/10",
    ]


def test_a_length_and_an_end_that_are_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    data = OfUnknownLength(BATCHES, BATCHES[:3])
    bar_trainer(max_epochs=-1, max_steps=7).fit(Task(), data)
    check_lines(
        capsys.readouterr().out.splitlines(),
        [
            rf"Epoch 1: 4 batches in {TIME}{SPEED}, loss=1\.0000",
            rf"Epoch 2: 3/4 batches in {TIME}{SPEED}, loss=1\.0000",
        ],
    )


def test_an_epoch_that_was_cut_short_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    bar_trainer(max_steps=1).fit(Task(), BATCHES)
    check_lines(
        capsys.readouterr().out.splitlines(),
        [rf"Epoch 1/2: 1/4 batches in {TIME}{SPEED}, loss=1\.0000"],
    )


def test_leave_false_keeps_the_last_line_only(capsys: pytest.CaptureFixture[str]) -> None:
    bar_trainer(ProgressBar(leave=False)).fit(Task(), BATCHES)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Epoch 2/2: 4 batches")


def test_refresh_rate_0_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = bar_trainer(ProgressBar(refresh_rate=0))
    trainer.fit(Task(), BATCHES, BATCHES)
    trainer.test(Task(), BATCHES)
    assert capsys.readouterr().out == ""


def test_the_other_verbs_write_their_results(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, pattern in {
        "validate": rf"Validation: 4 batches in {TIME}{SPEED}, val_acc=0\.2500, hidden=3\.0000",
        "test": rf"Test: 4 batches in {TIME}{SPEED}, test_acc=0\.7500",
        "predict": rf"Prediction: 4 batches in {TIME}{SPEED}",
    }.items():
        getattr(bar_trainer(), verb)(Task(), BATCHES)
        check_lines(capsys.readouterr().out.splitlines(), [pattern])


def test_after_an_exception_a_line_says_how_far_the_run_came(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Breaks(Task):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 6:
                raise KeyError("boom")

    with pytest.raises(KeyError):
        bar_trainer().fit(Breaks(), BATCHES)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"Epoch 2/2: 0/4 batches in {TIME}{SPEED}, loss=1\.0000, stopped", last)


# ---------------------------------------------------------------------- how often


class Clock:
    """A clock that the test turns, in place of the bar's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module, "monotonic", lambda: self.now)
        monkeypatch.setattr(display, "monotonic", lambda: self.now)


def epoch_by_hand(clock: Clock, batches: int, seconds: float, forbidden: Any = None) -> None:
    """The hooks of one epoch, whose batches take ``seconds`` each; no task, no steps."""

    class Stub(SimpleNamespace):
        @property
        def callback_metrics(self) -> Dict[str, float]:
            return forbidden() if forbidden is not None else {}

    trainer: Any = Stub(
        max_epochs=1, current_epoch=0, num_training_batches=batches, batch_idx=0,
        progress_bar_metrics={"loss": 0.5},
    )  # fmt: skip
    bar, task = ProgressBar(), Task()
    bar.setup(trainer, task, "fit")
    bar.on_train_epoch_start(trainer, task)
    for batch_idx in range(batches):
        clock.now += seconds
        trainer.batch_idx = batch_idx
        bar.on_train_batch_end(trainer, task, {}, None, batch_idx)
    if forbidden is None:
        bar.on_train_epoch_end(trainer, task)
    bar.on_train_end(trainer, task)


@pytest.mark.parametrize(
    ("batches", "seconds", "expected"),
    [
        # 9 s: shorter than the least time between two lines
        (900, 0.01, []),
        # 50 s: a line each 10 s
        (500, 0.1, [100, 200, 300, 400, 500]),
        # 1,000 s: a line each tenth would be one each 100 s, so that one a minute comes too
        (1000, 1.0, [60 * n for n in range(1, 17)]),
        # 300 s: a line each tenth
        (3000, 0.1, [300 * n for n in range(1, 11)]),
    ],
)
def test_a_long_epoch_gets_lines_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    batches: int,
    seconds: float,
    expected: List[int],
) -> None:
    epoch_by_hand(Clock(monkeypatch), batches, seconds)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"Epoch 1/1: {batches} batches in ")
    shown = [int(re.findall(r": (\d+)/", line)[0]) for line in lines[:-1]]
    # A look at the clock each second: a line may come that much later.
    assert len(shown) == pytest.approx(len(expected), abs=1)
    for ours, theirs in zip(shown, expected):
        assert ours == pytest.approx(theirs, abs=1.5 / seconds * (1 + expected.index(theirs)))
    assert all(line.endswith(f"{1 / seconds:.1f}it/s, loss=0.5000") for line in lines)


def test_a_terminal_is_redrawn_ten_times_a_second_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal(monkeypatch)
    epoch_by_hand(Clock(monkeypatch), 10_000, 0.001)
    redrawn = sum("/10000" in frame for frame in terminal.frames())
    assert 50 <= redrawn <= 110  # 10 s


def test_nothing_is_read_from_the_device_while_an_epoch_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden() -> Dict[str, float]:
        raise AssertionError("callback_metrics waits for the device")

    epoch_by_hand(Clock(monkeypatch), 100, 1.0, forbidden)


@pytest.mark.usefixtures("_no_interval")
def test_refresh_rate_is_the_least_number_of_batches_between_two_redraws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal(monkeypatch)
    bar_trainer(ProgressBar(refresh_rate=4), max_epochs=1).fit(Task(), BATCHES * 3)
    shown = [int(n) for frame in terminal.frames() for n in re.findall(r" (\d+)/12 ", frame)]
    assert sorted(set(shown)) == [0, 4, 8, 12]


# ---------------------------------------------------------------------- terminals


@pytest.mark.usefixtures("_no_interval")
def test_a_terminal_shows_moving_bars_and_keeps_the_epochs_lines(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(monkeypatch)
    bar_trainer(mode=mode).fit(Task(), BATCHES, BATCHES)
    frames = terminal.frames()
    assert any(re.match(r"Sanity check: ", frame) for frame in frames)
    assert any(re.match(r"Epoch 1/2:  50%\|\S+ +\| 2/4 \[", frame) for frame in frames)
    assert any(re.match(r"  Validation:  50%\|\S+ +\| 2/4 \[", frame) for frame in frames)
    compiling = [frame for frame in frames if "compiling the graph" in frame]
    assert bool(compiling) == (mode == "graph")
    stays = terminal.stays()
    assert [line.split(" batches in ")[0] for line in stays] == ["Epoch 1/2: 4", "Epoch 2/2: 4"]
    assert all("val_acc=0.2500" in line and "loss=1.0000" in line for line in stays)


@pytest.mark.usefixtures("_no_interval")
@pytest.mark.parametrize("columns", [40, 60, 80])
def test_a_narrow_terminal_never_gets_a_line_that_it_would_break(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    class Talkative(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("first", 1.0, prog_bar=True)
            self.log("a_rather_long_name", 2.0, prog_bar=True)
            return super().training_step(batch, batch_idx)

    terminal = Terminal(monkeypatch, columns)
    bar_trainer(log_every_n_steps=1).fit(Talkative(), BATCHES, BATCHES)
    frames = [frame for frame in terminal.frames() if " batches in " not in frame]
    moving = [frame for frame in frames if re.match(r"(Sanity|Epoch|  Validation)", frame)]
    assert max(map(len, frames)) <= columns
    assert columns < 60 or any("it/s, loss=1.0000" in frame for frame in moving)
    # What does not fit is left out as a whole.
    assert all(re.search(r"(it/s|s/it|=\d\.\d{4})\]?$", frame) for frame in moving)
    # Nothing is lost in the lines that stay, and no number is cut in two.
    stays = terminal.stays()
    assert max(map(len, stays)) <= columns
    epochs = re.sub("\n  ", " ", "\n".join(stays)).split("\n")
    assert [line[:9] for line in epochs] == ["Epoch 1/2", "Epoch 2/2"]
    for line in epochs:
        assert line.endswith(
            ", loss=1.0000, first=1.0000, a_rather_long_name=2.0000, val_acc=0.2500"
        )


@pytest.mark.usefixtures("_no_interval")
def test_the_mean_of_an_epoch_stands_for_its_last_step_too(capsys: Any) -> None:
    class Both(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, prog_bar=True, on_epoch=True)
            self.log("last_step", loss, prog_bar=True)
            return loss

    bar_trainer(max_epochs=1).fit(Both(), BATCHES)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(", loss_epoch=1.0000, last_step=1.0000")


@pytest.mark.usefixtures("_no_interval")
def test_after_an_exception_no_bar_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)

    class Breaks(Task):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise KeyError("boom")

    with pytest.raises(KeyError):
        bar_trainer(num_sanity_val_steps=0).fit(Breaks(), BATCHES, BATCHES)
    first, second = terminal.stays()
    assert re.fullmatch(rf"Epoch 1/2: 4 batches in {TIME}{SPEED}, loss=1.0000, stopped", first)
    assert re.fullmatch(rf"Validation: 0/4 batches in {TIME}, loss=1.0000, stopped", second)


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0000"),
        (1.0, "1.0000"),
        (0.91234, "0.9123"),
        (-0.5, "-0.5000"),
        (12.3456, "12.346"),
        (123.456, "123.46"),
        (12345.6, "12345.6"),
        (1234567.0, "1.23e+06"),
        (0.000123, "1.23e-04"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert display.short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0ms"),
        (0.0123, "12ms"),
        (0.0999, "0.1s"),
        (14.24, "14.2s"),
        (59.94, "59.9s"),
        (59.96, "1:00"),
        (185.0, "3:05"),
        (3785.4, "1:03:05"),
        (360000.0, "100:00:00"),
    ],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert display.duration(seconds) == text


@pytest.mark.parametrize("wrong", [-1, 0.5, True, "often"])
def test_a_wrong_refresh_rate_is_an_error_at_once(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="refresh_rate"):
        ProgressBar(wrong)


def test_pauses_are_not_counted_as_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    count = display.Count("Epoch 1/1", 10)
    steps: List[Callable[[], None]] = [count.pause, count.resume]
    for seconds, action in zip((2.0, 100.0), steps):
        clock.now += seconds
        action()
    clock.now += 3.0
    count.done = 10
    assert count.line({}) == "Epoch 1/1: 10 batches in 5.0s, 2.0it/s"
