"""Settings: the Trainer's arguments, checked once, frozen."""

from __future__ import annotations

import difflib
import inspect
import logging
import os
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Tuple, Union

import attrs
import oneflow as flow

from ofengine.errors import ConfigurationError, UnknownArgumentError
from ofengine.launch.environment import World, read
from ofengine.ranks.shares import Share
from ofengine.run.arguments import (
    Limit,
    batches_between_validations,
    check_choice,
    check_clip,
    check_count,
    check_flag,
    check_limit,
    seconds_of,
)
from ofengine.run.devices import check_ranks, check_strategy, resolve_device
from ofengine.run.lightning import ARGUMENTS_ELSEWHERE, TRAINER_ARGUMENTS, mend_for
from ofengine.run.lightning_methods import METHOD_ARGUMENTS
from ofengine.run.precision import check_mixed, check_precision
from ofengine.run.windows import Accumulation, Windows, check_accumulation

log = logging.getLogger("ofengine")

MODES = ("eager", "graph")
LIMIT_OF_STAGE = {
    "train": "limit_train_batches",
    "validation": "limit_val_batches",
    "test": "limit_test_batches",
    "predict": "limit_predict_batches",
}


def _whole(least: int, words: str, most: float = float("inf")) -> Callable[[str, Any], int]:
    return lambda name, value: check_count(name, value, least, words, most)


def _one_of(*choices: str) -> Callable[[str, Any], str]:
    return lambda name, value: check_choice(name, value, choices)


def _or_none(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _interval(name: str, value: Any) -> Limit:
    batches_between_validations(value, 10**9)
    return value


def _batches(name: str, value: Any) -> int:
    if isinstance(value, bool):
        return int(value)
    if value == 0 and not isinstance(value, float):
        return 0
    return check_count(name, value, 1, "True, False or a number of batches")


def _folder(name: str, value: Any) -> str:
    if not isinstance(value, (str, Path, type(None))):
        raise ConfigurationError(f"{name}={value!r}: give the path of a folder.")
    return str(value or os.getcwd())


_FROM_ONE = "a whole number from 1 on"
_FROM_NOUGHT = _whole(0, "a whole number from 0 on")


def _devices(name: str, value: Any) -> int:
    if value == "auto":
        return 0
    return check_count(name, value, 1, '"auto" or a whole number of ranks on this machine')


CHECKS: Tuple[Tuple[str, Callable[[str, Any], Any]], ...] = (
    ("mode", _one_of(*MODES)),
    ("eval_mode", _or_none(_one_of(*MODES))),
    ("device", lambda name, value: resolve_device(value)),
    ("devices", _devices),
    ("num_nodes", _whole(1, _FROM_ONE)),
    ("strategy", check_strategy),
    ("sync_batchnorm", check_flag),
    ("precision", check_precision),
    ("max_steps", _whole(-1, "a number, -1 for any")),
    ("min_epochs", lambda name, value: 0 if value is None else _FROM_NOUGHT(name, value)),
    ("min_steps", lambda name, value: 0 if value is None else _FROM_NOUGHT(name, value)),
    ("max_time", lambda name, value: seconds_of(value)),
    ("max_epochs", _or_none(_whole(-1, "a whole number of epochs, or -1 for no limit"))),
    ("limit_train_batches", check_limit),
    ("limit_val_batches", check_limit),
    ("limit_test_batches", check_limit),
    ("limit_predict_batches", check_limit),
    ("val_check_interval", _interval),
    ("check_val_every_n_epoch", _whole(1, _FROM_ONE)),
    ("num_sanity_val_steps", _whole(-1, "a number of batches, or -1 for all")),
    ("log_every_n_steps", _whole(1, _FROM_ONE)),
    ("accumulate_grad_batches", check_accumulation),
    ("gradient_clip_val", lambda name, value: check_clip(value)),
    ("gradient_clip_algorithm", _one_of("norm", "value")),
    ("seed", _or_none(_whole(0, "a whole number from 0 to 2**63 - 1, or None", 2**63 - 1))),
    ("default_root_dir", _folder),
    ("restart_on_crash", _whole(0, "a whole number, 0 for never")),
    ("detect_anomaly", check_flag),
    ("profiler", _or_none(_one_of("simple"))),
    ("cpu_speedups", check_flag),
    ("overfit_batches", lambda name, value: check_limit(name, value) or None),
    ("enable_checkpointing", check_flag),
    ("enable_progress_bar", check_flag),
    ("enable_model_summary", check_flag),
    ("fast_dev_run", _batches),
)
"""Each argument and what makes of it the value below; what is not allowed, it says in words."""


@attrs.frozen(kw_only=True)
class Settings:
    """What a Trainer was told. The arguments are described in :class:`ofengine.Trainer`."""

    mode: str
    eval_mode: str
    device: flow.device
    devices: int
    """Ranks on each machine."""
    num_nodes: int
    strategy: str
    sync_batchnorm: bool
    precision: str
    """"32-true", "16-mixed" or "bf16-mixed"."""
    world: Optional[World]
    """This rank among all; None where one process is alone, or is to start the ranks."""
    max_epochs: int
    """-1 for no limit."""
    max_epochs_given: bool
    """False where nothing was said of how long to train."""
    max_steps: int
    """-1 for no limit."""
    min_epochs: int
    """0 for none."""
    min_steps: int
    """0 for none."""
    max_time: Optional[float]
    """In seconds."""
    limit_train_batches: Limit
    limit_val_batches: Limit
    limit_test_batches: Limit
    limit_predict_batches: Limit
    val_check_interval: Limit
    check_val_every_n_epoch: int
    num_sanity_val_steps: int
    log_every_n_steps: int
    accumulate_grad_batches: Accumulation
    """Batches of each rank, or from which epoch on so many."""
    gradient_clip_val: Optional[float]
    """None for no clipping."""
    gradient_clip_algorithm: str
    seed: Optional[int]
    default_root_dir: str
    restart_on_crash: int
    detect_anomaly: bool
    profiler: Optional[str]
    cpu_speedups: bool
    overfit_batches: Union[int, float, None]
    """None for not."""
    enable_checkpointing: bool
    enable_progress_bar: bool
    enable_model_summary: bool
    fast_dev_run: int
    """So many batches; 0 for not."""

    @classmethod
    def of(cls, arguments: Mapping[str, Any], unknown: Iterable[str] = ()) -> Settings:
        """Check ``arguments``, by name, and fill in what depends on others.

        Raises :class:`ConfigurationError` for what is wrong and for any name that is ``unknown``,
        :class:`DeviceError` for a device that is not there.
        """
        known = [*(name for name, _ in CHECKS), "callbacks", "logger"]
        refuse_arguments("Trainer", unknown, known, ARGUMENTS_ELSEWHERE)
        values: Dict[str, Any] = {name: check(name, arguments[name]) for name, check in CHECKS}
        values["max_epochs_given"] = True
        if values["eval_mode"] is None:
            values["eval_mode"] = values["mode"]
        if values["fast_dev_run"]:
            values.update(dict.fromkeys(LIMIT_OF_STAGE.values(), values["fast_dev_run"]))
            values.update(max_epochs=1, max_steps=-1, num_sanity_val_steps=0)
            values.update(min_epochs=0, min_steps=0)
            values.update(val_check_interval=None, check_val_every_n_epoch=1)
            values["enable_checkpointing"] = False
        elif values["max_epochs"] is None:
            limited = values["max_steps"] != -1 or values["max_time"] is not None
            values["max_epochs"] = -1 if limited else 1000
            values["max_epochs_given"] = limited
        for what in ("epochs", "steps"):
            least, most = values[f"min_{what}"], values[f"max_{what}"]
            if most != -1 and least > most:
                raise ConfigurationError(
                    f"min_{what}={least} is more than max_{what}={most}: training ends at the "
                    "latter."
                )
        values["world"] = world = read()
        check_ranks(values, world)
        check_mixed(values)
        return cls(**values)

    @property
    def world_size(self) -> int:
        """How many ranks train together."""
        return self.devices * self.num_nodes

    @property
    def share(self) -> Optional[Share]:
        """Which of the batches are this rank's; None where they all are."""
        return None if self.world is None else Share(self.world.rank, self.world.world_size)

    @property
    def windows(self) -> Windows:
        """How many batches, of all ranks together, an optimizer step averages."""
        return Windows.of(self.accumulate_grad_batches, self.world_size)

    @property
    def accumulates(self) -> bool:
        """True where an optimizer step averages several batches of each rank in some epoch."""
        return Windows.of(self.accumulate_grad_batches).most > 1

    def accumulate_in(self, epoch: int) -> int:
        """How many batches of each rank an optimizer step averages in ``epoch``."""
        return Windows.of(self.accumulate_grad_batches).at(epoch)

    def limit(self, stage: str) -> Limit:
        """How many batches of ``stage`` ("train", "validation", "test", "predict") are used."""
        limit: Limit = getattr(self, LIMIT_OF_STAGE[stage])
        return limit

    def total_steps(self, batches: Optional[int]) -> Optional[int]:
        """The optimizer steps of a ``fit`` whose epochs have ``batches``, those of all ranks.

        None where that is not known.
        """
        totals = [self.max_steps] if self.max_steps >= 0 else []
        if self.max_epochs >= 0 and batches is not None:
            totals.append(self.windows.steps(batches, self.max_epochs))
        return min(totals) if totals else None


def refuse_arguments(
    owner: str,
    unknown: Iterable[str],
    known: Iterable[str] = (),
    elsewhere: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Raise :class:`UnknownArgumentError` for a name that ``owner``, Trainer or a method, lacks.

    ``known`` are the names that it has, if they are to be told; ``elsewhere`` are names that
    something else takes, with what to write.
    """
    for name in unknown:
        table = METHOD_ARGUMENTS.get(owner, TRAINER_ARGUMENTS)
        mend = mend_for(table, name) or mend_for(elsewhere, name)
        if mend is None:
            close = difflib.get_close_matches(name, known, n=1)
            others = f"use one of {', '.join(sorted(known))}." if known else "leave it out."
            mend = f"did you mean {close[0]!r}?" if close else others
            raise UnknownArgumentError(f"{owner} has no argument {name!r}: {mend}")
        raise UnknownArgumentError(f"{owner} has no argument {name!r}: {mend}.")


def arguments_of(function: Callable[..., Any]) -> List[str]:
    """The names of the arguments of a method, but for ``self`` and those that are let through."""
    parameters = inspect.signature(function).parameters
    return [name for name in parameters if name != "self" and not name.startswith("_")]
