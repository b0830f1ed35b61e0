"""What DeviceStatsMonitor reads: of the process from ``/proc``, of a GPU from its driver."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

_MB = 1024 * 1024
_FIELDS = {"VmRSS": "memory_mb", "VmHWM": "peak_memory_mb", "Threads": "threads"}


class ProcessReadings:
    """The share of the CPUs that the process took since the last reading, its memory and threads.

    Args:
        proc: where the kernel tells of processes.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._clock, self._busy = time.perf_counter(), time.process_time()

    def read(self) -> Dict[str, float]:
        """The readings by name; those are left out that this system does not give."""
        clock, busy = time.perf_counter(), time.process_time()
        passed = clock - self._clock
        readings = {}
        if passed > 0:
            readings["cpu_percent"] = 100 * (busy - self._busy) / passed
        self._clock, self._busy = clock, busy
        for field, (count, unit) in self._fields("self/status").items():
            if field in _FIELDS:
                readings[_FIELDS[field]] = count / 1024 if unit == "kB" else count
        available = self._fields("meminfo").get("MemAvailable")
        if available is not None:
            readings["available_memory_mb"] = available[0] / 1024
        return readings

    def _fields(self, name: str) -> Dict[str, Any]:
        """The lines ``Name: number unit`` of a file."""
        try:
            text = (self._proc / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return {}
        found = {}
        for line in text.splitlines():
            field, _, rest = line.partition(":")
            words = rest.split()
            if words and words[0].isdecimal():
                found[field] = (float(words[0]), words[1] if words[1:] else "")
        return found


class _Utilization(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class _Memory(ctypes.Structure):
    _fields_ = [
        ("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong),
    ]  # fmt: skip


class GpuReadings:
    """How busy a GPU is, and how much of its memory is taken, by all processes.

    The driver's own library (NVML) is asked, in place of OneFlow, which does not tell.

    Args:
        index: the device's index in OneFlow.
        library: the library; default: the driver's.
    """

    def __init__(self, index: int, library: Any = None) -> None:
        self._library = library
        self._device = ctypes.c_void_p()
        if library is None:
            try:
                self._library = ctypes.CDLL("libnvidia-ml.so.1")
            except OSError:
                return
        if self._library.nvmlInit_v2() or not self._find(index):
            self._library = None

    def _find(self, index: int) -> bool:
        device = ctypes.byref(self._device)
        listed = _visible(os.environ.get("CUDA_VISIBLE_DEVICES"))
        if listed is None:
            return not self._library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), device)
        if index >= len(listed):
            return False
        if listed[index].isdecimal():
            number = ctypes.c_uint(int(listed[index]))
            return not self._library.nvmlDeviceGetHandleByIndex_v2(number, device)
        return not self._library.nvmlDeviceGetHandleByUUID(listed[index].encode(), device)

    def read(self) -> Dict[str, float]:
        """The readings by name; none where the driver does not give them."""
        readings: Dict[str, float] = {}
        if self._library is None:
            return readings
        busy, memory = _Utilization(), _Memory()
        if not self._library.nvmlDeviceGetUtilizationRates(self._device, ctypes.byref(busy)):
            readings["gpu_percent"] = float(busy.gpu)
        if not self._library.nvmlDeviceGetMemoryInfo(self._device, ctypes.byref(memory)):
            readings["gpu_memory_mb"] = memory.used / _MB
            readings["gpu_free_memory_mb"] = memory.free / _MB
        return readings


def _visible(value: Optional[str]) -> Optional[List[str]]:
    """The GPUs that CUDA shows to this process, in their order; None for all."""
    return None if value is None else [each.strip() for each in value.split(",") if each.strip()]
