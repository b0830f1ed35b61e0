"""Seeding a random generator without waiting for what the device has still to compute.

OneFlow 0.9's ``manual_seed`` waits until all that was handed over is done, for the device draws
from a generator in its turn. Of a CPU generator the Mersenne Twister is 625 words in memory, and
tensors can share theirs: here the words that follow from a seed are copied into it as one tensor
into another, which the device does in its turn, too. What is drawn then is the same.
"""

from __future__ import annotations

import os
from typing import Any, List, NamedTuple, Optional

import numpy as np
import oneflow as flow

from ofengine._oneflow.operators import write_into

_STATE = 624
_WORDS = _STATE + 1
"""Of a twister: its state, and how many words of that are used up."""
_OBJECT = 2
"""Where Python's generator has the address of OneFlow's, in words; as all that follow."""
_SEED, _DEVICE, _TWISTER = 1, 7, 8
"""Where a generator has these; the last two if it is one device's."""
_CPU = 1
"""What is there of a device, if it is a CPU."""
_FIRST, _COUNT = 9, 10
"""Where an "auto" one has the first of its parts, one for each device, and their number."""
_OF_PART = 2
"""Where a part has its generator."""


class GeneratorSeeds:
    """Seeds ``generator`` in the turn of the device ``"cpu"``, which alone draws from it.

    Where it has drawn on another kind of device too, on none yet, or is not as OneFlow 0.9 makes
    it, ``manual_seed`` does it.
    """

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self._found: Optional[_Found] = None
        bits = np.random.MT19937(0)
        self._fresh = np.random.RandomState(bits)
        self._state = _memory(bits.ctypes.state_address, "<u4", _STATE, bits)

    def seed(self, seed: int) -> None:
        """What ``manual_seed`` does, for a seed from 0 to 2**63 - 1."""
        self._fresh.seed(seed % 2**32)  # a twister takes no more of it
        words = np.empty(_WORDS, np.int64)
        words[:_STATE], words[_STATE] = self._state, _STATE
        found = self._found
        if found is not None and (found.parts is None or found.parts[0] == 1):
            write_into(found.twister, flow.from_numpy(words))
            for each in found.seeds:
                each[0] = seed
            return
        self._generator.manual_seed(seed)
        try:
            self._found = _find(self._generator, seed, words)
        except OSError:
            self._found = None


class _Found(NamedTuple):
    """Where in memory a generator has what a seed changes."""

    twister: Any
    """As a tensor."""
    seeds: List[np.ndarray]
    parts: Optional[np.ndarray]
    """How many devices have a part of it; None where it is one device's."""


def _find(generator: Any, seed: int, words: np.ndarray) -> Optional[_Found]:
    """Look where OneFlow 0.9 has what a ``generator`` consists of that was just seeded.

    None where these ``words`` of its twister are not there. Raises :class:`OSError` where no
    memory is.
    """
    whole = part = _read(_read(id(generator) + 8 * _OBJECT))
    parts = None
    if generator.device.type == "auto":
        if _read(whole + 8 * _COUNT) != 1:
            return None
        parts = _memory(whole + 8 * _COUNT, "<i8", 1, generator)
        part = _read(_read(whole + 8 * _FIRST) + 8 * _OF_PART)
    at, seeds = part + 8 * _TWISTER, [each + 8 * _SEED for each in (whole, part)]
    found = [_bytes(at, 8 * _WORDS), _read(part + 8 * _DEVICE), *map(_read, seeds)]
    if found != [words.tobytes(), _CPU, seed, seed]:
        return None
    twister = flow.from_numpy(_memory(at, "<i8", _WORDS, generator))
    return _Found(twister, [_memory(each, "<i8", 1, generator) for each in seeds], parts)


class _Memory:
    """So many numbers in memory that ``owner`` keeps; who looks at them keeps the owner."""

    def __init__(self, address: int, typestr: str, count: int, owner: Any) -> None:
        self.__array_interface__ = {
            "data": (address, False), "typestr": typestr, "shape": (count,), "version": 3,
        }  # fmt: skip
        self.owner = owner


def _memory(address: int, typestr: str, count: int, owner: Any) -> np.ndarray:
    return np.asarray(_Memory(address, typestr, count, owner))


def _read(address: int) -> int:
    return int.from_bytes(_bytes(address, 8), "little")


def _bytes(address: int, count: int) -> bytes:
    """What is in memory; :class:`OSError` where none is, or where a system cannot tell."""
    file = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        return os.pread(file, count, address)
    except OverflowError as error:
        raise OSError("no address") from error
    finally:
        os.close(file)
