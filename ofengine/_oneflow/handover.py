"""How worker processes hand their batches over: in memory that both sides have from the start.

OneFlow 0.9 makes a segment in /dev/shm for every tensor of every batch, which takes most of the
time of a batch that is ready, fails where a container has little of /dev/shm, and stays there for
good where a process is killed. Here each worker has one piece of memory without a name, a ring
that batches are written to and copied out of. What does not fit goes OneFlow's way.
"""

from __future__ import annotations

import io
import itertools
import mmap
import multiprocessing
import pickle
import weakref
from multiprocessing.reduction import ForkingPickler
from typing import Any, Callable, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow
from oneflow.utils.data import get_worker_info

_MOST = 2**28
"""Bytes of a ring at most; only those that are written to take memory."""
_INLINE = 1024
"""Bytes of a tensor that go with the message."""
_ALIGNED = 512
"""Bytes that the addresses of OneFlow's tensors are multiples of."""
_keys = itertools.count()
_rings: weakref.WeakValueDictionary[int, _Ring] = weakref.WeakValueDictionary()


def empty(shape: Sequence[int], dtype: Any) -> Any:
    """An array where OneFlow would have put a tensor: the last bits of a sum may depend on it."""
    size = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
    room = np.empty(size + _ALIGNED, dtype=np.uint8)
    begin = -room.ctypes.data % _ALIGNED
    return room[begin : begin + size].view(dtype).reshape(shape)


class HandsOver:
    """A ``collate_fn`` for workers: what ``own`` makes of samples, ready to be sent.

    Args:
        own: the loader's.
        workers: how many worker processes there will be.
        ahead: how many batches each of them has ready.
    """

    def __init__(self, own: Callable[[Any], Any], workers: int, ahead: int) -> None:
        self._own = own
        self._rings = [_Ring(ahead) for _ in range(workers)]

    def __call__(self, samples: Any) -> Any:
        batch = self._own(samples)
        return _Sent(self._rings[get_worker_info().id].packed(batch))


def hands_over(loader: Any) -> Callable[[Any], Any]:
    """``loader.collate_fn`` as its workers are to have it."""
    context = loader.multiprocessing_context or multiprocessing
    if context.get_start_method() != "fork":  # a started Python has no memory of this one
        return loader.collate_fn
    try:
        return HandsOver(loader.collate_fn, loader.num_workers, loader.prefetch_factor)
    except (OSError, MemoryError):  # a limit on addresses
        return loader.collate_fn


class _Sent:
    """A batch on its way: what arrives is the batch."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __reduce__(self) -> Any:
        return pickle.loads, (self._content,)


class _Ring:
    """Written by one worker, in order, and read by the main process in the same order.

    Positions count on and on. The reader tells up to which it has read; nobody waits.
    """

    def __init__(self, ahead: int) -> None:
        memory = mmap.mmap(-1, 64 + _MOST)
        self._freed = np.frombuffer(memory, np.uint64, 1)
        self._bytes = np.frombuffer(memory, np.uint8, _MOST, 64)
        self._ahead = ahead
        self._used = self._base = self._largest = 0
        self._size = _MOST
        self.key = next(_keys)
        _rings[self.key] = self

    def packed(self, batch: Any) -> bytes:
        """``batch`` as a message; its tensors are in the ring."""
        if int(self._freed[0]) == self._used:  # nothing is under way
            self._base = self._used
        self._resize()
        begun = self._used
        file = io.BytesIO()
        _Packs(file, self).dump(batch)
        self._largest = max(self._largest, self._used - begun)
        self._resize()
        return file.getvalue()

    def _resize(self) -> None:
        """Make it as long as the batches need, where all that it has stays where it is."""
        wanted = min(_MOST, self._largest * (self._ahead + 2)) or _MOST
        if self._used - self._base <= min(self._size, wanted):
            self._size = wanted

    def put(self, array: Any) -> Optional[Tuple[int, int]]:
        """Write ``array``: (where, the position behind it); None where there is no room."""
        length, begin = array.nbytes, self._used
        offset = (begin - self._base) % self._size
        if offset + length > self._size:  # not in one piece at the end
            begin, offset = begin + self._size - offset, 0
        end = begin + length + -length % 64
        if end - int(self._freed[0]) > self._size:
            self._largest = max(self._largest, length)
            return None
        self._bytes[offset : offset + length] = array.reshape(-1).view(np.uint8)
        self._used = end
        return offset, end

    def take(self, offset: int, into: Any, end: int) -> None:
        """Copy what is there, after which it may be written over."""
        into.reshape(-1).view(np.uint8)[:] = self._bytes[offset : offset + into.nbytes]
        self._freed[0] = end


class _Packs(ForkingPickler):
    def __init__(self, file: Any, ring: _Ring) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._ring = ring

    def reducer_override(self, each: Any) -> Any:
        if type(each) is not flow.Tensor or not each.is_local or each.requires_grad:
            return NotImplemented
        if each.device.type != "cpu" or not each.numel():
            return NotImplemented
        array = np.ascontiguousarray(each.numpy())
        shape, dtype = tuple(each.shape), array.dtype.str
        if array.nbytes <= _INLINE:
            return _of_bytes, (array.tobytes(), shape, dtype)
        place = self._ring.put(array)
        return (
            NotImplemented if place is None else (_of_ring, (self._ring.key, *place, shape, dtype))
        )


def _of_bytes(content: bytes, shape: Tuple[int, ...], dtype: str) -> Any:
    array = empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = np.frombuffer(content, np.uint8)
    return flow.from_numpy(array)


def _of_ring(key: int, offset: int, end: int, shape: Tuple[int, ...], dtype: str) -> Any:
    array = empty(shape, dtype)
    _rings[key].take(offset, array, end)
    return flow.from_numpy(array)
