"""ProgressBar: where a run stands, in a terminal, a notebook or a log file."""

from __future__ import annotations

import sys
from time import monotonic
from typing import Any, Dict, Optional

from oneflow import nn

from ofengine.callback import Callback
from ofengine.callbacks._progress_display import IN_NOTEBOOK, Bars, Count, Display, Lines, words
from ofengine.errors import ConfigurationError
from ofengine.run.view import RunView
from ofengine.task import TaskModule


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

    rank_zero_only = True

    def __init__(self, refresh_rate: int = 1, leave: bool = True) -> None:
        if isinstance(refresh_rate, bool) or not isinstance(refresh_rate, int) or refresh_rate < 0:
            raise ConfigurationError(
                f"ProgressBar(refresh_rate={refresh_rate!r}): give a whole number of batches, 0 to "
                "show nothing."
            )
        self.refresh_rate = refresh_rate
        self.leave = leave
        self._display = Display()
        self._epoch: Optional[Count] = None
        self._evaluation: Optional[Count] = None
        self._line = ""
        self._due = 0.0
        self._lengths: Dict[str, int] = {}
        self._compiling = False

    # ------------------------------------------------------------------ the run

    def setup(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """See what stdout is."""
        self._epoch = self._evaluation = None
        self._compiling = False
        self._lengths.clear()
        if self.refresh_rate:
            moving = IN_NOTEBOOK or (sys.stdout is not None and sys.stdout.isatty())
            self._display = Bars() if moving else Lines()
        else:
            self._display = Display()

    def teardown(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Take the bars away."""
        self._display.close()

    def on_exception(self, trainer: RunView, task: TaskModule, exception: BaseException) -> None:
        """Leave a line that says how far the run came."""
        for count in (self._epoch, self._evaluation):
            if count is not None:
                self._display.write(f"{count.line(trainer.progress_bar_metrics)}, stopped")
        self._epoch = self._evaluation = None
        self._display.close()

    # ------------------------------------------------------------------ training

    def on_train_start(self, trainer: RunView, task: TaskModule) -> None:
        """Begin where a resumed run goes on in the middle of an epoch."""
        if trainer.resumes_within_epoch:
            self.on_train_epoch_start(trainer, task)
            if self._epoch is not None:
                self._epoch.skip(trainer.batch_idx + 1)

    def on_train_epoch_start(self, trainer: RunView, task: TaskModule) -> None:
        """Begin at nought."""
        last = trainer.max_epochs
        number = trainer.current_epoch + 1
        label = f"Epoch {number:>{len(str(last))}}/{last}" if last > 0 else f"Epoch {number}"
        # Where the length is not known ahead, the epoch before was probably as long.
        total = trainer.num_training_batches or self._lengths.get("train")
        self._epoch = Count(label, total)
        self._display.begin(self._epoch)
        self._due = monotonic() + self._display.interval

    def on_train_batch_end(
        self, trainer: RunView, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Redraw, where it is time: all but a few batches only look at the clock."""
        if monotonic() >= self._due:
            self._draw_epoch(trainer, batch_idx + 1)

    def on_before_graph_compile(self, trainer: RunView, task: TaskModule, graph: nn.Graph) -> None:
        """Say what takes so long."""
        if self._epoch is not None:
            self._epoch.pause()
            self._display.draw(self._epoch, ["compiling the graph"])
            self._compiling = True
            self._due = 0.0

    def on_train_epoch_end(self, trainer: RunView, task: TaskModule) -> None:
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

    def on_train_end(self, trainer: RunView, task: TaskModule) -> None:
        """Take the bar away."""
        self._display.close()
        if not self.leave and self._line:
            self._display.write(self._line)

    def _draw_epoch(self, trainer: RunView, done: int) -> None:
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
            self._display.draw(count, words(trainer.progress_bar_metrics))
            self._due = monotonic() + self._display.interval

    def _resume(self, trainer: RunView, count: Count) -> None:
        count.resume()
        self._display.resume(count, words(trainer.progress_bar_metrics))
        self._due = monotonic() + self._display.interval

    # ------------------------------------------------------------------ evaluation

    def on_validation_start(self, trainer: RunView, task: TaskModule) -> None:
        """Begin a bar, below the epoch's where there is one."""
        if self._epoch is not None:
            self._epoch.done = trainer.batch_idx + 1
            trainer.metrics.peek()  # the device may be behind: its time belongs to training
            self._display.draw(self._epoch, words(trainer.progress_bar_metrics))
            self._epoch.pause()
        label = "Sanity check" if trainer.sanity_checking else "Validation"
        self._begin_evaluation(trainer, label)

    def on_validation_batch_end(
        self,
        trainer: RunView,
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

    def on_validation_end(self, trainer: RunView, task: TaskModule) -> None:
        """Take the bar away; outside of a fit, write the results."""
        self._end_evaluation(trainer, within_fit=trainer.sanity_checking or self._epoch is not None)
        if self._epoch is not None:
            self._resume(trainer, self._epoch)

    def on_test_start(self, trainer: RunView, task: TaskModule) -> None:
        """Begin a bar."""
        self._begin_evaluation(trainer, "Test")

    def on_test_end(self, trainer: RunView, task: TaskModule) -> None:
        """Write the results."""
        self._end_evaluation(trainer)

    def on_predict_start(self, trainer: RunView, task: TaskModule) -> None:
        """Begin a bar."""
        self._begin_evaluation(trainer, "Prediction")

    def on_predict_end(self, trainer: RunView, task: TaskModule) -> None:
        """Write how many batches there were."""
        self._end_evaluation(trainer, results=False)

    def _begin_evaluation(self, trainer: RunView, label: str) -> None:
        total = trainer.num_evaluation_batches or self._lengths.get(label)
        self._evaluation = Count(label, total, nested=self._epoch is not None)
        self._display.begin(self._evaluation)
        self._due = monotonic() + self._display.interval

    def _end_evaluation(
        self, trainer: RunView, within_fit: bool = False, results: bool = True
    ) -> None:
        count = self._evaluation
        if count is None:
            return
        self._evaluation = None
        self._lengths[count.label] = count.done
        self._display.end(count)
        if not within_fit:
            self._display.write(count.line(trainer.callback_metrics if results else {}))
