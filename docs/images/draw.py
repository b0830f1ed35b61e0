"""Draws the pages' pictures anew, with ofengine: `python docs/images/draw.py`.

Those of rates are drawn from the code that stands on the page: of the class above a picture, or of
the schedule in a table's row. tests/docs/test_pictures.py draws them again and compares.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

import matplotlib
import oneflow as flow
from oneflow import nn
from oneflow.optim import lr_scheduler

import ofengine
from ofengine import TaskModule, Trainer
from ofengine.callbacks import LRDecayCallback

sys.path.insert(0, str(Path(__file__).resolve().parent))
from curves import svg

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "en" / "rate-pictures.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```$|\]\(\.\./images/(rates/[\w-]+\.svg)\)", re.M | re.S)
_ROW = re.compile(r"^\| `([^`]+)`.*\]\(\.\./images/(rates/[\w-]+\.svg)\) \|$", re.M)


class Three(TaskModule):
    """A group by its rate alone, one with a scale, one with a decay."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 1) for _ in range(3)])

    def param_groups(self) -> list:
        plain, scaled, decayed = (layer.parameters() for layer in self.layers)
        return [
            {"name": "lr alone", "params": plain},
            {"name": "lr_scale=0.3", "params": scaled, "lr_scale": 0.3},
            {"name": "lr_decay_scale=0.9", "params": decayed, "lr_decay_scale": 0.9},
        ]

    def configure_optimizers(self) -> dict:
        optimizer = flow.optim.SGD(self.param_groups(), lr=0.1)
        schedule = lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=0.01)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def rates() -> Iterator[Tuple[str, str]]:
    """The name and the text of each picture of rates."""
    yield "rates-definition.svg", _picture(Three(), 2, 50)
    text = PAGE.read_text(encoding="utf-8")
    known: Dict[str, Any] = {"flow": flow, "nn": nn, "Trainer": Trainer, "print": lambda *_: None}
    for code, name in _BLOCK.findall(text[: text.index("| `lr_scheduler` |")]):
        if code:
            exec(compile(code, str(PAGE), "exec"), known)
        else:
            task = list(known.values())[-1]
            yield name, _picture(task(), 3, 30)
    scheduled = _scheduled(known["ByPattern"])
    for code, name in _ROW.findall(text):
        scheduled.code = code
        yield name, _picture(scheduled, 3, 30)


def _scheduled(kind: Any) -> Any:
    """A task of the class whose schedule is what ``code`` says."""
    from flowvision import scheduler as of_flowvision

    names = {**vars(lr_scheduler), **vars(of_flowvision), "ofengine": ofengine}

    class Scheduled(kind):
        code: str

        def configure_optimizers(self) -> dict:
            optimizer = flow.optim.SGD(self.param_groups(), lr=0.1)
            schedule = eval(self.code, {**names, "optimizer": optimizer})
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    return Scheduled()


def _picture(task: TaskModule, epochs: int, steps: int) -> str:
    trainer = Trainer(max_epochs=epochs, callbacks=LRDecayCallback(10), logger=False)
    preview = trainer.preview(task, steps_per_epoch=steps)
    return svg({name: preview.curve(name) for name in preview.names}, preview.epochs)


def tour() -> Iterator[Tuple[str, bytes]]:
    """The tour's two pictures, after the tour itself."""
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # no date in a file
    matplotlib.rcParams.update({"svg.hashsalt": "ofengine", "svg.fonttype": "none"})
    text = (HERE.parent / "en" / "tour.md").read_text(encoding="utf-8")
    code = "\n\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        exec(compile(code.replace(".png", ".svg"), "tour", "exec"), {})
        for name in ("rates", "accuracy"):
            yield f"tour-{name}.svg", Path(f"tour/{name}.svg").read_bytes()
        os.chdir(HERE)


if __name__ == "__main__":
    for name, text in rates():
        (HERE / name).parent.mkdir(exist_ok=True)
        (HERE / name).write_text(text, encoding="utf-8")
    for name, picture in tour():
        (HERE / name).write_bytes(picture)
