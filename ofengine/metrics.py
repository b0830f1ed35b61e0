"""What ``log`` records: kept on the device, read in one go, averaged over epochs.

A logged tensor is read when something asks for its value: every ``log_every_n_steps``
steps, at the end of an epoch, or when ``trainer.callback_metrics`` is looked at. In between
nothing waits for the device.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence, Tuple

import attrs
import oneflow as flow

from ofengine.data.structure import batch_size_of, describe
from ofengine.errors import ConfigurationError
from ofengine.tracing import active_trace


@attrs.frozen
class LogSpec:
    """How one ``log`` call wants its value reported."""

    name: str
    prog_bar: bool
    logger: bool
    on_step: bool
    on_epoch: bool
    batch_size: Optional[int]
    suffix: str = ""
    """Which of several dataloaders it belongs to."""

    @property
    def full_name(self) -> str:
        """The name that stands for the newest of its values."""
        return self.name + self.suffix

    @property
    def step_name(self) -> str:
        """The name of single batches' values."""
        return (f"{self.name}_step" if self.on_epoch else self.name) + self.suffix

    @property
    def epoch_name(self) -> str:
        """The name of the epoch's mean."""
        return (f"{self.name}_epoch" if self.on_step else self.name) + self.suffix


_Place = Tuple[str, LogSpec, int, int]
"""(full name, spec, which tensor, which of the numbers in it)."""


class Logged:
    """Where the numbers of some names are, in one or several tensors that are logged together.

    Args:
        places: (spec, which tensor, which of the numbers in it) in the order of the ``log`` calls.
    """

    def __init__(self, places: Sequence[Tuple[LogSpec, int, int]]) -> None:
        named = [(spec.full_name, spec, tensor, index) for spec, tensor, index in places]
        self.on_step: List[_Place] = [place for place in named if place[1].on_step]
        self.on_epoch: List[_Place] = [place for place in named if place[1].on_epoch]


LOSS = LogSpec("loss", prog_bar=True, logger=True, on_step=True, on_epoch=False, batch_size=None)
MOST_PENDING = 4000
"""So many tensors wait on the device before they are read, to bound the memory."""


class Stage:
    """The values of one running stage: the last of each step, sums for each epoch mean."""

    def __init__(self, per_step: bool, suffix: str) -> None:
        self.per_step = per_step
        self.suffix = suffix
        self.batch: Any = None
        """The training batch that was stepped last."""
        self.batch_idx = 0
        """Its index in the pass; of evaluation, the batch being gone through."""
        self.loss: Any = None
        """Its loss, where nothing has taken it up yet."""
        self.current: List[Tuple[Logged, Sequence[Any]]] = []
        """What was logged since the last batch was closed, and its tensors or numbers."""
        self.last: Dict[str, Tuple[LogSpec, Any, int]] = {}
        """By name the newest: its tensor or number, and which of the numbers in it."""
        self.pending: List[Tuple[Logged, Sequence[Any], int]] = []
        """What goes into epoch means, and the size of its batch."""
        self.sums: Dict[str, List[Any]] = {}
        """By name [spec, sum of the weighted values, sum of the weights]."""


class Metrics:
    """The metrics of a Trainer, of all stages."""

    def __init__(self) -> None:
        self._stages: List[Stage] = []
        self._logged: Dict[Tuple[Any, ...], Tuple[LogSpec, Logged]] = {}
        self._known: Dict[str, float] = {}
        self.newest_loss = 0.0
        """The training loss that was read last, or what the task logs in its place."""
        self.progress_bar_names: Dict[str, None] = {}
        """The names logged with ``prog_bar=True``, in the order of their first log."""

    # ------------------------------------------------------------------ stages

    def begin(self, per_step: bool, suffix: str = "") -> None:
        """Enter a stage. ``per_step`` is the default of ``on_step``; ``suffix`` ends its names."""
        self._stages.append(Stage(per_step, suffix))

    def end(self) -> None:
        """Leave the stage entered last."""
        self._stages.pop()

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
        bar = list(self.progress_bar_names)
        return {**stages, "known": dict(self._known), "progress_bar": bar}

    def load_state(self, state: Dict[str, Any]) -> None:
        """Go on from :meth:`state`, in the stage of training."""
        stage = self._stages[0]
        for options, value in state.get("last", []):
            spec = LogSpec(**options)
            stage.last[spec.full_name] = (spec, value, 0)
        for options, total, weights in state.get("sums", []):
            spec = LogSpec(**options)
            stage.sums[spec.full_name] = [spec, total, weights]
        self._known.update(state["known"])
        self.progress_bar_names.update(dict.fromkeys(state["progress_bar"]))

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
        stage = self._stage
        key = (name, prog_bar, logger, on_step, on_epoch, batch_size, stage.per_step, stage.suffix)
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
            _check_spec(spec)
            known = self._logged[key] = (spec, Logged([(spec, 0, 0)]))
        value = _scalar(name, value)
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
        _take_loss(stage)  # the task may have logged another "loss" since
        batch_size = 1 if batch is None else batch_size_of(batch)
        last, pending = stage.last, stage.pending
        for logged, values in stage.current:
            for name, spec, tensor, index in logged.on_step:
                last[name] = (spec, values[tensor], index)
            if logged.on_epoch:
                pending.append((logged, values, batch_size))
        stage.current.clear()
        if len(stage.pending) >= MOST_PENDING:
            self._fold_pending(stage)

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
        _take_loss(stage)
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
        read = iter(read_values([*others, *(each for _, values, _ in waiting for each in values)]))
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
        return means

    @property
    def values(self) -> Dict[str, float]:
        """The latest value of every metric, by name. Waits for the device where one is pending."""
        self.peek()
        return dict(self._known)

    @property
    def progress_bar(self) -> Dict[str, float]:
        """The values read so far of the metrics meant for the progress bar; waits for nothing."""
        return {name: self._known[name] for name in self.progress_bar_names if name in self._known}

    def put(self, values: Dict[str, float]) -> None:
        """Publish numbers that did not come from ``log``, such as learning rates."""
        self._known.update(values)

    def _publish(self, spec: LogSpec, name: str, number: float) -> None:
        self._known[name] = number
        if spec.prog_bar:
            self.progress_bar_names[name] = None


def _take_loss(stage: Stage) -> None:
    if stage.loss is not None:
        stage.last["loss"] = (LOSS, stage.loss, 0)
        stage.loss = None


def _check_spec(spec: LogSpec) -> None:
    if not isinstance(spec.name, str) or not spec.name:
        raise ConfigurationError(f"log({spec.name!r}, ...): a metric's name is a text.")
    if not spec.on_step and not spec.on_epoch:
        raise ConfigurationError(
            f"log({spec.name!r}, ...) with on_step=False and on_epoch=False would report nothing: "
            "set one of them to True."
        )


def _scalar(name: str, value: Any) -> Any:
    """``value`` as a detached tensor of no dimension, or as a float."""
    if isinstance(value, flow.Tensor):
        if not value.dim():
            return value.detach()
        if value.numel() != 1:
            raise ConfigurationError(
                f"log({name!r}, ...) got a tensor of shape {tuple(value.shape)}: log one number, "
                "for example its .mean()."
            )
        return value.detach().reshape(())
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"log({name!r}, ...) got {describe(value)}: log a tensor of one element or a number; "
            "use log_dict for a dict."
        ) from None


def read_values(values: Sequence[Any]) -> List[List[float]]:
    """The numbers in each of the values, with one transfer for each type and shape."""
    numbers: List[List[float]] = [[] for _ in values]
    alike: Dict[Tuple[Any, ...], List[int]] = {}
    for position, value in enumerate(values):
        if isinstance(value, flow.Tensor):
            kind = (value.type(), value.shape) if value.is_local else (value.dtype, value.shape)
            alike.setdefault(kind, []).append(position)
        else:
            numbers[position] = [value]
    for positions in alike.values():
        together = [values[position] for position in positions]
        read = (flow.stack(together) if len(together) > 1 else together[0]).numpy()
        rows = read.reshape(len(together), -1).astype("float64").tolist()
        for position, row in zip(positions, rows):
            numbers[position] = row
    return numbers
