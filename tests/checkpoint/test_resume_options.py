"""What resuming tells of the groups' options: what the code says otherwise, and nothing else."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Dict, List

import oneflow as flow
import pytest
from helpers import MODES, quiet_trainer
from oneflow import nn

from ofengine import TaskModule
from ofengine.checkpoint import snapshot

LIMIT = {"clip_grad_max_norm": 1.0, "clip_grad_norm_type": float("inf")}
OPTIMIZERS: Dict[str, Dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "Adam": {"betas": (0.8, 0.99)},
    "AdamW": {"amsgrad": True},
    "LAMB": {},
    "RMSprop": {"centered": True},
    "Adagrad": {"lr_decay": 0.1},
    "Adadelta": {"rho": 0.8},
}


class Task(TaskModule):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(flow.zeros(2))
        self.kind, self.options = kind, options

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.weight * batch).sum()

    def configure_optimizers(self) -> Any:
        kind = getattr(flow.optim, self.kind) if isinstance(self.kind, str) else self.kind
        return kind([{"params": self.parameters(), "name": "all", **self.options}], lr=0.1)


def save(folder: Path, task: Task, mode: str = "eager") -> Path:
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(task, [flow.ones(2)] * 3)
    return trainer.save_checkpoint(folder / "saved.safetensors")


def told(path: Path, task: Task, caplog: Any, mode: str = "eager") -> List[str]:
    """What the resumed run says of options."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="ofengine"):
        quiet_trainer(mode=mode, max_epochs=2).fit(task, [flow.ones(2)] * 3, ckpt_path=path)
    lines = [record.getMessage() for record in caplog.records]
    assert any("resuming from" in line for line in lines)
    return [line for line in lines if "which counts" in line]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("other", MODES)
def test_the_same_code_is_no_difference(
    mode: str, other: str, kind: str, tmp_path: Path, caplog: Any
) -> None:
    options = {**OPTIMIZERS[kind], **LIMIT}
    path = save(tmp_path, Task(kind, **options), mode)
    assert not told(path, Task(kind, **options), caplog, other)


def test_files_of_earlier_versions_hold_what_adam_writes_itself(
    tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(snapshot, "own_options", lambda optimizer: set())
        path = save(tmp_path, Task("Adam"))
    assert b"bias_correction1" in path.read_bytes()
    assert not told(path, Task("Adam"), caplog)
    assert b"bias_correction1" not in save(tmp_path, Task("Adam")).read_bytes()


def test_what_the_code_says_otherwise_is_told(tmp_path: Path, caplog: Any) -> None:
    path = save(tmp_path, Task("Adam", betas=(0.8, 0.99), **LIMIT))
    lines = told(path, Task("Adam", betas=(0.9, 0.99), amsgrad=True), caplog)
    said = "resume: %s of group 'all' was %s in the checkpoint and is %s by the code, which counts."
    assert lines == [
        said % ("amsgrad", False, True),
        said % ("betas", [0.8, 0.99], [0.9, 0.99]),
        said % ("clip_grad_max_norm", 1.0, "not set"),
        said % ("clip_grad_norm_type", "inf", "not set"),
    ]
    assert said % ("clip_grad_max_norm", "not set", 1.0) in told(
        save(tmp_path, Task("Adam")), Task("Adam", **LIMIT), caplog
    )


class Counts(flow.optim.SGD):
    """Keeps an option that nobody gives, and counts in it."""

    def __init__(self, groups: Any, lr: float, slow: float = 1.0) -> None:
        super().__init__(groups, lr=lr)
        self._default_options["counted"] = 0
        for group in self.param_groups:
            group.setdefault("counted", 0)
            group.setdefault("slow", slow)

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            group["counted"] += 1


def test_an_optimizer_of_one_s_own_may_write_into_its_groups(tmp_path: Path, caplog: Any) -> None:
    path = save(tmp_path, Task(Counts))
    assert not told(path, Task(Counts), caplog)
    (line,) = told(path, Task(Counts, slow=0.5), caplog)
    assert "slow of group 'all' was 1.0 in the checkpoint and is 0.5 by the code" in line
