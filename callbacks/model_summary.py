"""ModelSummary: what is about to be trained, at which rates, before the first step."""

from __future__ import annotations

import shutil
import sys
from typing import Dict, Iterable, List, Sequence, Tuple

from oneflow import nn

from ofengine import tables
from ofengine.callback import Callback
from ofengine.callbacks._example_run import Seen, run_example
from ofengine.callbacks._progress_display import IN_NOTEBOOK
from ofengine.errors import ConfigurationError
from ofengine.run.view import RunView
from ofengine.task import TaskModule

_Cells = Tuple[Sequence[str], Sequence[Sequence[str]]]
"""A table's header and rows."""
_MOST_GROUPS = 2
"""A module with parameters in more groups than these shows their number and range instead."""


class ModelSummary(Callback):
    """Prints the task's modules and its parameter groups to stdout when ``fit`` starts.

    The modules' table shows name, type, number of parameters, how many of them train, and the
    groups they are in with the group's rate at step 0, as ``trainer.rates`` has it. The groups'
    table shows what that rate is made of. Parameters that several modules share count once.
    Where the task has an ``example_input_array``, it is run through ``forward`` once, in eval mode
    and without gradients, and the table shows shapes and FLOPs: the multiplications and additions
    of linear layers and convolutions. Otherwise nothing is run through the model.

    Args:
        max_depth: how deep modules within modules are shown; -1 for all, 0 for no summary.

    Raises:
        ConfigurationError: ``max_depth`` is no whole number from -1 on.
    """

    rank_zero_only = True

    def __init__(self, max_depth: int = 1) -> None:
        if isinstance(max_depth, bool) or not isinstance(max_depth, int) or max_depth < -1:
            raise ConfigurationError(
                f"ModelSummary(max_depth={max_depth!r}): give a whole number, -1 for all depths."
            )
        self.max_depth = max_depth

    def on_fit_start(self, trainer: RunView, task: TaskModule) -> None:
        """Print it."""
        if self.max_depth and IN_NOTEBOOK:
            from IPython.display import HTML, display

            display(HTML(self.html(trainer, task)))
        elif self.max_depth:
            print(self.text(trainer, task), flush=True)

    def text(self, trainer: RunView, task: TaskModule) -> str:
        """The summary. ``trainer`` must be one that fits, or has fitted, ``task``."""
        seen = _tried(trainer, task)
        header, rows = self._modules(trainer, task, seen)
        modules = _table(header, rows, "<<><<<<>", droppable=(1, 3))
        header, rows, decay = _groups(trainer)
        groups = _table(header, rows, "<" + ">" * (len(header) - 1), droppable=(1, 2))
        blocks = ["\n".join(modules), "\n".join(_totals(task, seen)), "\n".join(groups), decay]
        parts = ["", _title(trainer, task), *filter(None, blocks)]
        return "\n\n".join(parts)[1:] + "\n"

    def html(self, trainer: RunView, task: TaskModule) -> str:
        """The same of ``trainer`` and ``task`` for a notebook, where ``fit`` shows it by itself."""
        header, rows, decay = _groups(trainer)
        seen = _tried(trainer, task)
        note = " ".join(_totals(task, seen)) + "."
        modules = tables.as_html(_title(trainer, task), *self._modules(trainer, task, seen), note)
        return modules + tables.as_html("parameter groups", header, rows, decay)

    def _modules(self, trainer: RunView, task: TaskModule, seen: Dict[int, Seen]) -> _Cells:
        group_of: Dict[int, int] = {
            id(parameter): index
            for index, group in enumerate(trainer.param_groups)
            for parameter in group.parameters
        }
        step = _step(trainer)
        names, rates = trainer.rates.names, trainer.rates.rates(step)

        def row(name: str, kind: str, parameters: Iterable[nn.Parameter]) -> Tuple[str, ...]:
            members = list(parameters)
            numbers = sum(parameter.numel() for parameter in members)
            trained = sum(parameter.numel() for parameter in members if parameter.requires_grad)
            within = sorted({group_of[id(p)] for p in members if id(p) in group_of})
            return (
                name,
                kind,
                f"{numbers:,}",
                _share(trained, numbers),
                _group_names([(names[index], rates[index]) for index in within]),
            )

        rows = []
        for indented, module in _tree(task, self.max_depth):
            at = seen.get(id(module), Seen())
            tried = (at.inputs, at.outputs, f"{at.flops:,}") if seen else ()
            rows.append((*row(indented, type(module).__name__, module.parameters()), *tried))
        own = list(task.parameters(recurse=False))
        if own:
            rows.append((*row("(the task's own)", "Parameter", own), *(("-",) * 3 if seen else ())))
        header = ["module", "type", "parameters", "trainable", f"group (rate at step {step})"]
        return header + (["in", "out", "FLOPs"] if seen else []), rows


def _tried(trainer: RunView, task: TaskModule) -> Dict[int, Seen]:
    """What a run of the task's example tells; empty where it has none."""
    return {} if task.example_input_array is None else run_example(task, trainer.device)


def _title(trainer: RunView, task: TaskModule) -> str:
    device = "cpu" if trainer.device.type == "cpu" else str(trainer.device)
    return f"{type(task).__name__}, {trainer.mode} mode on {device}"


def _totals(task: TaskModule, seen: Dict[int, Seen]) -> List[str]:
    parameters = list(task.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return [
        f"{total:,} parameters, {total * 4 / 1e6:,.2f} MB in float32:",
        f"{trained:,} trainable, {total - trained:,} frozen",
        *([f"{seen[id(task)].flops:,} FLOPs in a forward"] if id(task) in seen else []),
    ]


def _tree(module: nn.Module, depth: int, level: int = 0) -> List[Tuple[str, nn.Module]]:
    """The modules within ``module``, down to ``depth``, each with its name, indented."""
    lines: List[Tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        lines.append(("  " * level + name, child))
        if depth != 1:
            lines.extend(_tree(child, depth - 1, level + 1))
    return lines


def _share(trained: int, numbers: int) -> str:
    if not numbers:
        return "-"
    if trained == numbers:
        return "all"
    return f"{trained:,}" if trained else "frozen"


def _group_names(groups: Sequence[Tuple[str, float]]) -> str:
    if len(groups) <= _MOST_GROUPS:
        return ", ".join(f"{name} ({_rate(rate)})" for name, rate in groups) or "-"
    rates = [rate for _, rate in groups]
    return f"{len(groups)} groups ({_rate(min(rates))} to {_rate(max(rates))})"


def _step(trainer: RunView) -> int:
    """0; after a fit in which ``set_lr`` was called the newest step, for that one is known."""
    return trainer.rates.within(trainer.global_step) if trainer.rates.changes else 0


def _groups(trainer: RunView) -> Tuple[List[str], List[List[str]], str]:
    """Header, rows, and a sentence on decay."""
    plan = trainer.rates
    step = _step(trainer)
    rates = plan.rates(step)
    header = ["group", "tensors", "parameters", "lr", "lr_scale", "lr_decay_scale"]
    rows = [
        [group.name, f"{group.tensors:,}", f"{group.numbers:,}"]
        + [f"{number:g}" for number in (group.lr, group.lr_scale, group.lr_decay_scale)]
        for group in plan.groups
    ]
    if plan.decay.key == "lr_scale":  # the cookbook's code: the key has the other one's meaning
        header[4:] = ["lr_scale (decay)"]
        rows = [row[:5] for row in rows]
    header.append(f"rate at step {step}")
    for row, rate in zip(rows, rates):
        row.append(_rate(rate))
    decay = ""
    if any(plan.decay_scale(index) != 1.0 for index in range(len(rows))):
        each, every = (
            "each epoch" if plan.decay.per_epoch else "the run",
            plan.decay.every_n_batches,
        )
        decay = f"Decay: after batches 0, {every}, {2 * every}, ... of {each}."
    return header, rows, decay


def _rate(rate: float) -> str:
    """A rate in few digits: it is a float32, so that more would be noise."""
    return f"{rate:.4g}"


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], align: str, droppable: Sequence[int]
) -> List[str]:
    """Columns side by side; on a narrow terminal some of the ``droppable`` ones are left out."""
    widths = [max(map(len, cells)) for cells in zip(header, *rows)]
    shown = list(range(len(header)))
    limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for column in droppable:
        if limit is not None and sum(widths[i] + 2 for i in shown) - 2 > limit:
            shown.remove(column)
    rule = ["-" * width for width in widths]
    return [
        "  ".join(f"{cells[i]:{align[i]}{widths[i]}}" for i in shown).rstrip()
        for cells in (header, rule, *rows)
    ]
