"""A task made again with the hyper-parameters of a checkpoint: what it is called with, checked."""

from __future__ import annotations

import inspect
from typing import Any, Dict, List, Mapping, Type, TypeVar

from ofengine.checkpoint.file import Checkpoint
from ofengine.checkpoint.hparams_restored import restored_hparams, takes, takes_by_name
from ofengine.errors import CheckpointError, UnknownArgumentError, quoted
from ofengine.run.lightning_methods import METHOD_ARGUMENTS
from ofengine.run.settings import refuse_arguments

T = TypeVar("T")

_NAME = "load_from_checkpoint"
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def made_again(cls: Type[T], checkpoint: Checkpoint, given: Mapping[str, Any]) -> T:
    """An object of ``cls``, by what ``checkpoint`` keeps and by the arguments ``given``."""
    state, where = checkpoint.state, str(checkpoint.path)
    kept = {} if state is None else state.get("hparams", {})
    arguments = {**restored_hparams(kept, cls, given, where), **given}
    _refuse_missing(cls, arguments, where)
    return cls(**arguments)


def refuse_unknown(cls: type, given: Mapping[str, Any]) -> None:
    """Raise :class:`UnknownArgumentError` where ``cls`` is not made with what is ``given``.

    Arguments of Lightning's ``load_from_checkpoint`` are refused even where ``__init__`` takes any
    name, unless it, or that of a base, has one of that name.
    """
    of_lightning = [name for name in given if name in METHOD_ARGUMENTS[_NAME]]
    refuse_arguments(_NAME, [name for name in of_lightning if not takes_by_name(cls, name)])
    for name in given:
        if not takes(cls, name):
            raise UnknownArgumentError(
                f"{cls.__name__}.{_NAME} was given {name!r}, which {cls.__name__}.__init__ does "
                f"not take: it takes {quoted(sorted(_parameters(cls)), most=20)}."
            )


def _refuse_missing(cls: type, arguments: Mapping[str, Any], where: str) -> None:
    missing: List[str] = [
        name
        for name, parameter in _parameters(cls).items()
        if parameter.default is parameter.empty and name not in arguments
    ]
    if missing:
        call = ", ".join(f"{name}=..." for name in missing)
        raise CheckpointError(
            f"{where} does not hold {quoted(missing, most=20)}, which {cls.__name__}.__init__ "
            "needs: let it call save_hyperparameters() before training, or give "
            f"{'it' if len(missing) == 1 else 'them'}, as in {cls.__name__}.{_NAME}(path, {call})."
        )


def _parameters(cls: type) -> Dict[str, inspect.Parameter]:
    """What ``__init__`` takes by name, without ``self``."""
    init: Any = cls.__init__  # type: ignore[misc]
    parameters = list(inspect.signature(init).parameters.items())[1:]
    return {name: each for name, each in parameters if each.kind in _BY_NAME}
