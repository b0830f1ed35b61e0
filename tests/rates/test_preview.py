"""The preview's numbers are the run's, and its pictures can be read."""

from __future__ import annotations

import html
import math
import re
import sys
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import OfUnknownLength, quiet_trainer, weights_of
from oneflow import nn

from ofengine import Callback, ConfigurationError, RateError, TaskModule
from ofengine.callbacks import GraphLRScaleCallback, LRDecayCallback
from ofengine.rates.preview import Preview


class Layers(TaskModule):
    """Linear layers, each a group with the given options; any scheduler."""

    def __init__(self, groups: List[Dict[str, Any]], scheduler: Any = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in groups])
        self.groups = groups
        self.scheduler = scheduler

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for layer in self.layers:
            batch = layer(batch)
        return batch.mean()

    def param_groups(self) -> List[Dict[str, Any]]:
        return [
            {"params": layer.parameters(), **options}
            for layer, options in zip(self.layers, self.groups)
        ]

    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.param_groups(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler}


class Unreadable:
    """A loader of known length that must not be read."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Any:
        raise AssertionError("a batch was read")


def preview_of(task: TaskModule, batches: int = 10, **arguments: Any) -> Preview:
    return quiet_trainer(**arguments).preview(task, Unreadable(batches))


def test_rates_equal_the_closed_form() -> None:
    task = Layers(
        [{"name": "a", "lr": 0.1}, {"name": "b", "lr": 0.2, "lr_scale": 0.5}],
        lambda step: 1 / (step + 1),
    )
    seen = preview_of(task, 10, max_epochs=2)
    assert seen.total_steps == 20
    assert seen.steps == list(range(20))
    for step in range(20):
        expected = np.float32(0.2 * (1 / (step + 1))) * np.float32(0.5)
        assert seen.at(step)["b"] == expected == seen.curve("b")[step]
        assert seen.curve("a")[step] == np.float32(0.1 * (1 / (step + 1)))


@pytest.mark.parametrize(
    ("callback", "key", "per_epoch"),
    [
        (LRDecayCallback, "lr_decay_scale", True),
        (GraphLRScaleCallback, "lr_decay_scale", False),
        (LRDecayCallback, "lr_scale", True),
    ],
)
def test_decay_of_the_trainers_callbacks_counts(callback: Any, key: str, per_epoch: bool) -> None:
    task = Layers([{"name": "a", "lr": 1.0, "lr_scale": 0.5, "lr_decay_scale": 0.25}])
    decays = callback(every_n_batches=2, per_epoch=per_epoch, key=key)
    seen = preview_of(task, 3, max_epochs=2, callbacks=decays)
    # Batches 0, 2 | 0, 2 of two epochs of three; over the whole run batches 0, 2, 4.
    events = [0, 1, 1, 2, 3, 3] if per_epoch else [0, 1, 1, 2, 2, 3]
    start, factor = (1.0, 0.5) if key == "lr_scale" else (0.5, 0.25)
    assert seen.curve("a") == [start * factor**n for n in events]
    assert "decay after every 2 batches" in seen.heading()


def test_accumulation_and_limits_make_the_steps() -> None:
    task = Layers([{"name": "a"}])
    assert preview_of(task, 5, max_epochs=2, accumulate_grad_batches=2).total_steps == 6
    assert preview_of(task, 5, max_epochs=2, accumulate_grad_batches=2).epochs == [0, 3]
    assert preview_of(task, 5, max_epochs=2, limit_train_batches=3).total_steps == 6
    assert preview_of(task, 5, max_epochs=2, overfit_batches=1).total_steps == 2
    assert preview_of(task, 5, max_epochs=2, max_steps=7).total_steps == 7
    assert preview_of(task, 5, fast_dev_run=True).total_steps == 1


def test_preview_equals_the_rates_that_a_fit_uses(mode: str) -> None:
    used: List[List[float]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, idx: int) -> None:
            if trainer.mode == "eager":
                used.append([group["lr"] for group in trainer.optimizer.param_groups])
            else:
                used.append(trainer.rates.rates(trainer.global_step))

    options = [{"name": "a", "lr_decay_scale": 0.9}, {"name": "b", "lr_scale": 0.3}]
    task = Layers(options, lambda step: 1 / (1 + step))
    trainer = quiet_trainer(mode=mode, max_epochs=2, callbacks=[Watch(), LRDecayCallback(2)])
    batches = [flow.ones(2, 3)] * 4
    seen = trainer.preview(task, batches)
    trainer.fit(task, batches)
    if mode == "eager":  # the rates of step 0 are written after this hook's callbacks began
        assert len(used) == 8
    assert [seen.curve("a"), seen.curve("b")] == [list(each) for each in zip(*used)]


def test_configure_optimizers_may_ask_for_the_length_of_the_run() -> None:
    class Asks(Layers):
        def configure_optimizers(self) -> Any:
            total = self.trainer.total_steps
            optimizer = flow.optim.SGD(self.param_groups(), lr=1.0)
            return {"optimizer": optimizer, "lr_scheduler": lambda step: 1 - step / total}

    assert preview_of(Asks([{"name": "a"}]), 4, max_epochs=1).curve("a") == [1.0, 0.75, 0.5, 0.25]


def test_nothing_is_touched() -> None:
    task = Layers([{"name": "a", "lr_decay_scale": 0.5}])
    trainer = quiet_trainer(max_epochs=2, callbacks=LRDecayCallback(3))
    before, of_task = dict(vars(trainer)), dict(vars(task))
    weights = weights_of(task)
    trainer.preview(task, Unreadable(4))
    assert dict(vars(trainer)) == before
    assert {k: id(v) for k, v in vars(task).items()} == {k: id(v) for k, v in of_task.items()}
    assert all(np.array_equal(weights[name], array) for name, array in weights_of(task).items())


def test_an_unknown_length_is_asked_for() -> None:
    task = Layers([{"name": "a"}], lambda step: 0.5**step)
    loader = OfUnknownLength([1])
    with pytest.raises(ConfigurationError, match="give steps_per_epoch"):
        quiet_trainer(max_epochs=2).preview(task, loader)
    assert quiet_trainer(max_epochs=2).preview(task, loader, 7).total_steps == 14
    assert quiet_trainer(max_epochs=2).preview(task, steps_per_epoch=7).total_steps == 14
    # Where no rate depends on epochs, the number of steps is enough.
    assert quiet_trainer(max_steps=5).preview(task, loader).total_steps == 5
    decays = Layers([{"name": "a", "lr_decay_scale": 0.5}])
    with pytest.raises(ConfigurationError, match="give steps_per_epoch"):
        quiet_trainer(max_steps=5).preview(decays, loader)
    with pytest.raises(ConfigurationError, match="whole number"):
        quiet_trainer(max_epochs=2).preview(task, steps_per_epoch=0)


def test_a_run_without_end_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no end"):
        preview_of(Layers([{"name": "a"}]), 5, max_epochs=-1)


def test_groups_are_checked_as_fit_checks_them() -> None:
    with pytest.raises(RateError, match="negative"):
        preview_of(Layers([{"name": "a", "lr_scale": -1.0}]), max_epochs=1)
    with pytest.raises(RateError, match="disagree"):
        callbacks = [LRDecayCallback(2), GraphLRScaleCallback(3)]
        preview_of(Layers([{"name": "a"}]), max_epochs=1, callbacks=callbacks)


def test_steps_outside_the_run_and_unknown_groups_are_refused() -> None:
    seen = preview_of(Layers([{"name": "a"}]), 5, max_epochs=1)
    for step in (-1, 5, 1.5):
        with pytest.raises(RateError, match="0 to 4"):
            seen.at(step)  # type: ignore[arg-type]
    with pytest.raises(RateError, match="no group 'b'"):
        seen.curve("b")


@pytest.mark.parametrize("total", [900, 1_000_000])
def test_the_peak_is_found_to_the_step(total: int) -> None:
    warm = total // 7

    def factor(step: int) -> float:
        return step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / total))

    task = Layers([{"name": "a", "lr": 0.5}, {"name": "flat", "lr": 0.0}], factor)
    seen = quiet_trainer(max_steps=total).preview(task)
    assert seen.peak("a") == (warm, 0.5)
    assert seen.peak("flat") == (0, 0.0)
    assert len(seen.steps) < 10_000


def test_a_long_run_shows_its_jumps() -> None:
    task = Layers([{"name": "a"}], lambda step: 1.0 if step < 333_333 else 0.1)
    seen = quiet_trainer(max_steps=1_000_000).preview(task)
    assert {0, 333_332, 333_333, 999_999} <= set(seen.steps)
    assert all(rate == seen.plan.rate("a", s) for s, rate in zip(seen.steps, seen.curve("a")))


def test_the_table_has_every_column() -> None:
    options = [{"name": "stem", "lr_scale": 0.5}, {"name": "head", "lr": 0.2}]
    task = Layers(options, lambda step: min(1.0, (step + 1) / 4))
    lines = preview_of(task, 8, max_epochs=1).table(at=[1]).splitlines()
    assert lines[0] == "Layers: 8 optimizer steps, 1 epoch of 8"
    head = "group params numbers lr scale decay start peak end step 1"
    assert " ".join(lines[1].split()) == head
    assert " ".join(lines[3].split()) == "stem 2 12 0.1 0.5 1 0.0125 3:0.05 0.05 0.025"
    assert " ".join(lines[4].split()) == "head 2 12 0.2 1 1 0.05 3:0.2 0.2 0.1"


def test_pictures_name_every_group_and_fit_the_width() -> None:
    for count, width in ((3, 80), (30, 80), (2, 40)):
        options = [{"name": f"layer.{i}", "lr_scale": 0.7**i} for i in range(count)]
        seen = preview_of(Layers(options, lambda step: 0.99**step), 50, max_epochs=2)
        for plain in (False, True):
            text = seen.draw(width=width, plain=plain)
            assert all(f"layer.{i}" in text for i in range(count))
            assert max(map(len, text.splitlines())) <= width
            assert "\x1b" not in text
            assert text.isascii() == plain
    with pytest.raises(ConfigurationError, match="at least 40"):
        seen.draw(width=20)


def test_the_scale_is_logarithmic_where_rates_span_decades() -> None:
    def text(scale: float, schedule: Any) -> str:
        task = Layers([{"name": "a"}, {"name": "b", "lr_scale": scale}], schedule)
        return preview_of(task, 50, max_epochs=1).draw()

    cosine = [0.5 * (1 + math.cos(math.pi * step / 49)) for step in range(50)]
    assert "log scale" not in text(0.5, cosine)
    assert "log scale" in text(0.01, cosine)
    assert "log scale" in text(1.0, lambda step: 0.8**step)
    assert "a, b" in text(1.0, cosine)  # one curve for both


def test_degenerate_runs_are_drawn_too() -> None:
    assert "a a" in preview_of(Layers([{"name": "a", "lr": 0.0}]), 5, max_epochs=1).draw()
    assert "a a" in preview_of(Layers([{"name": "a"}]), 1, max_epochs=1).draw()


def test_every_step_of_a_picture_is_as_wide_as_another() -> None:
    """The rates 1, 2, 3 and 4, a step each: of a field of 68 columns each has 17."""
    task = Layers([{"name": "a", "lr": 1.0}], lambda step: step + 1.0)
    lines = preview_of(task, 4, max_epochs=1).draw(plain=True, height=8).splitlines()
    rows = [line[line.index("|" if "|" in line else "+") + 1 :] for line in lines[1:9]]
    flat = [len(re.findall(r"['.a-]", row[:68])) for row in rows]
    assert sum(count > 15 for count in flat) == 4


def test_the_only_step_of_a_run_has_width() -> None:
    only = preview_of(Layers([{"name": "a"}]), 1, max_epochs=1).draw().splitlines()[1]
    assert len(re.findall("[\u2801-\u28ff]|a(?! a)", only)) > 60


def test_the_curves_as_files(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    options = [{"name": f"layer.{i}", "lr_scale": 0.5**i} for i in range(12)]
    seen = preview_of(Layers(options), 5, max_epochs=3)
    assert seen.plot(tmp_path / "new" / "rates.png").read_bytes().startswith(b"\x89PNG")
    svg = seen.plot(tmp_path / "rates.svg").read_text()
    assert "<svg" in svg
    assert "<!-- layer.11 -->" in svg  # the legend's entry
    with pytest.raises(ConfigurationError, match="could not be written"):
        seen.plot(tmp_path / "rates.nonsense")


def test_groups_of_the_same_rates_share_a_curve_and_the_legend_begins_at_the_top(
    tmp_path: Path,
) -> None:
    pytest.importorskip("matplotlib")
    options = [
        {"name": "low", "lr_scale": 0.25}, {"name": "decay", "lr_scale": 1.0},
        {"name": "no_decay", "lr_scale": 1.0},
    ]  # fmt: skip
    svg = preview_of(Layers(options), 5, max_epochs=3).plot(tmp_path / "rates.svg").read_text()
    assert svg.index("<!-- decay, no_decay -->") < svg.index("<!-- low -->")
    assert "<!-- decay -->" not in svg


def test_the_last_step_of_a_picture_is_as_wide_as_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    edges: List[Any] = []
    draw = Axes.stairs
    monkeypatch.setattr(
        Axes, "stairs", lambda self, y, x, **kw: [edges.append(list(x)), draw(self, y, x, **kw)][1]
    )
    preview_of(Layers([{}]), 5, max_epochs=1).plot(tmp_path / "rates.svg")
    assert edges == [[0, 1, 2, 3, 4, 5]]


def test_a_notebook_gets_a_table_and_the_picture() -> None:
    pytest.importorskip("matplotlib")
    seen = preview_of(Layers([{"name": "<b>a & b</b>", "lr_scale": 0.25}, {}]), 5, max_epochs=3)
    shown = seen._repr_html_()
    table, _, picture = shown.partition("</table>")
    cells = [re.findall(r">([^<>]*)</t[dh]>", row) for row in (table + "</table>").split("<tr>")]
    rows = [re.split(r"  +", line) for line in str(seen).splitlines() if "---" not in line]
    assert [html.unescape("|".join(row)) for row in cells[1:]] == ["|".join(r) for r in rows[1:]]
    assert html.escape(seen.heading()) in table
    assert "<b>" not in table
    assert picture.count("<svg") == picture.count("</svg>") == 1


def test_without_matplotlib_a_notebook_gets_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shown = preview_of(Layers([{}]), 5, max_epochs=1)._repr_html_()
    assert shown.endswith("</table>")
