"""The mend of a race in OneFlow 0.9.0 at the start of a graph's run, of which processes die."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import platform
import struct
import sys
import threading
from typing import Dict, Iterator, Optional, Tuple

import oneflow as flow

from ofengine._oneflow.library import address_of, liboneflow, loaded_from
from ofengine._oneflow.machine_code import PAGE, load_code, protect
from ofengine._oneflow.session import synchronize

log = logging.getLogger("ofengine")

# OneFlow 0.9.0 notes that a graph's run is in flight (EnqueueNNGraph) after it has started the
# run. Where the run ends before that, DequeueNNGraph pops from an empty std::queue, and the
# process dies of it sooner or later. Below, the run is counted before it is started instead:
# the three functions of the queue are replaced in memory by the same logic over a counter.
# Each of them is called from one place, through the PLT, and there is one queue a process.
_QUEUE = "_ZN7oneflow2vm19LazyJobStreamPolicy"
_WAIT = _QUEUE + "42WaitUntilQueueEmptyIfFrontNNGraphNotEqualsERKSt10shared_ptrINS_9NNGraphIfEE"
_ENQUEUE = _QUEUE + "14EnqueueNNGraphERKSt10shared_ptrINS_9NNGraphIfEE"
_DEQUEUE = _QUEUE + "14DequeueNNGraphEv"
_BUILD_ID = "86d122c0ae188a5409d042af2a0b45d794ab6810"
"""The liboneflow of OneFlow 0.9.0: the wheels for CPython 3.8, 3.9 and 3.10 have the same one."""
_PT_NOTE, _NT_GNU_BUILD_ID = 4, 3
_DEQUEUE_AT = 0x80
_launch_race: Optional[str] = None
_told = False
_launch_race_lock = threading.Lock()


def mend_launch_race() -> str:
    """Mend the race of OneFlow 0.9.0 at the start of a graph's run; "mended", or why not.

    Done once a process, all of it or nothing, and only to the very binary it was written for, which
    its build id tells. ``OFENGINE_MEND_LAUNCH=0`` leaves it out.
    """
    global _launch_race
    with _launch_race_lock:
        if _launch_race is None:
            if os.environ.get("OFENGINE_MEND_LAUNCH") == "0":
                _launch_race = "left out by OFENGINE_MEND_LAUNCH=0"
            elif flow.__version__ != "0.9.0" or (sys.platform, platform.machine()) != (
                "linux",
                "x86_64",
            ):
                _launch_race = "not for this version of OneFlow or this machine"
            else:
                try:
                    _launch_race = _mend_launch_race()
                except (OSError, ValueError) as error:
                    _launch_race = f"not possible here: {error}"
        return _launch_race


def mend_or_tell() -> None:
    """Mend the race; where that is not done, say so, once a process."""
    global _told
    found = mend_launch_race()
    if found != "mended" and not _told:
        _told = True
        log.warning(
            "OneFlow's race at the start of a graph's run is not mended (%s): on a busy machine, "
            "graph steps of less than a millisecond may crash. Trainer(restart_on_crash=3) goes "
            "on after that.", found,
        )  # fmt: skip


def _mend_launch_race() -> str:
    library = ctypes.CDLL(liboneflow())
    at = {name: address_of(library, name) for name in (_WAIT, _ENQUEUE, _DEQUEUE)}
    if _build_id(at[_WAIT]) != _BUILD_ID:
        return "not possible here: liboneflow is not the one this was written for"
    wait, dequeue = _load_queue_code()
    synchronize()  # no run may be in flight
    _overwrite({at[_WAIT]: _jump_to(wait), at[_DEQUEUE]: _jump_to(dequeue), at[_ENQUEUE]: _RETURN})
    return "mended"


def _build_id(address: int) -> str:
    """The build id, in hex, of the library in memory that has ``address``; "" where it has none."""
    try:
        _, base = loaded_from(address)
    except OSError:
        return ""
    headers, size, count = struct.unpack("<32xQ14xHH", ctypes.string_at(base, 58))
    for number in range(count):
        header = ctypes.string_at(base + headers + number * size, 48)
        kind, start, length = struct.unpack("<I12xQ16xQ", header)
        if kind == _PT_NOTE:
            for owner, note, content in _notes(ctypes.string_at(base + start, length)):
                if (owner, note) == (b"GNU\0", _NT_GNU_BUILD_ID):
                    return content.hex()
    return ""


def _notes(data: bytes) -> Iterator[Tuple[bytes, int, bytes]]:
    """(owner, kind, content) of each of the notes of an ELF file."""
    at = 0
    while at + 12 <= len(data):
        owner, content, kind = struct.unpack_from("<III", data, at)
        name_at = at + 12
        content_at = name_at + (owner + 3) // 4 * 4
        at = content_at + (content + 3) // 4 * 4
        yield data[name_at : name_at + owner], kind, data[content_at : content_at + content]


def _load_queue_code() -> Tuple[int, int]:
    """Put :func:`_queue_code` into memory; the addresses of its two functions."""
    wait, dequeue = _queue_code()
    base = load_code(wait.ljust(_DEQUEUE_AT, b"\xcc") + dequeue)
    return base, base + _DEQUEUE_AT


def _queue_code() -> Tuple[bytes, bytes]:
    """x86-64 code of "wait for the other graph's runs, then count mine" and "count it off".

    The second page holds the graph launched last (8 bytes), the runs in flight (4 bytes) and
    whether somebody sleeps until there are none (4 bytes). The code uses only registers that a
    function may use freely, r8 and r9 because a system call leaves them alone. Each sleeper
    says so before the kernel compares the count, each run is counted off before it looks for
    sleepers, both by locked instructions: a sleeper is woken, or the kernel lets it not sleep.
    """

    def data_from(offset: int) -> bytes:
        return struct.pack("<i", PAGE - offset)

    sleep = b"\xb8\x01\x00\x00\x00\x41\x87\x41\x0c"  # mov eax, 1; xchg [r9+12], eax
    sleep += b"\x49\x8d\x79\x08"  # lea rdi, [r9+8]
    sleep += b"\xbe\x80\x00\x00\x00"  # mov esi, 128         FUTEX_WAIT_PRIVATE
    sleep += b"\x45\x31\xd2"  # xor r10d, r10d        no timeout
    sleep += b"\xb8\xca\x00\x00\x00\x0f\x05"  # mov eax, 202; syscall while [rdi] is edx
    wait = b"\x4c\x8b\x06"  # mov r8, [rsi]          the graph to launch
    wait += b"\x4c\x8d\x0d" + data_from(len(wait) + 7)  # lea r9, [data]
    loop = len(wait)
    wait += b"\x4d\x3b\x01"  # cmp r8, [r9]
    wait += b"\x74" + struct.pack("b", 10 + len(sleep))  # je ready     launched last as well
    wait += b"\x41\x8b\x51\x08\x85\xd2"  # mov edx, [r9+8]; test edx, edx
    wait += b"\x7e" + struct.pack("b", 2 + len(sleep))  # jle ready    none in flight
    wait += sleep
    wait += b"\xeb" + struct.pack("b", loop - len(wait) - 2)  # jmp loop
    wait += b"\x4d\x89\x01"  # ready: mov [r9], r8
    wait += b"\x41\xc7\x41\x0c\x00\x00\x00\x00"  # mov dword [r9+12], 0
    wait += b"\xf0\x41\xff\x41\x08\xc3"  # lock inc dword [r9+8]; ret
    wake = b"\x49\x8d\x79\x08"  # lea rdi, [r9+8]
    wake += b"\xbe\x81\x00\x00\x00\xba\x01\x00\x00\x00"  # mov esi, 129 (WAKE_PRIVATE); mov edx, 1
    wake += b"\xb8\xca\x00\x00\x00\x0f\x05"  # mov eax, 202; syscall
    dequeue = b"\x4c\x8d\x0d" + data_from(_DEQUEUE_AT + 7)  # lea r9, [data]
    dequeue += b"\xf0\x41\xff\x49\x08"  # lock dec dword [r9+8]
    dequeue += b"\x75" + struct.pack("b", 7 + len(wake))  # jnz done    others are in flight
    dequeue += b"\x41\x83\x79\x0c\x00"  # cmp dword [r9+12], 0
    dequeue += b"\x74" + struct.pack("b", len(wake))  # je done     nobody sleeps
    dequeue += wake + _RETURN
    return wait, dequeue


_RETURN = b"\xc3"  # ret


def _jump_to(address: int) -> bytes:
    return b"\x48\xb8" + struct.pack("<Q", address) + b"\xff\xe0"  # mov rax, address; jmp rax


def _overwrite(codes: Dict[int, bytes]) -> None:
    """Write each code to its address: all of them, or none where an OSError is raised.

    A copy of their pages is changed, and moved to their place when it is finished. So they are
    never writable, and no failure and no other thread finds them half written.
    """
    start = min(codes) // PAGE * PAGE
    end = max(address + len(code) for address, code in codes.items())
    length = (end - start + PAGE - 1) // PAGE * PAGE
    copy = _map_new(length)
    try:
        ctypes.memmove(copy, start, length)
        for address, code in codes.items():
            ctypes.memmove(copy + address - start, code, len(code))
        protect(copy, length, mmap.PROT_READ | mmap.PROT_EXEC)
        _move(copy, start, length)
    except BaseException:
        _libc.munmap(ctypes.c_void_p(copy), ctypes.c_size_t(length))
        raise


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_FAILED = ctypes.c_void_p(-1).value
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2


def _map_new(length: int) -> int:
    """New pages that can be written, and belong to nothing in Python."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    at = _libc.mmap(None, ctypes.c_size_t(length), protection, flags, -1, ctypes.c_long(0))
    if at == _FAILED:
        raise OSError(ctypes.get_errno(), "memory cannot be had")
    return int(at)


def _move(pages: int, to: int, length: int) -> None:
    """Put ``pages`` in the place of those at ``to``, in one system call."""
    size, flags = ctypes.c_size_t(length), _MREMAP_MAYMOVE | _MREMAP_FIXED
    if _libc.mremap(ctypes.c_void_p(pages), size, size, flags, ctypes.c_void_p(to)) == _FAILED:
        raise OSError(ctypes.get_errno(), "code cannot be put in the place of other code")
