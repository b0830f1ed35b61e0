"""One random generator: where it stands, how it is put there, whether a state is one at all.

OneFlow 0.9's ``Generator.get_state`` gives the 624 words of its Mersenne Twister, but not how
many of them are used up, and ``set_state`` always takes them for all used up. Here the position
is found by drawing four numbers and looking where the words give them, and put right by setting
the 624 words *before* these, from which the twister makes these, and drawing up to the position.
So a run can be continued at the very number where it stopped, without reseeding anything.
Reading a state and setting one wait for all that OneFlow has been handed.
"""

from __future__ import annotations

import random
from typing import Any, Dict, Mapping, Optional, Tuple

import numpy as np
import oneflow as flow

from ofengine.errors import CheckpointError, said_by
from ofengine.run.devices import why_unusable

_Generator = type(flow.default_generator)
_WORDS = 624
_SHIFT = 397
_CPU_BYTES = 8 * _WORDS + 8
_WRONG = (KeyError, IndexError, TypeError, ValueError, ArithmeticError, AttributeError)

RandomState = Dict[str, Any]
"""The state of a generator, or of several by where they are: arrays, numbers, texts, nested."""


def is_generator(value: Any) -> bool:
    """True for a generator object of OneFlow, numpy or Python."""
    kinds = (_Generator, np.random.Generator, np.random.RandomState, random.Random)
    own_state = not isinstance(value, random.SystemRandom)  # the system has its own
    return isinstance(value, kinds) and own_state


def state_of(generator: Any) -> RandomState:
    """Where ``generator`` stands, for :func:`set_state_of`; it stands there afterwards too."""
    if isinstance(generator, np.random.Generator):
        return {"numpy": generator.bit_generator.state}
    if isinstance(generator, np.random.RandomState):
        return {"numpy": numpy_state(generator.get_state())}
    if isinstance(generator, random.Random):
        version, words, gauss = generator.getstate()
        return {"words": np.array(words, dtype=np.uint32), "gauss": gauss, "version": version}
    raw = np.array(generator.get_state().numpy())
    at = _cpu_part(raw)
    if at is None:
        return {"oneflow": raw}
    state = {"oneflow": raw, "position": _position(generator, raw[at : at + 8 * _WORDS])}
    set_state_of(generator, state)
    return state


def set_state_of(generator: Any, state: Mapping[str, Any]) -> None:
    """Put ``generator`` where :func:`state_of` found one.

    Raises :class:`CheckpointError` where ``state`` is that of a generator of another kind.
    """
    try:
        _set_state(generator, state)
    except (*_WRONG, RuntimeError) as error:
        raise CheckpointError(
            "the state of a random generator does not fit a "
            f"{type(generator).__name__}: {said_by(error)}."
        ) from error


def seed_generator(generator: Any, seed: int) -> None:
    """Make what ``generator`` gives next a function of ``seed`` alone, from 0 to 2**31 - 1."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, (np.random.RandomState, random.Random)):
        generator.seed(seed)
    else:
        generator.manual_seed(seed)


def check_state_of(generator: Any, state: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` unless ``state`` can be that of ``generator``.

    Another generator of its kind is put there and asked where it stands; this one is left alone.
    """
    kind = type(generator).__name__
    try:
        _check_positions(state)
        another = _another(generator)
        _set_state(another, state)
        found = state_of(another)
        unused = "oneflow" in state and _is_unused(np.array(state["oneflow"]))
        good = unused or same_state(state, found)
    except (*_WRONG, RuntimeError, CheckpointError) as error:
        raise CheckpointError(
            f"the state of a random generator does not fit a {kind}: {said_by(error)}."
        ) from error
    if not good:
        raise CheckpointError(f"the state of a random generator is none that a {kind} can have.")


def check_state_anywhere(state: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` unless ``state`` can be that of some generator."""
    inner = state.get("numpy")
    if "state" in state:
        return  # of a sampler or dataset, which alone knows what it can be
    if isinstance(inner, Mapping):
        kinds = {each.__name__: each for each in _BIT_GENERATORS}
        bits = kinds.get(str(inner.get("bit_generator")))
        old = np.random.RandomState(0)
        check_state_of(old if bits is None else np.random.Generator(bits(0)), state)
    elif "words" in state:
        check_state_of(random.Random(0), state)
    elif np.size(state.get("oneflow", ())) == _CPU_BYTES:
        check_state_of(flow.Generator("cpu"), state)
    elif "position" in state:  # as a dropout layer's, for any device
        check_state_of(flow.Generator("auto"), state)


_BIT_GENERATORS = (
    np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64,
)  # fmt: skip


def _another(generator: Any) -> Any:
    """A generator of the same kind, that nobody draws from."""
    if isinstance(generator, np.random.Generator):
        return np.random.Generator(type(generator.bit_generator)(0))
    if isinstance(generator, np.random.RandomState):
        return np.random.RandomState(0)
    if isinstance(generator, random.Random):
        return random.Random(0)
    if _is_cpu(generator):
        return flow.Generator("cpu")
    another = flow.Generator("auto")
    another.set_state(generator.get_state())  # the parts of the devices that have drawn from it
    return another


def _is_cpu(generator: Any) -> bool:
    """True where OneFlow's ``generator`` is a CPU's alone. To look at its state would cost ms."""
    return bool(generator.device.type == "cpu")


def _check_positions(state: Any) -> None:
    """Refuse places outside of a generator's words: numpy would read what lies behind them."""
    if not isinstance(state, Mapping):
        return
    for key, value in state.items():
        if isinstance(value, Mapping):
            _check_positions(value)
        elif key in ("position", "pos", "buffer_pos"):
            most = 4 if key == "buffer_pos" else _WORDS
            if type(value) is not int or not 0 <= value <= most:
                raise ValueError(f"{key} is no whole number from 0 to {most}")


def same_state(ours: Any, theirs: Any) -> bool:
    """Equal in kind, shape and number, nested."""
    if isinstance(ours, np.ndarray) or isinstance(theirs, np.ndarray):
        arrays = isinstance(ours, np.ndarray) and isinstance(theirs, np.ndarray)
        return arrays and ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        # Python's global generator is kept without its version.
        keys = set(ours) | {"version"} == set(theirs) | {"version"}
        return keys and all(same_state(ours[key], theirs[key]) for key in set(ours) & set(theirs))
    return type(ours) is type(theirs) and bool(ours == theirs)


def _set_state(generator: Any, state: Mapping[str, Any]) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state["numpy"]
        return
    if isinstance(generator, np.random.RandomState):
        generator.set_state(numpy_tuple(state["numpy"]))
        return
    if isinstance(generator, random.Random):
        words = tuple(int(word) for word in state["words"])
        generator.setstate((state.get("version", 3), words, state["gauss"]))
        return
    raw = np.array(state["oneflow"])
    _check_bytes(raw, _is_cpu(generator))
    position = state.get("position", _WORDS)
    at = _cpu_part(raw)
    if at is not None and position < _WORDS:
        part = slice(at, at + 8 * _WORDS)
        before = _words_before(raw[part].view(np.int64).astype(np.uint32))
        raw[part] = before.astype(np.int64).view(np.uint8)
    if _is_unused(raw):  # to which set_state would add the parts that are there now
        generator.manual_seed(int(raw[:8].copy().view(np.int64)[0]))
        return
    generator.set_state(flow.tensor(raw))
    if at is not None and position < _WORDS:
        if position:
            flow.rand(position, generator=generator)
        else:
            # The words must be made of the ones before without one being used: not possible by
            # drawing, and a position that no drawing leaves behind.
            raise ValueError("a twister that is made anew has no used word")


def _check_bytes(raw: np.ndarray, is_cpu: bool) -> None:
    """Raise ValueError unless OneFlow can take ``raw``: of others it reads what lies behind them.

    ``is_cpu``: for a CPU generator; else for an "auto" one.
    """
    if raw.dtype != np.uint8 or raw.ndim != 1 or (raw.size == _CPU_BYTES) is not is_cpu:
        raise ValueError(f"an array of {raw.dtype} with the shape {raw.shape} is no state of it")
    if not is_cpu:
        _check_parts(raw)
    at = _cpu_part(raw)
    if at is not None and raw[at : at + 8 * _WORDS].view(np.uint64).max() >= 2**32:
        raise ValueError("a word of the twister has more than 32 bits")


def _is_unused(raw: np.ndarray) -> bool:
    """True for an "auto" generator that nobody has drawn from: it has a seed and no parts."""
    return raw.size == 32


def _check_parts(raw: np.ndarray) -> None:
    """The parts of an "auto" generator's state, one for each device, see :func:`_cpu_part`."""
    header = raw[:32].copy().view(np.int64).tolist() if raw.size >= 32 else [0, -1, 0, 0]
    _, devices, names_length, states_length = header
    start = 32 + 8 * devices
    inside = 0 <= devices < 100 and 0 <= names_length < 10_000 and 0 <= states_length < 2**31
    if not inside or start + names_length + states_length != raw.size:
        raise ValueError("its parts do not have the lengths that it tells")
    lengths = raw[32:start].copy().view(np.int64).tolist()
    names = bytes(raw[start : start + names_length]).decode(errors="replace")
    known = {"cpu:0": _CPU_BYTES} if "cuda" not in names else _lengths_of_devices()
    for name, length in zip(names.split(",") if names else [], lengths):
        if name not in known:
            raise ValueError(f"it has a part for the device {name!r}, which is not here")
        if known[name] != length:
            raise ValueError(f"its part for {name} has {length} bytes, and not {known[name]}")
    if len(names.split(",") if names else []) != devices or sum(lengths) != states_length:
        raise ValueError("it does not have a part for each of its devices")


def _lengths_of_devices() -> Dict[str, int]:
    """The length of the state of a generator of each device of this machine that can have one."""
    usable = [each for each in range(flow.cuda.device_count()) if why_unusable(each) is None]
    names = [f"cuda:{index}" for index in usable]
    found = {name: int(flow.Generator(name).get_state().numel()) for name in names}
    return {**found, "cpu:0": _CPU_BYTES}


def numpy_state(state: Any) -> RandomState:
    """What ``RandomState.get_state`` gives, by name."""
    name, words, position, has_gauss, gauss = state
    return {
        "name": name, "words": np.array(words), "position": int(position),
        "has_gauss": int(has_gauss), "gauss": float(gauss),
    }  # fmt: skip


def numpy_tuple(state: Mapping[str, Any]) -> Any:
    """The inverse of :func:`numpy_state`."""
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
    if not 0 < devices < 100 or names_length < 0 or start + names_length > raw.size:
        return None
    lengths = raw[32:start].view(np.int64).tolist()
    names = bytes(raw[start : start + names_length]).decode(errors="replace").split(",")
    at = start + names_length
    for name, length in zip(names, lengths):
        if name.startswith("cpu") and length == _CPU_BYTES and at + length <= raw.size:
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
    state = words.astype(np.uint32)  # a copy
    constant, one = np.uint32(0x9908B0DF), np.uint32(1)

    def unmixed(value: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        odd = value >> np.uint32(31)  # the constant mixed in for odd words has the highest bit set
        return np.where(odd == one, value ^ constant, value) << one, odd

    # Those together that need nothing of each other, as they were or as they become.
    for first, stop in ((_WORDS - _SHIFT + 1, _WORDS), (_WORDS - _SHIFT, _WORDS - _SHIFT + 1),
                        (1, _WORDS - _SHIFT), (0, 1)):  # fmt: skip
        at = np.arange(first, stop)
        high, _ = unmixed(state[at] ^ state[(at + _SHIFT) % _WORDS])
        low, odd = unmixed(state[at - 1] ^ state[(at + _SHIFT - 1) % _WORDS])
        state[at] = high & np.uint32(0x80000000) | low & np.uint32(0x7FFFFFFF) | odd
    return state
