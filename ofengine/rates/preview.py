"""Preview: every group's learning rate over the whole run, seen before running it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO, Any, Dict, List, Optional, Sequence, Tuple, Union

from ofengine import tables
from ofengine.errors import ConfigurationError, RateError
from ofengine.rates.calendar import ceil_div
from ofengine.rates.canvas import LETTERS, Canvas, as_svg, figure, in_columns, round_numbers, spread
from ofengine.rates.checks import check_rates
from ofengine.rates.joint import single_plans
from ofengine.rates.options import in_short
from ofengine.rates.plan import RatePlan
from ofengine.rates.planning import Decays, plan_run
from ofengine.run.settings import Settings

_ALL_STEPS = 8192
"""A run of up to so many steps is sampled at every step."""
_SAMPLES = 2048
"""So many steps are sampled in a longer run, besides the jumps."""
_JUMPS = 256
"""So many of the largest changes between samples are narrowed down to the step."""
_EPOCH_MARKS = 40


class Preview:
    """Every group's learning rate at every optimizer step of a run, from its plan.

    All numbers are the plan's, so they equal those that training uses, in both modes. Made by
    ``Trainer.preview``; ``str(preview)`` is its table.

    Args:
        plan: the run's plan.
        total_steps: optimizer steps (from 0) of the run.
        title: what is previewed, for the headings.
        note: a sentence on what the preview cannot know.

    Attributes:
        plan: see above.
        total_steps: see above.
        steps: the optimizer steps that the curves are sampled at, rising: all of a run of up to
            8192 steps, else about 2,500, the first, the last and the largest jumps among them.

    Raises:
        RateError: there is no step.
    """

    def __init__(
        self, plan: RatePlan, total_steps: int, title: str = "rates", note: str = ""
    ) -> None:
        if total_steps < 1:
            raise RateError(f"the preview of {title} has {total_steps} steps: it needs at least 1.")
        self.plan = plan
        self.total_steps = total_steps
        self.title = title
        self.note = note
        self._sampled: Dict[int, List[float]] = {}
        self._asked: Dict[int, List[float]] = {}
        self.steps: List[int] = self._sample()

    # ------------------------------------------------------------------ numbers

    @property
    def names(self) -> List[str]:
        """The groups' names, in order."""
        return self.plan.names

    def at(self, step: int) -> Dict[str, float]:
        """The learning rate of each group, by name, at optimizer step ``step`` (from 0).

        Raises :class:`RateError` for a step that is not in the run.
        """
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < self.total_steps:
            raise RateError(
                f"step {step!r} is not in the run: its steps are 0 to {self.total_steps - 1}."
            )
        return dict(zip(self.names, self._rates(step)))

    def curve(self, group: str) -> List[float]:
        """The learning rate of ``group`` at each of ``steps``.

        Raises :class:`RateError` for an unknown group.
        """
        index = self.plan.index(group)
        return [self._sampled[step][index] for step in self.steps]

    def peak(self, group: str) -> Tuple[int, float]:
        """Where warm-up ends: the first step of the group's largest rate, and that rate.

        Step 0 where the rates only fall. In a run too long to be sampled at every step, all
        steps around the largest sample are looked at.
        """
        index = self.plan.index(group)
        curve = self.curve(group)
        best = max(range(len(curve)), key=lambda i: (curve[i], -i))
        first, last = self.steps[max(0, best - 1)], self.steps[min(best + 1, len(curve) - 1)]
        steps = range(first, last + 1) if last - first > 2 else [self.steps[best]]
        step = max(steps, key=lambda each: (self._rates(each)[index], -each))
        return step, self._rates(step)[index]

    @property
    def epochs(self) -> List[int]:
        """The first step of each epoch; only the first where an epoch's length is not known."""
        batches, windows = self.plan.calendar.batches_per_epoch, self.plan.calendar.windows
        if batches is None:
            return [0]
        starts: List[int] = []
        step = 0
        for epoch, window, end in windows.stretches(0):
            per_epoch, stop = ceil_div(batches, window), self.total_steps
            if end is not None:
                stop = min(stop, step + (end - epoch) * per_epoch)
            starts += range(step, stop, per_epoch)
            step = stop
        return starts

    def _rates(self, step: int) -> List[float]:
        if step in self._sampled:
            return self._sampled[step]
        if step not in self._asked:
            self._asked[step] = self.plan.rates(step)
        return self._asked[step]

    def _sample(self) -> List[int]:
        """The steps of the curves, whose rates are kept; in rising order, as plans like it."""
        last = self.total_steps - 1
        every = self.total_steps <= _ALL_STEPS
        count = self.total_steps if every else _SAMPLES
        steps = sorted({round(i * last / max(count - 1, 1)) for i in range(count)})
        for step in steps:
            self._sampled[step] = self.plan.rates(step)
        if not every:
            self._find_jumps(steps)
        return sorted(self._sampled)

    def _find_jumps(self, steps: Sequence[int]) -> None:
        """Between the samples that differ most, sample both sides of the largest change."""
        gaps = [(self._change(a, b), a, b) for a, b in zip(steps, steps[1:])]
        for change, a, b in sorted(sorted(gaps, reverse=True)[:_JUMPS], key=lambda gap: gap[1]):
            low, high = a, b
            while change and high - low > 1:
                middle = (low + high) // 2
                self._sampled[middle] = self.plan.rates(middle)
                left = self._change(low, middle) >= self._change(middle, high)
                low, high = (low, middle) if left else (middle, high)

    def _change(self, a: int, b: int) -> float:
        """How far the rates of two samples are apart, the largest of all groups."""
        pairs = zip(self._sampled[a], self._sampled[b])
        return max((abs(x - y) / max(x, y) for x, y in pairs if x != y), default=0.0)

    # ------------------------------------------------------------------ table

    def __str__(self) -> str:
        return self.table()

    def table(self, at: Sequence[int] = ()) -> str:
        """The groups and their rates as text.

        Columns: the group; its parameters (tensors) and how many numbers they hold; ``lr``,
        ``lr_scale`` and ``lr_decay_scale``; the rate at the first step, at the largest
        (``step:rate``, see :meth:`peak`), at the last step, the options that a schedule moves, and
        the rate at each step of ``at``.
        """
        lines = tables.as_text(*self._cells(at))
        return "\n".join([self.heading(), *lines, *([self.note] if self.note else [])])

    def _repr_html_(self) -> str:
        """The table in a notebook, and the curves where matplotlib is installed."""
        return tables.as_html(self.heading(), *self._cells(()), self.note) + as_svg(self._plot)

    def _cells(self, at: Sequence[int]) -> Tuple[List[str], List[List[str]]]:
        head = ["group", "params", "numbers", "lr", "lr_scale", "lr_decay_scale"]
        moved = [self.plan.scheduled(step) for step in self.steps]
        head += ["start", "peak", "end", *moved[0], *(f"step {step}" for step in at)]
        for key, short in (("lr_scale", "scale"), ("lr_decay_scale", "decay")):
            head[head.index(key)] = short
        asked = [self.at(step) for step in at]
        last = self._rates(self.total_steps - 1)
        rows = []
        for index, group in enumerate(self.plan.groups):
            step, rate = self.peak(group.name)
            cells = [group.name, f"{group.tensors:,}", f"{group.numbers:,}"]
            cells += [_short(x) for x in (group.lr, group.lr_scale, group.lr_decay_scale)]
            cells += [_short(self._sampled[0][index]), f"{step}:{_short(rate)}"]
            options = [in_short([each[option][index] for each in moved]) for option in moved[0]]
            cells += [_short(last[index]), *options, *(_short(r[group.name]) for r in asked)]
            rows.append(cells)
        return head, rows

    def heading(self) -> str:
        """The run in one line: how long it is, and when decay happens."""
        batches, windows = self.plan.calendar.batches_per_epoch, self.plan.calendar.windows
        text = f"{self.title}: {_count(self.total_steps, 'optimizer step')}"
        if batches:
            epoch, within = windows.locate(self.total_steps, batches)
            per_epoch = ceil_div(batches, windows.at(epoch))
            epochs = epoch + within / per_epoch
            text += f", {epochs:.4g} epoch{'' if epochs == 1 else 's'}"
            text += f" of {per_epoch:,}" if len(windows.changes) == 1 else ""
        if windows.most > 1:
            text += f", {' then '.join(str(each) for _, each in windows.changes)} batches a step"
        if any(self.plan.decay_scale(index) != 1.0 for index in range(len(self.names))):
            text += f", decay after every {_count(self.plan.decay.every_n_batches, 'batch', 'es')}"
        return text

    # ------------------------------------------------------------------ pictures

    def draw(self, width: int = 80, height: Optional[int] = None, plain: bool = False) -> str:
        """Every group's curve as text, readable without colour.

        Each curve carries its letter; beside it, or below where there are many, stands whose it
        is. Groups with the same rates share a curve. The y axis is logarithmic where rates span
        decades.

        Args:
            width: columns in all, at least 40.
            height: rows of the field, at least 4. Default: 20, or 32 for more than 8 groups.
            plain: draw with ASCII characters instead of braille.

        Raises:
            ConfigurationError: it is too small.
        """
        if height is None:
            height = 20 if len(self.names) <= 8 else 32
        if width < 40 or height < 4:
            raise ConfigurationError(
                f"draw(width={width}, height={height}): give at least 40 columns and 4 rows."
            )
        low, high, log_y = self._range()
        shared = self._shared()
        letters = [LETTERS[i % len(LETTERS)] for i in range(len(shared))]
        names = [f"{letter} {', '.join(who)}" for letter, who in zip(letters, shared.values())]
        longest = max(map(len, names))
        is_beside = len(names) <= height // 2 and longest <= width // 3
        canvas = Canvas(
            width - 11 - (longest + 1 if is_beside else 0), height,
            (0, self.total_steps), (low, high), log_y=log_y, plain=plain,
        )  # fmt: skip
        ends = []
        drawn = [canvas.draw(self._stairs(curve)) for curve in shared]
        for index, (cells, letter) in enumerate(zip(drawn, letters)):
            canvas.tag(cells, letter, index, len(drawn))
            ends.append(cells[-1][0])
        beside = spread(ends, names, height) if is_beside else {}
        title = f"learning rate{' (log scale)' if log_y else ''} by optimizer step"
        lines = [title, *canvas.framed(beside, self._x_ticks(canvas.columns))]
        if not is_beside:
            lines += in_columns(names, width)
        return "\n".join(lines)

    def plot(self, path: Union[str, Path], width: float = 8.0, height: float = 4.5) -> Path:
        """Write the curves to ``path`` (.png, .svg, .pdf), with a legend of groups and epoch marks.

        Groups with the same rates share a curve. The legend goes from the highest to the lowest.

        Args:
            path: the file; what it is shows from its ending.
            width: inches.
            height: inches.

        Raises:
            ConfigurationError: matplotlib is not installed, or the file cannot be written.
        """
        self._plot(path, width, height)
        return Path(path)

    def _plot(
        self, path: Union[str, Path, IO[bytes]], width: float = 8.0, height: float = 4.5
    ) -> None:
        low, _, log_y = self._range()
        with figure(path, width, height) as (axes, colors):
            shared = self._shared()
            lines = {}
            for index, (curve, names) in enumerate(shared.items()):
                color = colors(index, len(shared))
                points = [math.nan if log_y and rate < low else rate for rate in curve]
                lines[curve] = axes.stairs(
                    points, [*self.steps, self.total_steps], baseline=None, label=", ".join(names),
                    color=color, linewidth=1.5,
                )  # fmt: skip
            axes.set(xlabel="optimizer step", ylabel="learning rate", title=self.title)
            if log_y:
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
            if 1 < len(self.epochs) <= _EPOCH_MARKS:
                for epoch in self.epochs[1:]:
                    axes.axvline(epoch, color="0.9", linewidth=0.8, zorder=0)
            batches, windows = self.plan.calendar.batches_per_epoch, self.plan.calendar.windows
            if batches and len(windows.changes) == 1:
                per_epoch = ceil_div(batches, windows.most)
                top = axes.secondary_xaxis(
                    "top", functions=(lambda x: x / per_epoch, lambda x: x * per_epoch)
                )
                top.set_xlabel("epoch")
                top.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(
                handles=[lines[curve] for curve in sorted(lines, key=sum, reverse=True)],
                loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False,
                fontsize="small" if len(lines) <= 16 else "xx-small",
                ncol=math.ceil(len(lines) / 26),
            )  # fmt: skip

    def _shared(self) -> Dict[Tuple[float, ...], List[str]]:
        """Whose each curve is, in the groups' order."""
        shared: Dict[Tuple[float, ...], List[str]] = {}
        for name in self.names:
            shared.setdefault(tuple(self.curve(name)), []).append(name)
        return shared

    def _stairs(self, curve: Sequence[float]) -> List[Tuple[float, float]]:
        """The curve as points, with corners where a rate jumps; the last step has width, too."""
        points: List[Tuple[float, float]] = []
        for step, rate in zip(self.steps, curve):
            if points and rate != points[-1][1]:
                points.append((step, points[-1][1]))
            points.append((step, rate))
        return [*points, (self.total_steps, curve[-1])]

    def _range(self) -> Tuple[float, float, bool]:
        """(lowest, highest, logarithmic?) of the y axis."""
        peaks = [max(self.curve(name)) for name in self.names]
        positive = sorted(r for name in self.names for r in self.curve(name) if r > 0)
        if not positive:
            return 0.0, 1.0, False
        above = [peak for peak in peaks if peak > 0]
        high, quarter = positive[-1], positive[len(positive) // 4]
        if high / min(above) < 10 and high / quarter < 10:
            return 0.0, high, False
        # A schedule that ends at 0 would leave the decades that matter no room.
        low = max(positive[0], min(quarter, *above) * 1e-2)
        return low, high, True

    def _x_ticks(self, columns: int) -> List[Tuple[float, str]]:
        epochs = self.epochs
        if 1 < len(epochs) <= 12:
            return [(step, f"{step} (ep. {i})") for i, step in enumerate(epochs)]
        ticks = round_numbers(0, self.total_steps - 1, max(2, columns // 12))
        return [(step, f"{step:.0f}") for step in ticks]


def preview(
    settings: Settings, task: Any, per_epoch: Optional[int], decays: Decays = ()
) -> Preview:
    """What ``fit`` would do to the rates of ``task``; trains nothing.

    The groups are checked as ``fit`` checks them. No batch is read and the device is not
    touched; ``configure_optimizers`` is called, but no hook, ``setup`` included.

    Args:
        settings: whose ``max_epochs``, ``max_steps`` and ``accumulate_grad_batches`` count.
        task: the task.
        per_epoch: batches in an epoch, or None where that is not known.
        decays: when decay happens, by the name of who says so.

    Raises:
        RateError: the groups or the schedule are wrong.
        ConfigurationError: how long the run is cannot be known.
    """
    name = type(task).__name__
    if settings.max_epochs < 0 and settings.max_steps < 0:
        raise ConfigurationError(
            f"the run of {name} has no end that is known ahead: give the Trainer max_epochs or "
            "max_steps."
        )
    unknown = ConfigurationError(
        f"how many steps an epoch of {name} has is not known (there is no train_dataloader with a "
        "length), and the rates depend on it: give steps_per_epoch."
    )
    if per_epoch is None and settings.max_steps < 0:
        raise unknown
    made, plan = plan_run(settings, task, per_epoch, decays)
    total = plan.stop
    if total is None or (per_epoch is None and plan.depends_on_epochs()):
        raise unknown
    note = ""
    for own, its_plan in single_plans(made, plan):
        check_rates(its_plan, own, its_plan.stop, settings.max_epochs)
        if own.monitor is not None:
            note = f"ReduceLROnPlateau will lower these rates where {own.monitor} stops improving."
    return Preview(plan, total, name, note)


def _short(rate: float) -> str:
    return f"{rate:.3g}"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"
