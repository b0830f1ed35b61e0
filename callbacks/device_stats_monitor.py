"""DeviceStatsMonitor: how much of the CPU, the memory and the GPU a run takes."""

from __future__ import annotations

from typing import Any, List, Optional

from ofengine.callback import Callback
from ofengine.callbacks._device_readings import GpuReadings, ProcessReadings
from ofengine.errors import ConfigurationError
from ofengine.run.view import RunView
from ofengine.task import TaskModule


class DeviceStatsMonitor(Callback):
    """Logs what the process takes, every ``log_every_n_steps`` optimizer steps, under ``device/``.

    ``device/cpu_percent``: of one CPU, since the last time (200 for two busy ones), this process
    without its DataLoader's workers; ``device/memory_mb`` and ``device/peak_memory_mb``: of it in
    RAM now, and at most so far; ``device/threads``; ``device/available_memory_mb``: what the
    machine has left. On a GPU, by its driver: ``device/gpu_percent``, ``device/gpu_memory_mb`` and
    ``device/gpu_free_memory_mb``, of all processes. A megabyte has 1024 * 1024 bytes. A number that
    the system does not give is left out. Of several ranks each is a process: the loggers have
    rank 0's. Nothing waits for the device.

    Args:
        cpu_stats: the numbers of process and machine too. None, as in Lightning, for yes; False
            leaves the GPU's.

    Raises:
        ConfigurationError: ``cpu_stats`` is something else.
    """

    rank_zero_only = True

    def __init__(self, cpu_stats: Optional[bool] = None) -> None:
        if cpu_stats is not None and not isinstance(cpu_stats, bool):
            raise ConfigurationError(
                f"DeviceStatsMonitor(cpu_stats={cpu_stats!r}): give True, False or None."
            )
        self.cpu_stats = cpu_stats
        self._readings: List[Any] = []
        self._logged = 0

    def on_train_start(self, trainer: RunView, task: TaskModule) -> None:
        """Begin to measure."""
        self._logged = trainer.global_step
        self._readings = [] if self.cpu_stats is False else [ProcessReadings()]
        if trainer.device.type == "cuda":
            self._readings.append(GpuReadings(trainer.device.index))

    def on_train_batch_end(
        self, trainer: RunView, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, where that is due."""
        step = trainer.global_step
        if step == self._logged or step % trainer.log_every_n_steps:
            return
        self._logged = step
        numbers = {
            f"device/{name}": value
            for readings in self._readings
            for name, value in readings.read().items()
        }
        if numbers:
            trainer.log_metrics(numbers)

    def teardown(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Let go of what was measured with."""
        self._readings = []
