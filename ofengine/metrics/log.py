"""What ``log`` records: kept on the device, read in one go, averaged over epochs.

A logged :class:`~ofengine.metrics.Metric` is computed at the end of the epoch, and reset.

A logged tensor is read when something asks for its value: every ``log_every_n_steps``
steps, at the end of an epoch, or when ``trainer.callback_metrics`` is looked at. In between
nothing waits for the device.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, ContextManager, Dict, Iterable, List, Optional, Sequence, Tuple

import attrs
from oneflow import Tensor

from ofengine.data.structure import batch_size_of
from ofengine.errors import ConfigurationError, warn
from ofengine.metrics.base import Metric
from ofengine.metrics.held import metrics_held
from ofengine.metrics.stage import (
    LOSS,
    Logged,
    LogSpec,
    Stage,
    check_metric,
    check_spec,
    of_batch,
    read_all,
    scalar,
    take_loss,
)
from ofengine.tracing import active_trace, forbid_in_trace

MOST_PENDING = 4000
"""So many tensors wait on the device before they are read, to bound the memory."""


_SIDES = {False: "training", True: "evaluation"}


class Metrics:
    """The metrics of a Trainer, of all stages."""

    def __init__(self) -> None:
        self._stages: List[Stage] = []
        self._logged: Dict[Tuple[Any, ...], Tuple[LogSpec, Logged]] = {}
        self._known: Dict[str, float] = {}
        self.newest_loss = 0.0
        """The training loss that was read last, or what the task logs in its place."""
        self._task: Any = None
        self._callbacks: Iterable[Any] = ()
        self.logged: Dict[str, float] = {}
        """The latest value of each metric that the loggers were sent."""
        self.progress_bar_names: Dict[str, None] = {}
        """The names logged with ``prog_bar=True``, in the order of their first log."""

    # ------------------------------------------------------------------ who counts

    def attach(self, task: Any, callbacks: Iterable[Any]) -> None:
        """From now on ``task`` is run: a checkpoint keeps the metrics that these hold."""
        self._task, self._callbacks = task, callbacks

    @property
    def held(self) -> Dict[str, Metric]:
        """The metrics that the task and the callbacks hold, by place."""
        return {} if self._task is None else metrics_held(self._task, self._callbacks)

    def count_anew(self, evaluation: bool) -> None:
        """Training, or an evaluation, begins, and so do the sums that metrics have of it."""
        for metric in self.held.values():
            metric.begin(evaluation)

    def running(self) -> ContextManager[None]:
        """In the block a verb is carried out."""
        return contextlib.nullcontext()

    def settle(self) -> None:
        """A verb is over: nothing is left that others have not seen."""

    # ------------------------------------------------------------------ stages

    def begin(self, per_step: bool, suffix: str = "") -> None:
        """Enter a stage. ``per_step`` is the default of ``on_step``; ``suffix`` ends its names."""
        self._stages.append(Stage(per_step, suffix))

    def end(self) -> None:
        """Leave the stage entered last."""
        self._stages.pop()

    def around_update(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """``hook``, which fires once for each update, on all ranks where there are several."""
        return hook

    def at_batch(self, batch_idx: int) -> None:
        """The batch of this index is gone through from now on."""
        self._stages[-1].batch_idx = batch_idx

    def begin_batches(self) -> Stage:
        """Training batches begin: ``log`` reports single steps. Returns the stage of training.

        The loop sets its ``batch`` and ``loss`` after each step, and calls :meth:`commit` where
        its ``current`` is not empty.
        """
        self._stages[-1].per_step = True
        return self._stages[-1]

    def end_batches(self) -> None:
        """The epoch's batches are over: ``log`` reports epochs again."""
        self._stages[-1].per_step = False

    def reset(self) -> None:
        """Leave all stages: the run is over. The latest values stay readable."""
        self._stages.clear()

    def forget(self) -> None:
        """Forget all values: those of the sanity check, or of the run before."""
        self._known.clear()
        self.logged.clear()
        self.progress_bar_names.clear()

    @property
    def _stage(self) -> Stage:
        if not self._stages:
            raise ConfigurationError(
                "log() was called outside of a running fit, validate or test: call it in a step "
                "or in a hook between on_train_start (on_validation_start, ...) and its end."
            )
        return self._stages[-1]

    # ------------------------------------------------------------------ checkpoints

    def state(self) -> Dict[str, Any]:
        """What the stage of training holds and the latest values, for a checkpoint."""
        stages: Dict[str, Any] = {}
        if self._stages:
            stage = self._stages[0]
            if stage.current and len(self._stages) == 1:
                self.commit(stage.batch)  # what hooks have logged for it so far
            self._peek(stage)
            stages = {
                "last": [[attrs.asdict(spec), value] for spec, value, _ in stage.last.values()],
                "sums": [[attrs.asdict(s), total, w] for s, total, w in stage.sums.values()],
            }
        return {
            **stages,
            **self._counted_state(),
            "known": dict(self._known),
            "logged": dict(self.logged),
            "progress_bar": list(self.progress_bar_names),
        }

    def _counted_state(self) -> Dict[str, Any]:
        held = self.held
        counted = list(self._stages[0].counted.values()) if self._stages else []
        places = {id(metric): place for place, metric in held.items()}
        for spec, metric in counted:
            if id(metric) not in places:
                warn(
                    f"log({spec.name!r}, {type(metric).__name__}): no checkpoint can keep the sums "
                    "of a metric that is no attribute of the task: make it in the task's __init__, "
                    "as in self.acc = Accuracy()."
                )
        sides = [False] if len(self._stages) > 1 else [False, True]  # evaluation begins anew
        return {
            "counted": [
                [attrs.asdict(spec), places[id(metric)]]
                for spec, metric in counted
                if id(metric) in places
            ],
            "held": {
                place: {
                    "class": type(metric).__qualname__,
                    **{_SIDES[side]: self._sums_of(place, metric, side) for side in sides},
                }
                for place, metric in held.items()
            },
        }

    def _sums_of(self, place: str, metric: Metric, evaluation: bool) -> Dict[str, Any]:
        return metric.kept(evaluation)

    def load_state(self, state: Dict[str, Any]) -> None:
        """Go on from :meth:`state`, in the stage of training."""
        stage = self._stages[0]
        for options, value in state.get("last", []):
            spec = LogSpec(**options)
            stage.last[spec.full_name] = (spec, value, 0)
        for options, total, weights in state.get("sums", []):
            spec = LogSpec(**options)
            stage.sums[spec.full_name] = [spec, total, weights]
        self._load_counted(stage, state)
        self._known.update(state["known"])
        self.logged.update(state.get("logged", {}))
        self.progress_bar_names.update(dict.fromkeys(state["progress_bar"]))

    def _load_counted(self, stage: Stage, state: Dict[str, Any]) -> None:
        held = self.held
        for place, kept in state.get("held", {}).items():
            if place in held:
                held[place].load_states({n: s for n, s in kept.items() if n != "class"})
            elif kept["training"]:
                warn(
                    f"the checkpoint has sums of the metric {place}, which is gone: they are lost."
                )
        for options, place in state.get("counted", []):
            if place in held:
                spec = LogSpec(**options)
                stage.counted[spec.full_name] = (spec, held[place])

    # ------------------------------------------------------------------ recording

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool = True,
        on_step: Optional[bool] = None,
        on_epoch: Optional[bool] = None,
        batch_size: Optional[int] = None,
    ) -> None:
        """See :meth:`ofengine.TaskModule.log`."""
        stage = self._stages[-1] if self._stages else self._stage
        # Most are tensors of no dimension: they take the shortest way, for steps may log hundreds.
        is_plain = type(value) is Tensor and not value.dim()
        is_counted = not is_plain and isinstance(value, Metric)
        key = (
            name, prog_bar, logger, on_step, on_epoch, batch_size, stage.per_step, stage.suffix,
            is_counted,
        )  # fmt: skip
        known = self._logged.get(key)
        if known is None:
            spec = LogSpec(
                name=name,
                prog_bar=prog_bar,
                logger=logger,
                on_step=stage.per_step if on_step is None else on_step,
                on_epoch=not stage.per_step if on_epoch is None else on_epoch,
                batch_size=batch_size,
                suffix=stage.suffix,
            )
            check_spec(spec)
            logged = Logged([], [(spec, 0, 0)]) if is_counted else Logged([(spec, 0, 0)])
            known = self._logged[key] = (spec, logged)
        if is_plain:
            value = value.detach().clone()  # for what is in its memory may be written over
        elif is_counted:
            check_metric(name, value)
        else:
            value = scalar(name, value)
        trace = active_trace()
        if trace is not None:
            trace.record(known[0], value)
        else:
            stage.current.append((known[1], (value,)))

    def record_traced(self, logged: Logged, values: Sequence[Any]) -> None:
        """Take what a compiled step put out for the ``log`` calls it was traced with."""
        self._stages[-1].current.append((logged, values))

    def commit(self, batch: Any = None) -> None:
        """Close a batch: take what was logged since the last one."""
        stage = self._stages[-1]
        if not stage.current:
            return
        take_loss(stage)  # the task may have logged another "loss" since
        batch_size = 1 if batch is None else batch_size_of(batch)
        last, pending = stage.last, stage.pending
        for logged, values in stage.current:
            for name, spec, tensor, index in logged.on_step:
                last[name] = (spec, values[tensor], index)
            if logged.on_epoch:
                pending.append((logged, values, batch_size))
            for name, spec, tensor, _ in logged.counted:
                metric = values[tensor]
                stage.counted[name] = (spec, metric)
                if spec.on_step:
                    last[name] = (spec, of_batch(spec, metric), 0)
        stage.current.clear()
        if len(stage.pending) >= MOST_PENDING:
            self._fold_pending(stage)

    def logged_so_far(self) -> int:
        """How many ``log`` calls of the batch at hand were recorded."""
        return len(self._stages[-1].current) if self._stages else 0

    def forget_since(self, count: int) -> None:
        """Forget the ``log`` calls behind the first ``count``."""
        if self._stages:
            del self._stages[-1].current[count:]

    # ------------------------------------------------------------------ reading

    def flush(self) -> Dict[str, float]:
        """The last step's values for the loggers, read in one go; then start anew."""
        if not self._stages:
            return {}
        stage = self._stages[-1]
        self._peek(stage)
        rows = {spec.step_name: value for spec, value, _ in stage.last.values() if spec.logger}
        stage.last.clear()
        return rows

    def peek(self) -> None:
        """Read what is pending, and publish it; the loggers get it all the same."""
        for stage in self._stages:
            self._peek(stage)

    def _peek(self, stage: Stage) -> None:
        take_loss(stage)
        values = {id(value): value for _, value, _ in stage.last.values()}
        numbers = dict(zip(values, self._fold_pending(stage, list(values.values()))))
        for name, (spec, value, index) in stage.last.items():
            number = numbers[id(value)][index]
            stage.last[name] = (spec, number, 0)
            if name == LOSS.name and stage is self._stages[0]:
                self.newest_loss = number
            self._publish(spec, spec.step_name, number)

    def _fold_pending(self, stage: Stage, others: Sequence[Any] = ()) -> List[List[float]]:
        """Add the pending values to their sums; ``others`` are read along and returned."""
        waiting, sums = stage.pending, stage.sums
        read = iter(read_all([*others, *(each for _, values, _ in waiting for each in values)]))
        of_others = [next(read) for _ in others]
        for logged, values, size in waiting:
            numbers = [next(read) for _ in values]
            for name, spec, tensor, index in logged.on_epoch:
                weight = float(size if spec.batch_size is None else spec.batch_size)
                kept = sums.get(name)
                if kept is None:
                    kept = sums[name] = [spec, 0.0, 0.0]
                kept[0] = spec
                kept[1] += numbers[tensor][index] * weight
                kept[2] += weight
        waiting.clear()
        return of_others

    def close_epoch(self) -> Dict[str, float]:
        """The epoch's means, by name, of all that was logged ``on_epoch``; then start anew."""
        self.commit()
        self.flush()
        stage = self._stages[-1]
        means: Dict[str, float] = {}
        for spec, total, weights in stage.sums.values():
            mean = total / weights if weights else float("nan")
            self._publish(spec, spec.epoch_name, mean)
            self._known[spec.full_name] = mean
            if spec.logger:
                means[spec.epoch_name] = mean
        stage.sums.clear()
        means.update(self._close_counted(stage))
        return means

    def _close_counted(self, stage: Stage) -> Dict[str, float]:
        """Compute the metrics that were logged ``on_epoch``, and reset all that were."""
        values: Dict[str, float] = {}
        for spec, metric in stage.counted.values():
            if spec.on_epoch:
                value = float(metric.compute())
                self._publish(spec, spec.epoch_name, value)
                self._known[spec.full_name] = value
                if spec.logger:
                    values[spec.epoch_name] = value
        for _, metric in stage.counted.values():
            metric.reset()
        stage.counted.clear()
        return values

    @property
    def values(self) -> Dict[str, float]:
        """The latest value of every metric, by name. Waits for the device where one is pending."""
        forbid_in_trace("trainer.metrics.values")
        self.peek()
        return dict(self._known)

    @property
    def progress_bar(self) -> Dict[str, float]:
        """The values read so far of the metrics meant for the progress bar; waits for nothing."""
        return {name: self._known[name] for name in self.progress_bar_names if name in self._known}

    def put(self, values: Dict[str, float]) -> None:
        """Publish numbers that the loggers are sent, such as learning rates."""
        self._known.update(values)
        self.logged.update(values)

    def _publish(self, spec: LogSpec, name: str, number: float) -> None:
        self._known[name] = number
        if spec.prog_bar:
            self.progress_bar_names[name] = None
