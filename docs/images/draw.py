"""Draws the pages' pictures anew, with ofengine: `python docs/images/draw.py`."""

import os
import re
import tempfile
from pathlib import Path

import matplotlib
import oneflow as flow
from oneflow import nn

from ofengine import TaskModule, Trainer
from ofengine.callbacks import LRDecayCallback

HERE = Path(__file__).resolve().parent
os.environ["SOURCE_DATE_EPOCH"] = "0"  # no date in a file
matplotlib.rcParams.update({"svg.hashsalt": "ofengine", "svg.fonttype": "none"})


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
        schedule = flow.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=0.01)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def main() -> None:
    """The definition of a rate, and the two pictures of the tour."""
    trainer = Trainer(max_epochs=2, callbacks=LRDecayCallback(every_n_batches=10), logger=False)
    trainer.preview(Three(), steps_per_epoch=50).plot(HERE / "rates-definition.svg")
    text = (HERE.parent / "en" / "tour.md").read_text(encoding="utf-8")
    code = "\n\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        exec(compile(code.replace(".png", ".svg"), "tour", "exec"), {})
        for name in ("rates", "accuracy"):
            (HERE / f"tour-{name}.svg").write_bytes(Path(f"tour/{name}.svg").read_bytes())
        os.chdir(HERE)


if __name__ == "__main__":
    main()
