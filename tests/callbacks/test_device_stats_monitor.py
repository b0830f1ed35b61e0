"""DeviceStatsMonitor: the numbers are the system's own, and come when they are due."""

from __future__ import annotations

import ctypes
import resource
import threading
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
from helpers import quiet_trainer
from helpers.tiny import Tiny, tiny_batches

from ofengine import Callback, ConfigurationError
from ofengine.callbacks import DeviceStatsMonitor
from ofengine.callbacks._device_readings import GpuReadings, ProcessReadings

NAMES = ["cpu_percent", "memory_mb", "peak_memory_mb", "threads", "available_memory_mb"]


class Seen(Callback):
    """What was logged, by step; behind the monitor in the list."""

    def __init__(self) -> None:
        self.rows: Dict[int, Dict[str, float]] = {}

    def on_train_end(self, trainer: Any, task: Any) -> None:
        for row in trainer.history:
            found = {name: value for name, value in row.items() if name.startswith("device/")}
            if found:
                self.rows[int(row["step"])] = found


def test_the_numbers_are_logged_at_log_intervals(mode: str) -> None:
    seen = Seen()
    trainer = quiet_trainer(
        mode=mode, max_epochs=3, log_every_n_steps=4, callbacks=[DeviceStatsMonitor(), seen]
    )
    trainer.fit(Tiny(), tiny_batches())
    assert list(seen.rows) == [4, 8]
    for row in seen.rows.values():
        assert sorted(row) == sorted(f"device/{name}" for name in NAMES)
        assert all(np.isfinite(value) and value >= 0 for value in row.values())


def test_only_steps_count_where_gradients_are_accumulated(mode: str) -> None:
    seen = Seen()
    trainer = quiet_trainer(
        mode=mode, max_epochs=2, log_every_n_steps=1, accumulate_grad_batches=2,
        callbacks=[DeviceStatsMonitor(), seen],
    )  # fmt: skip
    trainer.fit(Tiny(), tiny_batches())
    assert list(seen.rows) == [1, 2, 3, 4]


def test_without_the_cpu_s_nothing_is_logged_on_a_cpu() -> None:
    seen = Seen()
    callbacks = [DeviceStatsMonitor(cpu_stats=False), seen]
    quiet_trainer(max_epochs=1, log_every_n_steps=1, callbacks=callbacks).fit(
        Tiny(), tiny_batches()
    )
    assert seen.rows == {}


@pytest.mark.parametrize("cpu_stats", [1, 0, "yes"])
def test_a_wrong_argument_is_refused(cpu_stats: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"cpu_stats=.*: give True, False or None\.$"):
        DeviceStatsMonitor(cpu_stats=cpu_stats)


def test_memory_and_threads_are_those_of_the_process() -> None:
    readings = ProcessReadings()
    before = readings.read()
    block = np.ones(64 * 1024 * 1024, "uint8")  # 64 MB, each page written
    over, started = threading.Event(), threading.Thread(target=lambda: over.wait())
    started.start()
    after = readings.read()
    over.set()
    started.join()
    assert 60 < after["memory_mb"] - before["memory_mb"] < 72
    assert after["threads"] == before["threads"] + 1
    # What the kernel counts for getrusage is the same peak, in kB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert abs(readings.read()["peak_memory_mb"] - peak) < 8
    assert block[0] == 1


def test_what_the_system_does_not_tell_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text("Name:\tpython\nVmRSS:\t  2048 kB\nThreads:\tmany\n")
    assert list(ProcessReadings(tmp_path / "nowhere").read()) == ["cpu_percent"]
    read = ProcessReadings(tmp_path).read()
    assert (list(read), read["memory_mb"]) == (["cpu_percent", "memory_mb"], 2.0)


class Driver:
    """In the place of the driver's library: writes where it is told to, as that does."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.asked: List[Any] = []

    def nvmlInit_v2(self) -> int:
        return int(self.fails == "init")

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, device: Any) -> int:
        self.asked.append(index.value)
        device._obj.value = 4711
        return int(self.fails == "device")

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, device: Any) -> int:
        self.asked.append(uuid)
        return 0

    def nvmlDeviceGetUtilizationRates(self, device: Any, rates: Any) -> int:
        ctypes.cast(ctypes.pointer(rates._obj), ctypes.POINTER(ctypes.c_uint))[0] = 75
        return int(self.fails == "rates")

    def nvmlDeviceGetMemoryInfo(self, device: Any, memory: Any) -> int:
        numbers = ctypes.cast(ctypes.pointer(memory._obj), ctypes.POINTER(ctypes.c_ulonglong))
        numbers[0], numbers[1], numbers[2] = 80 << 30, 60 << 30, 20 << 30
        return 0


def test_a_gpu_s_numbers_are_its_driver_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver = Driver()
    assert GpuReadings(1, driver).read() == {
        "gpu_percent": 75.0, "gpu_memory_mb": 20 * 1024.0, "gpu_free_memory_mb": 60 * 1024.0,
    }  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-abc")
    assert all(GpuReadings(index, driver).read() for index in (0, 1))
    assert driver.asked == [1, 3, b"GPU-abc"]
    assert GpuReadings(2, driver).read() == {}


@pytest.mark.parametrize("fails", ["init", "device"])
def test_a_driver_that_does_not_answer_gives_nothing(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert GpuReadings(0, Driver(fails)).read() == {}
    assert "gpu_percent" not in GpuReadings(0, Driver("rates")).read()
