"""ModelSummary: its numbers are right, and it costs no forward pass."""

from __future__ import annotations

import html
import os
import re
import shutil
import sys
import types
from typing import Any, Dict, List

import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn

from ofengine import Callback, ConfigurationError, TaskModule
from ofengine.callbacks import GraphLRScaleCallback, LRDecayCallback, ModelSummary


class Task(TaskModule):
    """A trunk of 15 + 8 numbers, the 15 frozen; a head of 3; one parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        self.head = nn.Linear(2, 1)
        self.temperature = nn.Parameter(flow.ones(1))
        for parameter in self.trunk[0].parameters():
            parameter.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.head(self.trunk(batch)) * self.temperature).pow(2).mean()

    def param_groups(self) -> List[Dict[str, Any]]:
        trunk = [parameter for parameter in self.trunk.parameters() if parameter.requires_grad]
        rest = [*self.head.parameters(), self.temperature]
        return [
            {"name": "trunk", "params": trunk, "lr": 0.5, "lr_scale": 0.25},
            {"name": "rest", "params": rest, "lr": 0.5, "lr_decay_scale": 0.75},
        ]

    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.param_groups(), lr=1.0)
        # A constant warm-up to a tenth: at step 0 the schedule gives 0.05.
        warmup = flow.optim.lr_scheduler.ConstantLR(optimizer, factor=0.1, total_iters=5)
        return {"optimizer": optimizer, "lr_scheduler": warmup}


def summary(
    capsys: pytest.CaptureFixture[str], depth: int, callbacks: Any = (), task: Any = None, **kw: Any
) -> List[List[str]]:
    """What a fit printed: the cells of each line that is not empty."""
    trainer = quiet_trainer(max_epochs=1, callbacks=[*callbacks, ModelSummary(depth)], **kw)
    trainer.fit(task or Task(), [flow.ones(3, 4)])
    lines = capsys.readouterr().out.splitlines()
    return [line.split("  ") for line in lines if line.strip()]


def stripped(line: List[str]) -> List[str]:
    return [cell.strip() for cell in line if cell.strip()]


def test_the_tables_say_what_trains_at_which_rate(
    mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [stripped(line) for line in summary(capsys, 1, mode=mode)]
    assert lines == [
        [f"Task, {mode} mode on cpu"],
        ["module", "type", "parameters", "trainable", "group (rate at step 0)"],
        ["-" * 16, "-" * 10, "-" * 10, "-" * 9, "-" * 22],
        ["trunk", "Sequential", "23", "8", "trunk (0.0125)"],
        ["head", "Linear", "3", "all", "rest (0.05)"],
        ["(the task's own)", "Parameter", "1", "all", "rest (0.05)"],
        ["27 parameters, 0.00 MB in float32:"],
        ["12 trainable, 15 frozen"],
        [
            *["group", "tensors", "parameters", "lr", "lr_scale", "lr_decay_scale"],
            "rate at step 0",
        ],
        ["-" * 5, "-" * 7, "-" * 10, "-" * 3, "-" * 8, "-" * 14, "-" * 14],
        ["trunk", "2", "8", "0.5", "0.25", "1", "0.0125"],
        ["rest", "3", "4", "0.5", "1", "0.75", "0.05"],
        ["Decay: after batches 0, 10, 20, ... of each epoch."],
    ]


def test_max_depth_is_how_deep_modules_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for depth in (2, -1):
        lines = summary(capsys, depth)
        inner = [stripped(line) for line in lines if line[0] == "" and line[1]]
        assert inner == [
            ["0", "Linear", "15", "frozen", "-"],
            ["1", "ReLU", "0", "-", "-"],
            ["2", "Linear", "8", "all", "trunk (0.0125)"],
        ]


def test_depth_0_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert summary(capsys, 0) == []


def test_parameters_that_are_shared_count_once(capsys: pytest.CaptureFixture[str]) -> None:
    class Tied(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(4, 4, bias=False)
            self.decode = nn.Linear(4, 4, bias=False)
            self.decode.weight = self.encode.weight

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.decode(self.encode(batch)).mean()

    lines = [stripped(line) for line in summary(capsys, 1, task=Tied())]
    assert ["encode", "Linear", "16", "all", "all (0.001)"] in lines
    assert ["decode", "Linear", "16", "all", "all (0.001)"] in lines
    assert ["16 trainable, 0 frozen"] in lines


def test_a_module_in_many_groups_shows_their_range(capsys: pytest.CaptureFixture[str]) -> None:
    class Layerwise(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(batch).mean()

        def param_groups(self) -> List[Dict[str, Any]]:
            return [
                {"name": f"layer{i}", "params": layer.parameters(), "lr": 0.5, "lr_scale": 0.5**i}
                for i, layer in enumerate(self.model)
            ]

    lines = [stripped(line) for line in summary(capsys, 1, task=Layerwise())]
    assert ["model", "Sequential", "100", "all", "5 groups (0.03125 to 0.5)"] in lines


def test_under_the_cookbooks_key_lr_scale_is_shown_as_the_decay_it_is(
    mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = {"eager": LRDecayCallback, "graph": GraphLRScaleCallback}[mode]

    class Cookbook(TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).mean()

        def param_groups(self) -> List[Dict[str, Any]]:
            return [{"name": "all", "params": self.parameters(), "lr": 0.5, "lr_scale": 0.25}]

    decay = callback(every_n_batches=2, key="lr_scale")
    lines = [stripped(line) for line in summary(capsys, 1, [decay], Cookbook(), mode=mode)]
    assert lines[-3:] == [
        ["-" * 5, "-" * 7, "-" * 10, "-" * 3, "-" * 16, "-" * 14],
        ["all", "2", "5", "0.5", "0.25", "0.5"],
        ["Decay: after batches 0, 2, 4, ... of each epoch."],
    ]
    assert "lr_scale (decay)" in lines[-4]


def test_nothing_is_run_through_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    class Stop(Callback):
        def on_train_start(self, trainer: Any, task: Any) -> None:
            assert "trainable" in capsys.readouterr().out
            raise KeyError("far enough")

    class Explodes(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("a step was run")

        def forward(self, batch: Any) -> Any:
            raise AssertionError("a forward pass was run")

    with pytest.raises(KeyError, match="far enough"):
        summary(capsys, 1, [Stop()], Explodes())


def test_on_a_narrow_terminal_it_leaves_columns_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((60, 24)))
    trainer = quiet_trainer(max_epochs=1, callbacks=ModelSummary(2))
    trainer.fit(Task(), [flow.ones(3, 4)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert any("trunk (0.0125)" in line for line in lines)
    assert any(line.split() == ["trunk", "0.5", "0.25", "1", "0.0125"] for line in lines)


@pytest.mark.parametrize("wrong", [-2, 1.5, True, "all"])
def test_a_wrong_depth_is_an_error_at_once(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_depth"):
        ModelSummary(wrong)


def test_after_a_fit_that_set_a_rate_it_shows_those_of_the_last_step() -> None:
    class Sets(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.set_lr("rest", 0.8)

    task, shows = Task(), ModelSummary()
    trainer = quiet_trainer(max_epochs=1, callbacks=[Sets(), shows])
    trainer.fit(task, [flow.ones(3, 4)] * 4)
    lines = [line.split() for line in shows.text(trainer, task).splitlines()]
    assert lines[-6][-4:] == ["rate", "at", "step", "3"]
    # Warm-up times base rate; the scale of one group, the decay after batch 0 of the other.
    assert [(line[0], line[-1]) for line in lines[-4:-2]] == [
        ("trunk", f"{0.1 * 0.5 * 0.25:.4g}"),
        ("rest", f"{0.1 * 0.8 * 0.75:.4g}"),
    ]


def test_a_notebook_gets_both_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: List[str] = []
    notebook = types.ModuleType("IPython.display")
    vars(notebook).update(HTML=str, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    monkeypatch.setattr("ofengine.callbacks.model_summary.IN_NOTEBOOK", True)
    assert summary(capsys, 1) == []
    monkeypatch.undo()
    (text,) = shown
    rows = [re.findall(r">([^<>]*)</t[dh]>", row) for row in text.split("<tr>")]
    printed = [stripped(line) for line in summary(capsys, 1)]
    in_both = [[html.unescape(cell) for cell in row] for row in rows if row]
    assert len(in_both) == 7  # two headers, two modules, the task's own and two groups
    assert [row for row in in_both if row not in printed] == []
    assert "27 parameters, 0.00 MB in float32: 12 trainable, 15 frozen." in text
