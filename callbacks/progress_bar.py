"""ProgressBar: where a run stands, in a terminal, a notebook or a log file."""

from __future__ import annotations

import sys
from time import monotonic
from typing import Any, Dict, List, Optional, Sequence

from oneflow import nn
from tqdm.auto import tqdm

from ofengine.errors import ConfigurationError
from ofengine.hooks import Callback
from ofengine.task import TaskModule
from ofengine.trainer import Trainer

_REDRAW = 0.1
"""Seconds between two redraws of a bar; more often, nobody could read it."""
_LOOK = 1.0
"""Seconds between two looks at whether a log file should get a line."""
_LINE_AFTER = 10.0
"""A log file gets a line each tenth of an epoch, but at most every so many seconds ..."""
_LINE_AT_LATEST = 60.0
"""... and at least every so many."""
_LEAST_CELLS = 6
"""A bar shorter than this says less than the numbers in its place would."""
_COMPACT = "{desc}: {n_fmt}/{total_fmt}, {rate_fmt}{postfix}"
"""What a terminal shows that is too narrow for a bar and the metrics."""

_IN_NOTEBOOK = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)


class ProgressBar(Callback):
    """Shows where a run stands: a moving bar in a terminal or notebook, plain lines elsewhere.

    After each epoch one line stays, the same everywhere::

        Epoch  3/20: 782 batches in 14.2s, 55.1it/s, loss=0.3124, val_acc=0.9117

    Epochs count from 1 here. Time and speed are those of training, without validation and
    compilation. Metrics are those logged with ``prog_bar=True`` and the loss, as they were
    last read: the bar itself makes nothing wait for the device while an epoch runs. After
    ``validate`` and ``test``, all metrics are shown.

    Written to stdout. A log file gets a line for each tenth of an epoch that takes long.

    Args:
        refresh_rate: how many batches there are at least between two redraws (in any case there
            are no more than ten redraws a second); 0 shows nothing at all.
        leave: keep every epoch's line; False keeps the last one's only.

    Raises:
        ConfigurationError: ``refresh_rate`` is no whole number from 0 on.
    """

    def __init__(self, refresh_rate: int = 1, leave: bool = True) -> None:
        if isinstance(refresh_rate, bool) or not isinstance(refresh_rate, int) or refresh_rate < 0:
            raise ConfigurationError(
                f"ProgressBar(refresh_rate={refresh_rate!r}): give a whole number of batches, 0 to "
                "show nothing."
            )
        self.refresh_rate = refresh_rate
        self.leave = leave
        self._display = _Display()
        self._epoch: Optional[_Count] = None
        self._evaluation: Optional[_Count] = None
        self._line = ""
        self._due = 0.0
        self._lengths: Dict[str, int] = {}
        self._compiling = False

    # ------------------------------------------------------------------ the run

    def setup(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """See what stdout is."""
        self._epoch = self._evaluation = None
        self._compiling = False
        self._lengths.clear()
        if self.refresh_rate:
            moving = _IN_NOTEBOOK or (sys.stdout is not None and sys.stdout.isatty())
            self._display = _Bars() if moving else _Lines()
        else:
            self._display = _Display()

    def teardown(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """Take the bars away."""
        self._display.close()

    def on_exception(self, trainer: Trainer, task: TaskModule, exception: BaseException) -> None:
        """Leave a line that says how far the run came."""
        for count in (self._epoch, self._evaluation):
            if count is not None:
                self._display.write(f"{count.line(trainer.progress_bar_metrics)}, stopped")
        self._epoch = self._evaluation = None
        self._display.close()

    # ------------------------------------------------------------------ training

    def on_train_epoch_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Begin at nought."""
        last = trainer.max_epochs
        number = trainer.current_epoch + 1
        label = f"Epoch {number:>{len(str(last))}}/{last}" if last > 0 else f"Epoch {number}"
        # Where the length is not known ahead, the epoch before was probably as long.
        total = trainer.num_training_batches or self._lengths.get("train")
        self._epoch = _Count(label, total)
        self._display.begin(self._epoch)
        self._due = monotonic() + self._display.interval

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Redraw, where it is time: all but a few batches only look at the clock."""
        if monotonic() >= self._due:
            self._draw_epoch(trainer, batch_idx + 1)

    def on_before_graph_compile(self, trainer: Trainer, task: TaskModule, graph: nn.Graph) -> None:
        """Say what takes so long."""
        if self._epoch is not None:
            self._epoch.pause()
            self._display.draw(self._epoch, ["compiling the graph"])
            self._compiling = True
            self._due = 0.0

    def on_train_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Write the line that stays."""
        count = self._epoch
        if count is None:
            return
        self._lengths["train"] = count.done = trainer.batch_idx + 1
        # Reads what is pending: the end of the epoch does so anyway.
        _ = trainer.callback_metrics
        self._line = count.line(trainer.progress_bar_metrics)
        self._epoch = None
        if self.leave:
            self._display.write(self._line)

    def on_train_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Take the bar away."""
        self._display.close()
        if not self.leave and self._line:
            self._display.write(self._line)

    def _draw_epoch(self, trainer: Trainer, done: int) -> None:
        count = self._epoch
        if count is None:
            return
        if self._compiling:
            self._compiling = False
            count.done = done
            count.compiled()
            self._resume(trainer, count)
        elif done - count.done >= self.refresh_rate:
            count.done = done
            self._display.draw(count, _words(trainer.progress_bar_metrics))
            self._due = monotonic() + self._display.interval

    def _resume(self, trainer: Trainer, count: _Count) -> None:
        count.resume()
        self._display.resume(count, _words(trainer.progress_bar_metrics))
        self._due = monotonic() + self._display.interval

    # ------------------------------------------------------------------ evaluation

    def on_validation_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Begin a bar, below the epoch's where there is one."""
        if self._epoch is not None:
            self._epoch.done = trainer.batch_idx + 1
            self._display.draw(self._epoch, _words(trainer.progress_bar_metrics))
            self._epoch.pause()
        self._begin_evaluation("Sanity check" if trainer.sanity_checking else "Validation")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        task: TaskModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Redraw, where it is time."""
        count = self._evaluation
        if count is None:
            return
        count.done += 1
        if monotonic() >= self._due:
            self._display.draw(count, [])
            self._due = monotonic() + self._display.interval

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Take the bar away; outside of a fit, write the results."""
        self._end_evaluation(trainer, within_fit=trainer.sanity_checking or self._epoch is not None)
        if self._epoch is not None:
            self._resume(trainer, self._epoch)

    def on_test_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Begin a bar."""
        self._begin_evaluation("Test")

    def on_test_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Write the results."""
        self._end_evaluation(trainer)

    def on_predict_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Begin a bar."""
        self._begin_evaluation("Prediction")

    def on_predict_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Write how many batches there were."""
        self._end_evaluation(trainer, results=False)

    def _begin_evaluation(self, label: str) -> None:
        self._evaluation = _Count(label, self._lengths.get(label), nested=self._epoch is not None)
        self._display.begin(self._evaluation)
        self._due = monotonic() + self._display.interval

    def _end_evaluation(
        self, trainer: Trainer, within_fit: bool = False, results: bool = True
    ) -> None:
        count = self._evaluation
        if count is None:
            return
        self._evaluation = None
        self._lengths[count.label] = count.done
        self._display.end(count)
        if not within_fit:
            self._display.write(count.line(trainer.callback_metrics if results else {}))


class _Count:
    """How far one pass over batches is, and since when."""

    def __init__(self, label: str, total: Optional[int], nested: bool = False) -> None:
        self.label = label
        self.total = total
        self.nested = nested
        self.done = 0
        self._began = monotonic()
        self._paused: Optional[float] = None
        self._compilations = 0
        self._compile_seconds = 0.0

    @property
    def seconds(self) -> float:
        """How long the pass has taken, pauses aside."""
        return (monotonic() if self._paused is None else self._paused) - self._began

    def pause(self) -> None:
        """Stop the clock."""
        if self._paused is None:
            self._paused = monotonic()

    def resume(self) -> None:
        """Let the clock go on."""
        if self._paused is not None:
            self._began += monotonic() - self._paused
            self._paused = None

    def compiled(self) -> None:
        """The pause was a compilation, together with the step that it was for."""
        if self._paused is not None:
            self._compilations += 1
            self._compile_seconds += monotonic() - self._paused

    @property
    def speed(self) -> str:
        """Batches in a second (or seconds for a batch); "" before one was measured."""
        batches, seconds = self.done - self._compilations, self.seconds
        if batches <= 0 or seconds <= 0:
            return ""
        if batches >= seconds:
            return f"{batches / seconds:.1f}it/s"
        return f"{seconds / batches:.2f}s/it"

    def line(self, metrics: Dict[str, float]) -> str:
        """The pass in one line of text."""
        of = "" if self.total in (None, self.done) else f"/{self.total}"
        unit = "batch" if self.done == 1 and not of else "batches"
        time = f"{self.done}{of} {unit} in {_duration(self.seconds)}"
        if self._compilations:
            time += f" + {_duration(self._compile_seconds)} compiling"
        return f"{self.label}: " + ", ".join(filter(None, [time, self.speed, *_words(metrics)]))


class _Display:
    """Where counts are shown. This one shows nothing."""

    interval = float("inf")
    """Seconds between two calls of ``draw``."""

    def begin(self, count: _Count) -> None:
        """Show a count that begins."""

    def draw(self, count: _Count, words: Sequence[str]) -> None:
        """Show how far a count is, and ``words``."""

    def resume(self, count: _Count, words: Sequence[str]) -> None:
        """Go on with a count that was paused."""

    def end(self, count: _Count) -> None:
        """Take away what shows a count."""

    def write(self, line: str) -> None:
        """Write a line that stays."""

    def close(self) -> None:
        """Take everything away."""


class _Lines(_Display):
    """Plain lines, few of them."""

    interval = _LOOK

    def __init__(self) -> None:
        self._written = 0.0
        self._share = 0.0

    def begin(self, count: _Count) -> None:
        if not count.nested:
            self._written, self._share = monotonic(), 0.0

    def draw(self, count: _Count, words: Sequence[str]) -> None:
        ago = monotonic() - self._written
        share = count.done / count.total if count.total and not count.nested else 0.0
        if ago >= _LINE_AT_LATEST or (ago >= _LINE_AFTER and share >= self._share + 0.1):
            self._share = share
            done = f"{count.done}/{count.total or '?'} batches"
            self.write(f"{count.label}: " + ", ".join(filter(None, [done, count.speed, *words])))

    def write(self, line: str) -> None:
        print(line, flush=True)
        self._written = monotonic()


class _Bars(_Display):
    """A bar for what runs, and one below it for a validation in between."""

    interval = _REDRAW

    def __init__(self) -> None:
        self._bars: List[Optional[_Bar]] = [None, None]

    def begin(self, count: _Count) -> None:
        label = f"  {count.label}" if count.nested else count.label
        bar = self._bars[count.nested]
        if bar is None:
            self._bars[count.nested] = _Bar(
                desc=label,
                total=count.total,
                file=sys.stdout,
                leave=False,
                dynamic_ncols=not _IN_NOTEBOOK,
                mininterval=0.0,
                miniters=1,
                smoothing=0.1,
            )
        else:
            bar.set_description_str(label, refresh=False)
            bar.words, bar.initial = (), 0
            bar.reset(total=count.total)

    def draw(self, count: _Count, words: Sequence[str]) -> None:
        bar = self._bars[count.nested]
        if bar is None:
            return
        bar.words = words
        if count.done > bar.n:
            bar.update(count.done - bar.n)
        else:
            bar.refresh()

    def resume(self, count: _Count, words: Sequence[str]) -> None:
        bar = self._bars[count.nested]
        if bar is None:
            return
        if bar.n == 0:
            bar.initial = count.done  # the step that was compiled for says nothing of the speed
        bar.words = words
        bar.n = bar.last_print_n = count.done
        bar.unpause()  # the time since the last redraw is not the batches'
        bar.refresh()

    def end(self, count: _Count) -> None:
        if _IN_NOTEBOOK:  # each new bar would take another piece of the cell: keep this one
            self.draw(count, [])
            return
        bar, self._bars[count.nested] = self._bars[count.nested], None
        if bar is not None:
            bar.close()

    def write(self, line: str) -> None:
        _Bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        for bar in self._bars:
            if bar is not None:
                bar.close()
        self._bars = [None, None]


class _Bar(tqdm):
    """tqdm's bar, that leaves out what a narrow terminal has no room for."""

    monitor_interval = 0  # no thread that watches the bar
    words: Sequence[str] = ()

    @property
    def format_dict(self) -> Dict[str, Any]:
        """What the bar shows; tqdm asks for it at every redraw."""
        facts: Dict[str, Any] = super().format_dict
        words, columns = list(self.words), facts["ncols"]
        facts["postfix"] = ", ".join(words)
        if _IN_NOTEBOOK or not columns:
            return facts
        numbers = self.format_meter(**{**facts, "ncols": 0})
        if len(numbers) + _LEAST_CELLS < columns:
            return facts
        facts["bar_format"] = _COMPACT
        while words and len(self.format_meter(**facts)) >= columns:
            words.pop()
            facts["postfix"] = ", ".join(words)
        return facts


def _words(metrics: Dict[str, float]) -> List[str]:
    names = sorted(metrics, key=lambda name: name != "loss")  # first, where room is short
    return [f"{name}={_short(metrics[name])}" for name in names]


def _short(value: float) -> str:
    """A number in about six characters, always as many, so that a bar does not jump."""
    size = abs(value)
    if 0 < size < 1e-3 or 1e5 <= size < float("inf"):
        return f"{value:.2e}"
    return f"{value:.{4 if size < 10 else 3 if size < 100 else 2 if size < 1000 else 1}f}"


def _duration(seconds: float) -> str:
    """Seconds as "14ms", "14.2s", "3:05" or "1:03:05"."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
