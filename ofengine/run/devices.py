"""Which device runs the training, checked before OneFlow could end the process."""

from __future__ import annotations

import re
from typing import Any, Dict, Optional

import oneflow as flow
from oneflow import nn

from ofengine.errors import ConfigurationError, DeviceError, warn
from ofengine.launch.environment import World
from ofengine.run.arguments import check_choice

_LEAST, _MOST = (6, 0), (8, 9)
"""The compute capabilities that OneFlow 0.9.0 has machine code for, as its fat binaries show."""


def resolve_device(device: str) -> flow.device:
    """Turn "auto", "cpu", "cuda" or "cuda:N" into a ``oneflow.device``.

    "auto" is the first GPU that OneFlow can use, else the CPU, with a warning where there is a GPU.
    Nothing is computed on any. Raises :class:`DeviceError` for a GPU that is not there or that
    OneFlow cannot use, and for any other text.
    """
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise DeviceError(f'device={device!r} is not known: use "auto", "cpu", "cuda" or "cuda:N".')
    if device == "cpu":
        return flow.device("cpu")
    count = flow.cuda.device_count() if flow.cuda.is_available() else 0
    if device == "auto":
        return _first_usable(count)
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
    reason = why_unusable(index)
    if reason is not None:
        raise DeviceError(f'device={device!r}, but {reason}: use device="auto" or "cpu".')
    return flow.device("cuda", index)


def _first_usable(count: int) -> flow.device:
    reasons = []
    for index in range(count):
        reason = why_unusable(index)
        if reason is None:
            return flow.device("cuda", index)
        reasons.append(reason)
    if reasons:
        warn(f'device="auto" takes the CPU, for {reasons[0]}.')
    return flow.device("cpu")


def why_unusable(index: int) -> Optional[str]:
    """Why OneFlow cannot compute on the GPU of this number, in words; None where it can.

    OneFlow 0.9.0 has machine code for some GPUs, and no PTX that a driver could make more of: on
    any other GPU the first thing that is computed ends the process. Nothing is computed here.
    """
    if flow.__version__ != "0.9.0":
        return None
    capability = tuple(flow.cuda.get_device_capability(index))
    if _LEAST <= capability <= _MOST:
        return None
    return (
        f"cuda:{index} has compute capability {_dotted(*capability)}, and OneFlow 0.9.0 has "
        f"machine code for {_dotted(*_LEAST)} to {_dotted(*_MOST)} only"
    )


def _dotted(major: int, minor: int) -> str:
    return f"{major}.{minor}"


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


_STRATEGIES = ("auto", "ddp", "zero")


def check_strategy(name: str, value: Any) -> str:
    """``value`` where it is "auto", "ddp" or "zero"; for Lightning's others says which to write."""
    told = value if isinstance(value, str) else ""
    if told.startswith(("fsdp", "deepspeed")):
        raise ConfigurationError(
            f'{name}={value!r}: write "zero", which shares out the optimizer\'s state to the '
            "ranks; weights and gradients each rank has whole."
        )
    if told.startswith("ddp_"):
        raise ConfigurationError(f'{name}={value!r}: write "ddp".')
    return str(check_choice(name, value, _STRATEGIES))


def check_ranks(values: Dict[str, Any], world: Optional[World]) -> None:
    """Fill in how many ranks there are; refuse what several of them cannot do.

    ``values`` are a Trainer's arguments, by name; ``world`` is where this process is among the
    ranks, None for one that is alone.

    Raises :class:`ConfigurationError`, :class:`DeviceError`.
    """
    if not values["devices"]:
        values["devices"] = 1 if world is None else world.local_world_size
        if world is not None:
            values["num_nodes"] = world.nodes
    asked = values["devices"] * values["num_nodes"]
    if world is not None and asked != world.world_size:
        raise ConfigurationError(
            f"devices={values['devices']} and num_nodes={values['num_nodes']} are {asked} rank(s), "
            f"and this process was started as one of {world.world_size}: leave both out, or start "
            "as many."
        )
    if values["strategy"] == "zero":
        _check_zero(values["mode"], asked)
    if asked == 1:
        return
    if world is not None and values["device"].type == "cuda":
        if world.local_rank >= flow.cuda.device_count():
            raise DeviceError(
                f"rank {world.rank} is the {world.local_rank + 1}. of its machine, which has "
                f"{flow.cuda.device_count()} GPU(s): start no more ranks than GPUs."
            )
        values["device"] = resolve_device(f"cuda:{world.local_rank}")


def _check_zero(mode: str, ranks: int) -> None:
    if mode == "graph":
        raise ConfigurationError(
            'strategy="zero" is for eager mode, for OneFlow\'s own, of graphs, ends the process on '
            'CPUs and was not run on GPUs: write mode="eager", or strategy="ddp", with which each '
            "rank keeps the whole of the optimizer's state."
        )
    if ranks == 1:
        raise ConfigurationError(
            'strategy="zero" shares out the optimizer\'s state to several ranks, and this run has '
            "one: write devices=2 or more, or leave strategy out."
        )
