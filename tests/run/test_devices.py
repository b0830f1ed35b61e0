"""The GPU that OneFlow has no machine code for is not computed on, and the user is told why."""

from __future__ import annotations

import re
import warnings
from typing import Any, Tuple

import oneflow as flow
import pytest
from helpers import quiet_trainer
from helpers.tiny import Tiny, tiny_batches

from ofengine import DeviceError, OFEngineWarning, Trainer
from ofengine.data import generator_state

Capability = Tuple[int, int]


def pretend(monkeypatch: pytest.MonkeyPatch, *capabilities: Capability) -> None:
    """A machine with GPUs of these capabilities."""
    monkeypatch.setattr(flow.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(flow.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(flow.cuda, "get_device_capability", lambda index: capabilities[index])


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 1), (5, 2), (3, 7)])
def test_auto_takes_the_cpu_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capability: Capability
) -> None:
    pretend(monkeypatch, capability)
    said = re.escape(f"cuda:0 has compute capability {capability[0]}.{capability[1]}, and OneFlow")
    with pytest.warns(OFEngineWarning, match=said) as warned:
        trainer = quiet_trainer(device="auto", max_epochs=1)
    assert len(warned) == 1
    assert "takes the CPU" in str(warned[0].message)
    assert trainer.device.type == "cpu"


@pytest.mark.parametrize("capability", [(6, 0), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9)])
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_there_is_code_for_is_taken(
    monkeypatch: pytest.MonkeyPatch, capability: Capability, device: str
) -> None:
    pretend(monkeypatch, capability)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = quiet_trainer(device=device).device
    assert (chosen.type, chosen.index) == ("cuda", 0)


def test_auto_takes_the_first_gpu_that_there_is_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), (8, 6), (8, 9))
    chosen = quiet_trainer(device="auto").device
    assert (chosen.type, chosen.index) == ("cuda", 1)


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_gpu_that_there_is_no_code_for_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, device: str, index: int
) -> None:
    pretend(monkeypatch, (9, 0), (8, 6), (12, 0))
    with pytest.raises(DeviceError) as error:
        Trainer(device=device, logger=False)
    text = str(error.value)
    assert text.startswith(f"device={device!r}, but cuda:{index} has compute capability ")
    assert "machine code for 6.0 to 8.9 only" in text
    assert 'use device="auto" or "cpu"' in text


def test_another_oneflow_may_have_code_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(flow, "__version__", "1.0.0")
    assert quiet_trainer(device="cuda").device.type == "cuda"


def test_the_cpu_asks_nothing_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(*_: Any) -> Any:
        raise AssertionError("the GPU was asked")

    for name in ("is_available", "device_count", "get_device_capability"):
        monkeypatch.setattr(flow.cuda, name, touch)
    assert quiet_trainer(device="cpu").device.type == "cpu"


def test_a_checkpoint_s_generator_of_such_a_gpu_is_not_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, (9, 0), (8, 0))
    made = []

    class Stands:
        def __init__(self, device: str) -> None:
            made.append(device)

        def get_state(self) -> Any:
            return flow.zeros(16)

    monkeypatch.setattr(flow, "Generator", Stands)
    assert set(generator_state._lengths_of_devices()) == {"cpu:0", "cuda:1"}
    assert made == ["cuda:1"]


def test_a_run_beside_such_a_gpu_trains_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    pretend(monkeypatch, (9, 0))
    with pytest.warns(OFEngineWarning, match="takes the CPU"):
        trainer = quiet_trainer(device="auto", mode=mode, max_epochs=1)
    task = Tiny()
    trainer.fit(task, tiny_batches())
    assert trainer.global_step == 3
    assert {parameter.device.type for parameter in task.parameters()} == {"cpu"}
