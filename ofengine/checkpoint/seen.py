"""What hooks and steps change in plain attributes, which no checkpoint keeps: noticed, and told.

A checkpoint notes a digest of every attribute that has changed since training began: of the task,
of callbacks and of what the dataloaders hold. Where one is another after the run was resumed, the
user is told once what is missing, and where to keep it.
"""

from __future__ import annotations

import dis
import hashlib
import types
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Set, Tuple

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.nn.optimizer.lr_scheduler import LRScheduler
from oneflow.optim import Optimizer
from oneflow.optim.lr_scheduler import ReduceLROnPlateau
from oneflow.utils.data import DataLoader

from ofengine.callback import Callback, overrides
from ofengine.checkpoint.beside import digest_of, tensors_beside
from ofengine.data.generators import data_parts, has_state, is_generator
from ofengine.errors import warn
from ofengine.run.state import Run
from ofengine.task import TaskModule

_DEPTH = 3
_MOST_PARTS = 2_000
"""So many values of an attribute are looked at; of what is larger, its length."""
_MOST_BYTES = 2**22
_PASSED_BY = (
    type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType,
    Optimizer, DataLoader,
)  # fmt: skip
_SCHEDULERS = (LRScheduler, ReduceLROnPlateau)
_READERS = (
    nn.OFRecordReader,
    nn.OFRecordImageDecoderRandomCrop,
    nn.COCOReader,
    nn.CoinFlip,
    nn.GPTIndexedBinDataReader,
    nn.RawReader,
)
_OURS = ("ofengine.", "oneflow.")

Seen = Dict[str, str]
"""A digest of each attribute by place, as in ``"Counter.count"``."""


def attributes_seen(run: Run) -> Seen:
    """A digest of each plain attribute that a user's code may change."""
    return {place: digest for place, digest in _digests(run) if digest}


def changed_since_start(run: Run, tensors: Mapping[str, str]) -> Seen:
    """The attributes that have changed since training began, or had before it was resumed.

    ``tensors`` are digests of tensors of the task that a checkpoint leaves out.
    """
    now, begun = attributes_seen(run), run.seen_at_start
    changed = {
        place: digest
        for place, digest in now.items()
        if begun.get(place) != digest or place in run.changed_before
    }
    return {**changed, **_of_tensors(run, tensors)}


def _of_tensors(run: Run, digests: Mapping[str, str]) -> Seen:
    if overrides(run.task, "on_save_checkpoint", TaskModule):
        return {}
    name = type(run.task).__name__
    return {f"{name}.{place}": digest for place, digest in digests.items()}


def split_by_data(run: Run, kept: Seen) -> Tuple[Seen, Seen]:
    """What is no part of the data, and what is: that may change where a pass is begun."""
    *_, (_, names) = _ways(run)
    others = {place: digest for place, digest in kept.items() if not place.startswith(names)}
    return others, {place: kept[place] for place in kept if place not in others}


def tell_of_what_is_missing(
    run: Run, kept: Seen, lost: Sequence[str], where: str, within_epoch: bool
) -> None:
    """Warn of the attributes that were changed in the run before, and are not so now.

    Args:
        run: the run that goes on.
        kept: digests of the attributes that had changed, by place.
        lost: places of tensors in the task that could not be taken back.
        where: the checkpoint, as the sentence calls it.
        within_epoch: the run goes on in the middle of an epoch.
    """
    own = {place: digest_of(tensor) for place, tensor in tensors_beside(run.task).items()}
    now = {**attributes_seen(run), **_of_tensors(run, own)}
    hooks: Tuple[str, ...] = ("setup", "on_fit_start", "on_train_start", "on_train_batch_start")
    if not within_epoch:
        hooks += ("on_train_epoch_start",)
    made_anew = {place for hook in hooks for place in _made_by(run, hook)}
    missing = [place for place in kept if now.get(place) != kept[place]]
    missing += [f"{type(run.task).__name__}.{place}" for place in lost]
    missing = [place for place in missing if place not in made_anew]
    if not missing:
        return
    few = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    hook = " (on_train_epoch_start is not called again within an epoch)" if within_epoch else ""
    ways = [way for way, names in _ways(run) if any(place.startswith(names) for place in missing)]
    warn(
        f"{where} does not keep what training had made of {few}{hook}: put it into the checkpoint "
        f"in {'; or '.join(ways) or _WAY_OF_CALLBACKS}."
    )


def tell_of_readers(run: Run, where: str) -> None:
    """Warn of OneFlow's readers, whose place in their files nobody can tell or set."""
    name = type(run.task).__name__
    held = [(f"{name}.{place}", module) for place, module in run.task.named_modules()]
    loaders = [run.train] if run.train is not None else []
    for each in (*loaders, *run.validation):
        for _, owner in data_parts(each.source):
            held += [(f"{each.what}.{key}", value) for key, value in vars(owner).items()]
    readers = [place for place, module in held if isinstance(module, _READERS)]
    if readers:
        warn(
            f"{where} does not tell how far {', '.join(readers)} had read: this run begins its "
            "files anew. Make the reader in __iter__ of an iterable of batches, anew for "
            "each pass, and a resumed run is exact."
        )


def tell_of_other_batches(what: str) -> None:
    """Warn of data that comes in another order than before."""
    warn(
        f"{what} gives other batches in this epoch than before the run was stopped, so that it "
        "does not go on exactly: the data is another, or its sampler counts passes, or draws from "
        "a generator that is no attribute or that others draw from between its batches. A sampler "
        "can keep where it stands in state_dict and load_state_dict."
    )


_WAY_OF_CALLBACKS = "state_dict of the callback, and take it back in load_state_dict"


def _ways(run: Run) -> Iterator[Tuple[str, Tuple[str, ...]]]:
    """How whose state is kept, and how the places of theirs begin."""
    loaders = [run.train] if run.train is not None else []
    of_task = "on_save_checkpoint of the task, and take it back in on_load_checkpoint"
    of_data = "state_dict of the sampler or dataset, and take it back in load_state_dict"
    yield of_task, (f"{type(run.task).__name__}.",)
    yield _WAY_OF_CALLBACKS, tuple(f"{each.state_key}." for each in run.callbacks)
    yield of_data, tuple(f"{each.what}." for each in (*loaders, *run.validation))


# ---------------------------------------------------------------------- whose attributes


def _digests(run: Run) -> Iterator[Tuple[str, str]]:
    own = {id(each.made.optimizer) for each in run.each().values()}
    for place, owner in _owners(run):
        for name, value in list(vars(owner).items()):
            if isinstance(value, _SCHEDULERS) and id(value.optimizer) in own:
                continue  # the plan knows where it stands
            yield f"{place}.{name}", _digest(value)


def _owners(run: Run) -> Iterator[Tuple[str, Any]]:
    """(place, object) of all whose attributes nobody keeps."""
    task = run.task
    if not overrides(task, "on_save_checkpoint", TaskModule):
        for name, module in task.named_modules():
            if not type(module).__module__.startswith(_OURS):
                place = f"{type(task).__name__}.{name}" if name else type(task).__name__
                yield place, _Plain(module)
    for callback in run.callbacks:
        ours = type(callback).__module__.startswith(_OURS)
        if not ours and not overrides(callback, "state_dict", Callback):
            yield callback.state_key, callback
    loaders = [run.train] if run.train is not None else []
    for each in (*loaders, *run.validation):
        for place, owner in data_parts(each.source):
            ours = type(owner).__module__.startswith(_OURS)
            if not ours and not has_state(owner):
                yield f"{each.what}.{place}", owner


class _Plain:
    """The attributes of a module that are no parameters, buffers, tensors or modules."""

    def __init__(self, module: nn.Module) -> None:
        for name, value in vars(module).items():
            plain = not isinstance(value, (flow.Tensor, nn.Module))
            if plain and name not in _OF_MODULES:
                self.__dict__[name] = value


_OF_MODULES = {*vars(nn.Module()), "_trainer", "hparams", "_hparams_of_bases"}


# ---------------------------------------------------------------------- digests


def _digest(value: Any) -> str:
    """What tells ``value`` from others; "" where that cannot be told."""
    parts: List[bytes] = []
    try:
        told = _take_in(value, _DEPTH, parts, set())
    except Exception:  # somebody's object, which does as it likes
        return ""
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest() if told else ""


def _take_in(value: Any, depth: int, parts: List[bytes], seen: Set[int]) -> bool:
    """Add what tells ``value`` to ``parts``; False where nothing does."""
    if len(parts) > _MOST_PARTS:
        return True
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        parts.append(f"{type(value).__name__}:{value!r}".encode(errors="replace"))
        return True
    if isinstance(value, (np.ndarray, np.generic, flow.Tensor)):
        return _take_in_array(value, parts)
    if is_generator(value) or isinstance(value, _PASSED_BY) or id(value) in seen or not depth:
        return False
    seen.add(id(value))
    if isinstance(value, dict):
        children: List[Any] = [each for pair in value.items() for each in pair]
    elif isinstance(value, (list, tuple)) or type(value).__name__ == "deque":
        children = list(value)
    elif isinstance(value, (set, frozenset)):
        children = sorted(value, key=repr)
    elif isinstance(value, nn.Module):
        children = [*value.state_dict().values()]
    elif isinstance(value, _SCHEDULERS):
        own = {**vars(value), "optimizer": None, "step": None}
        children = [each for pair in sorted(own.items()) for each in pair]
    elif type(value).__module__.startswith(_OURS) or not hasattr(value, "__dict__"):
        return False
    else:
        children = [each for pair in sorted(vars(value).items()) for each in pair]
    parts.append(f"{type(value).__name__}:{len(children)}".encode())
    if len(children) > _MOST_PARTS:
        return True
    told = [_take_in(each, depth - 1, parts, seen) for each in children]
    return any(told) or not children


def _take_in_array(value: Any, parts: List[bytes]) -> bool:
    if isinstance(value, flow.Tensor):
        if value.is_lazy:
            return False
        value = value.numpy()
    parts.append(f"{value.dtype}{value.shape}".encode())
    if value.nbytes <= _MOST_BYTES and value.dtype != object:
        parts.append(value.tobytes())
    return True


# ---------------------------------------------------------------------- what a hook makes anew


def _made_by(run: Run, hook: str) -> Iterator[str]:
    """The places of attributes that ``hook`` of their owner sets before it reads them."""
    owners: List[Tuple[str, Any]] = [(type(run.task).__name__, run.task)]
    owners += [(each.state_key, each) for each in run.callbacks]
    for place, owner in owners:
        for name in _names_set(getattr(type(owner), hook, None), type(owner), 3):
            yield f"{place}.{name}"


def _names_set(function: Any, cls: type, depth: int) -> Set[str]:
    """The attributes of ``self`` that ``function``, or a method that it calls, sets first."""
    code = getattr(function, "__code__", None)
    if code is None or not depth:
        return set()
    read: Set[str] = set()
    made: Set[str] = set()
    steps = list(dis.get_instructions(code))
    for before, step in zip([None, *steps], steps):
        of_self = before is not None and before.argval == "self"
        if of_self and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            method = getattr(cls, str(step.argval), None)
            if isinstance(method, types.FunctionType):
                made |= _names_set(method, cls, depth - 1) - read
            elif step.argval not in made:
                read.add(str(step.argval))
        elif of_self and step.opname == "STORE_ATTR":
            made.add(str(step.argval))
    return made - read
