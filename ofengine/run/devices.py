"""Which device runs the training, checked before OneFlow could abort the process."""

from __future__ import annotations

import re

import oneflow as flow
from oneflow import nn

from ofengine.errors import DeviceError


def resolve_device(device: str) -> flow.device:
    """Turn "auto", "cpu", "cuda" or "cuda:N" into a ``oneflow.device``.

    "auto" is the first GPU where there is one, else the CPU. Raises :class:`DeviceError` for
    a GPU that is not there and for any other text.
    """
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise DeviceError(f'device={device!r} is not known: use "auto", "cpu", "cuda" or "cuda:N".')
    count = flow.cuda.device_count() if flow.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and count == 0):
        return flow.device("cpu")
    index = int(device.partition(":")[2] or 0)
    if count == 0:
        raise DeviceError(
            f'device={device!r}, but OneFlow finds no GPU here: use device="auto" or "cpu", or see '
            "`python -m ofengine doctor` for what is missing."
        )
    if index >= count:
        last = f"cuda:{count - 1}"
        raise DeviceError(
            f"device={device!r}, but this machine has {count} GPU(s): the last is {last!r}."
        )
    return flow.device("cuda", index)


def move(task: nn.Module, device: flow.device) -> None:
    """Move ``task`` to ``device``.

    Raises :class:`DeviceError` where a parameter or buffer is a global tensor, which lies on
    several devices.
    """
    for name, each in (*task.named_parameters(), *task.named_buffers()):
        if each.is_global:
            raise DeviceError(
                f"{name!r} is a global tensor, on {each.placement}: a task trains local tensors on "
                "one device. Make the model without to_global(), placement and sbp, or take its "
                "own part with to_local()."
            )
    task.to(device)
