"""Several optimizers: what ``configure_optimizers`` returns by name, taken apart and checked."""

from __future__ import annotations

from typing import Any, Dict, List

import attrs
from oneflow.optim import Optimizer

from ofengine.errors import ConfigurationError, quoted
from ofengine.rates.optimizers import OPTIMIZER_KEYS, Optimization, check_keys, read_optimizers
from ofengine.run.arguments import check_choice, check_clip, check_count

_CLIPPING = ("gradient_clip_val", "gradient_clip_algorithm")
_KEYS = {*OPTIMIZER_KEYS, "every_n_batches", *_CLIPPING}


@attrs.frozen
class Named:
    """One of several optimizers."""

    name: str
    made: Optimization
    every_n_batches: int
    """It steps in each batch of an epoch whose index is divisible by this, 0 included."""
    clipping: Dict[str, Any]
    """What it says of clipping in the place of the Trainer's arguments."""


def is_by_name(returned: Any) -> bool:
    """True where ``configure_optimizers`` returned a dict of optimizers by name."""
    if not isinstance(returned, dict) or OPTIMIZER_KEYS & set(returned):
        return False
    inside = [
        each.get("optimizer") if isinstance(each, dict) else each for each in returned.values()
    ]
    return any(isinstance(each, Optimizer) for each in inside)


def read_all(returned: Any, task_name: str) -> List[Optimization]:
    """All that ``configure_optimizers`` returned, one or several."""
    if is_by_name(returned):
        return [each.made for each in read_named(returned, task_name)]
    return [read_optimizers(returned, task_name)]


def read_named(returned: Dict[Any, Any], task_name: str) -> List[Named]:
    """Understand what :func:`is_by_name`; in its order the optimizers step.

    Raises :class:`ConfigurationError` for what is wrong with a name or an option.
    """
    where = f"{task_name}.configure_optimizers()"
    found = [_read_one(name, value, task_name, where) for name, value in returned.items()]
    if all(each.every_n_batches > 1 for each in found):
        raise ConfigurationError(
            f"{where}: no optimizer steps in every batch: {quoted([e.name for e in found])} have "
            "an every_n_batches above 1. Leave it out of one, for a batch without a step trains "
            "nothing."
        )
    return found


def _read_one(name: Any, value: Any, task_name: str, where: str) -> Named:
    if not isinstance(name, str) or not name.isidentifier() or name == "loss":
        raise ConfigurationError(
            f"{where} calls an optimizer {name!r}: a name is a word of letters, digits and _, such "
            "as 'generator', and not 'loss', which the outputs of a batch have."
        )
    options = value if isinstance(value, dict) else {"optimizer": value}
    own = f"{where}[{name!r}]"
    if "frequency" in options:
        raise ConfigurationError(
            f"{own} has a 'frequency', which counts batches in a row in Lightning: write "
            "'every_n_batches': n for a step in every n-th batch."
        )
    check_keys(options, _KEYS, own)
    every = options.get("every_n_batches", 1)
    check_count(f"every_n_batches of {own}", every, 1, "a whole number from 1 on")
    clipping: Dict[str, Any] = {key: options[key] for key in _CLIPPING if key in options}
    if "gradient_clip_val" in clipping:
        clipping["gradient_clip_val"] = check_clip(clipping["gradient_clip_val"])
    if "gradient_clip_algorithm" in clipping:
        key = "gradient_clip_algorithm"
        check_choice(f"{key} of {own}", clipping[key], ("norm", "value"))
    plain = {key: options[key] for key in options if key in OPTIMIZER_KEYS}
    return Named(name, read_optimizers(plain, task_name, name), int(every), clipping)
