"""A run that goes on with other BLAS kernels than it had is told so: last bits can differ."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
from helpers import Line, quiet_trainer, random_rows

from ofengine._oneflow.blas import Kernels, kernels
from ofengine.checkpoint import kernels as noting, snapshot
from ofengine.checkpoint.file import read

TOLD = (
    "resume: OneFlow's BLAS computes with kernels for Haswell now, and did with those for "
    "Barcelona: last bits can differ from those of a run that never stopped"
)
AS_IS = " (OFENGINE_BLAS=as-is takes the same)"


def as_if(core: str, by_oneflow: str) -> Callable[[], Kernels]:
    return lambda: Kernels(core, by_oneflow, "for a test")


def test_a_checkpoint_names_the_kernels_in_use(tmp_path: Path) -> None:
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(Line(), random_rows([4], 2))
    state = read(trainer.save_checkpoint(tmp_path / "saved.safetensors")).state
    assert state is not None
    assert state["versions"]["blas"] == kernels().core


@pytest.mark.parametrize(
    ("kept", "now", "told"),
    [
        ("Haswell", as_if("Haswell", "Barcelona"), None),
        ("Barcelona", as_if("Barcelona", "Barcelona"), None),
        ("Barcelona", as_if("Haswell", "Barcelona"), f"{TOLD}{AS_IS}."),
        ("Barcelona", as_if("Haswell", "Prescott"), f"{TOLD}."),  # from another machine
        (None, as_if("Haswell", "Barcelona"), f"{TOLD}{AS_IS}."),  # of an earlier version
        (None, as_if("Haswell", "Haswell"), None),
        ("", as_if("Haswell", "Barcelona"), None),
        ("Barcelona", as_if("", ""), None),
    ],
)
def test_a_resumed_run_tells_where_they_differ(
    kept: Optional[str],
    now: Callable[[], Kernels],
    told: Optional[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
) -> None:
    batches = random_rows([4, 4], 2)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(Line(), batches)
    state_of_run = snapshot.state_of_run

    def of_kept(*arguments: Any) -> Any:
        state = state_of_run(*arguments)
        state["versions"].pop("blas")
        if kept is not None:
            state["versions"]["blas"] = kept
        return state

    monkeypatch.setattr(snapshot, "state_of_run", of_kept)
    path = trainer.save_checkpoint(tmp_path / "saved.safetensors")
    monkeypatch.setattr(noting, "kernels", now)
    with caplog.at_level(logging.WARNING, logger="ofengine"):
        quiet_trainer(max_epochs=2).fit(Line(), batches, ckpt_path=path)
    assert [line for line in caplog.messages if "BLAS" in line] == ([told] if told else [])
