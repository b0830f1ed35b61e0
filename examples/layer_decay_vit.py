"""A vision transformer with layerwise learning rate decay, as BEiT and MAE fine-tune theirs.

The nearer a layer to the input, the lower its rate: the head has the rate of the optimizer,
each layer below it 0.75 times that of the layer above. `layer_decay` finds the layers of
flowvision's models by itself, and `no_weight_decay` keeps biases, norms and position
embeddings out of the weight decay. Here a flowvision ViT, small enough for a CPU, learns
scikit-learn's handwritten digits, 8 x 8 pixels, which need no download.

    python examples/layer_decay_vit.py                    # graph mode
    python examples/layer_decay_vit.py --mode eager --decay 0.5
    python examples/layer_decay_vit.py --plot rates.png
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import Any, Dict, List, Optional, Tuple

import oneflow as flow
from flowvision.models.vision_transformer import VisionTransformer
from oneflow import nn
from oneflow.utils.data import DataLoader, TensorDataset

from ofengine import OFEngineError, TaskModule, Trainer, seed_everything
from ofengine.rates import layer_decay, no_weight_decay

BATCH_SIZE = 64
TRAINING_IMAGES, HELD_OUT_IMAGES = 1408, 384  # whole batches: no graph for a smaller one
RATE = 1e-2
WEIGHT_DECAY = 0.05


class Digits(TaskModule):
    """A ViT of three blocks over 4 patches of 4 x 4 pixels: images (n, 1, 8, 8) to ten digits."""

    def __init__(self, decay: float, steps: int) -> None:
        super().__init__()
        self.model = VisionTransformer(
            img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=48, depth=3, num_heads=4
        )
        self.loss_fn = nn.CrossEntropyLoss()
        self.decay = decay
        self.steps = steps

    def training_step(self, batch: Any, batch_idx: int) -> flow.Tensor:
        images, labels = batch
        return self.loss_fn(self.model(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        correct = self.model(images).argmax(dim=1) == labels
        self.log("accuracy", correct.float().mean(), prog_bar=True)

    def param_groups(self) -> List[Dict[str, Any]]:
        groups = layer_decay(self.model, self.decay)
        return no_weight_decay(groups, self.model, weight_decay=WEIGHT_DECAY)

    def configure_optimizers(self) -> Dict[str, Any]:
        optimizer = flow.optim.AdamW(self.param_groups(), lr=RATE)
        cosine = flow.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps, eta_min=RATE / 30)
        schedule = flow.optim.lr_scheduler.WarmUpLR(
            cosine, warmup_factor=0.1, warmup_iters=self.steps // 10, warmup_method="linear"
        )
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def digits() -> Tuple[DataLoader, DataLoader]:
    """Training and held-out batches of scikit-learn's digits, pixels from -1 to 1."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = flow.tensor((data.images[:, None] / 8 - 1).astype("float32"))
    labels = flow.tensor(data.target.astype("int64"))
    cut, end = TRAINING_IMAGES, TRAINING_IMAGES + HELD_OUT_IMAGES
    return (
        DataLoader(TensorDataset(images[:cut], labels[:cut]), batch_size=BATCH_SIZE, shuffle=True),
        DataLoader(TensorDataset(images[cut:end], labels[cut:end]), batch_size=BATCH_SIZE),
    )


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mode", choices=["eager", "graph"], default="graph")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--decay", type=float, default=0.75, help="rate of a layer by that above")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", default="layer_decay.png", help="the picture")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """Show the rates, train, draw the rates; return the exit code."""
    arguments = parse(argv)
    for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        if importlib.util.find_spec(module) is None:
            print(f"This example needs {package}: pip install {package}", file=sys.stderr)
            return 1
    train, held_out = digits()
    try:
        seed_everything(arguments.seed)
        task = Digits(arguments.decay, arguments.epochs * len(train))
        trainer = Trainer(
            mode=arguments.mode,
            device=arguments.device,
            max_epochs=arguments.epochs,
            seed=arguments.seed,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        preview = trainer.preview(task, train)
        print(preview, end="\n\n")
        trainer.fit(task, train, held_out)
        print(f"held-out accuracy: {trainer.callback_metrics['accuracy']:.1%}", end="\n\n")
        print(preview.draw())
        print(f"\nThe rates of every group are in {preview.plot(arguments.plot)}")
    except OFEngineError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
