"""Random generators: where they are, how far they have been used, and how to put them there.

OneFlow 0.9's ``Generator.get_state`` gives the 624 words of its Mersenne Twister, but not how
many of them are used up, and ``set_state`` always takes them for all used up. Here the position
is found by drawing four numbers and looking where the words give them, and put right by setting
the 624 words *before* these, from which the twister makes these, and drawing up to the position.
So a run can be continued at the very number where it stopped, without reseeding anything.
"""

from __future__ import annotations

import random
import types
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.optim import Optimizer

from ofengine._oneflow.session import synchronize
from ofengine.errors import CheckpointError

_Generator = type(flow.default_generator)
_WORDS = 624
_SHIFT = 397
_CPU_BYTES = 8 * _WORDS + 8
_DEPTH = 4
"""How far down in a dataloader attributes are looked at: sampler, dataset, transforms, ..."""
_PASSED_BY = (
    flow.Tensor, np.ndarray, nn.Module, Optimizer, type, types.ModuleType, types.FunctionType,
    types.MethodType, types.BuiltinFunctionType,
)  # fmt: skip

RandomState = Dict[str, Any]
"""The states of generators by where they are; arrays, numbers and texts, nested."""


def is_generator(value: Any) -> bool:
    """True for a generator object of OneFlow, numpy or Python."""
    kinds = (_Generator, np.random.Generator, np.random.RandomState, random.Random)
    return isinstance(value, kinds)


# ---------------------------------------------------------------------- all of a run


def global_states() -> RandomState:
    """The states of Python's, numpy's and OneFlow's global generators."""
    python = random.getstate()
    return {
        "python": {"words": np.array(python[1], dtype=np.uint32), "gauss": python[2]},
        "numpy": _numpy_state(np.random.get_state()),
        "oneflow": state_of(flow.default_generator),
    }


def set_global_states(states: RandomState) -> None:
    """Put the global generators where ``states`` says."""
    python = states["python"]
    words = tuple(int(word) for word in python["words"])
    random.setstate((3, words, python["gauss"]))
    np.random.set_state(_numpy_tuple(states["numpy"]))
    set_state_of(flow.default_generator, states["oneflow"])


def states_in(task: Optional[nn.Module], source: Any) -> RandomState:
    """The states of all generators that ``task``'s modules or a dataloader hold, by their place."""
    return {place: state_of(each) for place, each in find_generators(task, source)}


def set_states_in(task: Optional[nn.Module], source: Any, states: RandomState) -> List[str]:
    """Put these generators where ``states`` says; return the places that are not there now."""
    found = dict(find_generators(task, source))
    for place, state in states.items():
        if place in found:
            set_state_of(found[place], state)
    return [place for place in states if place not in found]


def find_generators(task: Optional[nn.Module], source: Any) -> Iterator[Tuple[str, Any]]:
    """(place, generator) for each generator that is an attribute, once, global ones left out."""
    seen: Set[int] = {id(flow.default_generator)}
    for name, module in task.named_modules() if task is not None else ():
        for attribute, value in vars(module).items():
            if is_generator(value) and id(value) not in seen:
                seen.add(id(value))
                yield f"task.{name}.{attribute}" if name else f"task.{attribute}", value
    yield from _walk("data", source, seen, _DEPTH)


def _walk(place: str, value: Any, seen: Set[int], depth: int) -> Iterator[Tuple[str, Any]]:
    if id(value) in seen:
        return
    if is_generator(value):
        seen.add(id(value))
        yield place, value
        return
    if isinstance(value, _PASSED_BY) or not hasattr(value, "__dict__"):
        return
    seen.add(id(value))
    for name, child in vars(value).items():
        children = child[:100] if isinstance(child, (list, tuple)) else [child]
        for index, each in enumerate(children if depth else []):
            suffix = f"[{index}]" if isinstance(child, (list, tuple)) else ""
            yield from _walk(f"{place}.{name}{suffix}", each, seen, depth - 1)


# ---------------------------------------------------------------------- one generator


def state_of(generator: Any) -> Dict[str, Any]:
    """Where ``generator`` stands, for :func:`set_state_of`; it stands there afterwards too."""
    if isinstance(generator, np.random.Generator):
        return {"numpy": generator.bit_generator.state}
    if isinstance(generator, np.random.RandomState):
        return {"numpy": _numpy_state(generator.get_state())}
    if isinstance(generator, random.Random):
        version, words, gauss = generator.getstate()
        return {"words": np.array(words, dtype=np.uint32), "gauss": gauss, "version": version}
    synchronize()
    raw = np.array(generator.get_state().numpy())
    at = _cpu_part(raw)
    if at is None:
        return {"oneflow": raw}
    state = {"oneflow": raw, "position": _position(generator, raw[at : at + 8 * _WORDS])}
    set_state_of(generator, state)
    return state


def set_state_of(generator: Any, state: Dict[str, Any]) -> None:
    """Put ``generator`` where :func:`state_of` found one.

    Raises :class:`CheckpointError` where ``state`` is that of a generator of another kind.
    """
    try:
        _set_state(generator, state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the state of a random generator does not fit a {type(generator).__name__}: {error}."
        ) from error


def _set_state(generator: Any, state: Dict[str, Any]) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state["numpy"]
        return
    if isinstance(generator, np.random.RandomState):
        generator.set_state(_numpy_tuple(state["numpy"]))
        return
    if isinstance(generator, random.Random):
        words = tuple(int(word) for word in state["words"])
        generator.setstate((state["version"], words, state["gauss"]))
        return
    raw = np.array(state["oneflow"], dtype=np.uint8)
    position = state.get("position", _WORDS)
    at = _cpu_part(raw)
    if at is not None and position < _WORDS:
        part = slice(at, at + 8 * _WORDS)
        before = _words_before(raw[part].view(np.int64).astype(np.uint32))
        raw[part] = before.astype(np.int64).view(np.uint8)
    synchronize()
    generator.set_state(flow.tensor(raw))
    if at is not None and position < _WORDS:
        if position:
            flow.rand(position, generator=generator)
        else:
            # The words must be made of the ones before without one being used: not possible by
            # drawing, and a position that no drawing leaves behind.
            raise ValueError("a twister that is made anew has no used word")
    synchronize()


def _numpy_state(state: Any) -> Dict[str, Any]:
    name, words, position, has_gauss, gauss = state
    return {
        "name": name, "words": np.array(words), "position": int(position),
        "has_gauss": int(has_gauss), "gauss": float(gauss),
    }  # fmt: skip


def _numpy_tuple(state: Dict[str, Any]) -> Any:
    words = np.array(state["words"], dtype=np.uint32)
    return state["name"], words, state["position"], state["has_gauss"], state["gauss"]


# ---------------------------------------------------------------------- OneFlow's twister


def _cpu_part(raw: np.ndarray) -> Optional[int]:
    """Where in the bytes of a generator's state the CPU's part begins; None where it has none.

    A CPU generator has 624 words of 8 bytes and its seed. An "auto" generator has its seed, the
    number of devices that drew from it, the lengths of their names and of their states, these
    states' lengths one by one, the names, the states.
    """
    if raw.size == _CPU_BYTES:
        return 0
    if raw.size < 32:
        return None
    _, devices, names_length, _ = raw[:32].view(np.int64).tolist()
    start = 32 + 8 * devices
    if not 0 < devices < 100 or start + names_length > raw.size:
        return None
    lengths = raw[32:start].view(np.int64).tolist()
    names = bytes(raw[start : start + names_length]).decode(errors="replace").split(",")
    at = start + names_length
    for name, length in zip(names, lengths):
        if name.startswith("cpu") and length == _CPU_BYTES:
            return at
        at += length
    return None


def _position(generator: Any, words: np.ndarray) -> int:
    """How many of the twister's ``words`` are used up, found by drawing."""
    twister = np.random.MT19937()
    state: Any = twister.state
    state["state"] = {"key": words.view(np.int64).astype(np.uint32), "pos": 0}
    twister.state = state
    following = _as_uniform(twister.random_raw(_WORDS + 4))
    drawn = flow.rand(4, generator=generator).numpy()
    here = [
        position
        for position in np.flatnonzero(following[: _WORDS + 1] == drawn[0]).tolist()
        if (following[position : position + 4] == drawn).all()
    ]
    if len(here) != 1:
        raise CheckpointError("the position of a random generator of OneFlow was not found.")
    return int(here[0])


def _as_uniform(words: np.ndarray) -> np.ndarray:
    """What ``oneflow.rand`` makes of 32-bit words: C++'s uniform_real_distribution<float>."""
    numbers = words.astype(np.float32) / np.float32(2**32)
    return np.where(numbers >= 1, np.nextafter(np.float32(1), np.float32(0)), numbers)


def _words_before(words: np.ndarray) -> np.ndarray:
    """The 624 words from which the Mersenne Twister makes ``words``.

    Matsumoto and Nishimura's recurrence, solved for its inputs from the last word to the first.
    Of the first word only the highest bit matters, and only that is right.
    """
    state = [int(word) for word in words]

    def unmixed(value: int) -> Tuple[int, int]:
        odd = value >> 31  # the constant that is mixed in for odd words has the highest bit set
        return ((value ^ 0x9908B0DF) if odd else value) << 1 & 0xFFFFFFFF, odd

    for i in range(_WORDS - 1, -1, -1):
        high, _ = unmixed(state[i] ^ state[(i + _SHIFT) % _WORDS])
        low, odd = unmixed(state[i - 1] ^ state[(i + _SHIFT - 1) % _WORDS])
        state[i] = high & 0x80000000 | low & 0x7FFFFFFF | odd
    return np.array(state, dtype=np.uint32)
