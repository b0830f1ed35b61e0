"""A language model of characters: sentences of unequal length, and steps of so many tokens.

A grammar makes up hundreds of sentences such as "the small cats see a bird.", and a transformer
learns to write more of them, character by character. Sentences are padded to one length, and what
is padded counts nowhere. So batches have unequal numbers of tokens: `training_step` says how many,
and a step takes the mean over all tokens of its four batches. So four batches of 8 come to what one
of 32 comes to, up to rounding: after an epoch, no weight differs by more than 1e-4 (it was 6e-6;
with the mean of the four batches' means, 2e-2).

    python examples/language_model.py                                # 4 batches of 8 in a step
    python examples/language_model.py --batch-size 32 --accumulate 1
    python examples/language_model.py --mode eager                   # graph mode without it
    python examples/language_model.py --plot loss.png

The rate warms up and falls along a cosine, gradients are clipped, and weight decay leaves norms,
biases and positions alone. Eager mode and graph mode come to the same weights, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import sys
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.optim.lr_scheduler import CosineAnnealingLR
from oneflow.utils.data import DataLoader, TensorDataset

from ofengine import OFEngineError, TaskModule, Trainer, seed_everything
from ofengine.callbacks import LearningRateMonitor
from ofengine.metrics import Mean
from ofengine.rates import WarmupLR, no_weight_decay

# ---------------------------------------------------------------------- the text

ADJECTIVES = ["small", "old", "grey", "quick"]
NOUNS = ["cat", "dog", "bird", "horse", "friend"]
VERBS = ["see", "find", "hear", "like"]
LENGTH = 33  # no sentence is longer, with its end
PAD, END = 0, 1
CHARACTERS = " .abcdefghijklmnopqrstuvwxyz"
TOKENS = 2 + len(CHARACTERS)


def sentence(draw: np.random.RandomState) -> str:
    """A sentence of the grammar: of one, the verb has an s; of several, the noun has it."""
    several = draw.rand() < 0.5
    subject = "the " + described(draw) + ("s" if several else "")
    verb = VERBS[draw.randint(len(VERBS))] + ("" if several else "s")
    return f"{subject} {verb} a {NOUNS[draw.randint(len(NOUNS))]}."


def described(draw: np.random.RandomState) -> str:
    """A noun, with an adjective before it or without."""
    adjective = ADJECTIVES[draw.randint(len(ADJECTIVES))] + " " if draw.rand() < 0.5 else ""
    return adjective + NOUNS[draw.randint(len(NOUNS))]


def is_right(text: str) -> bool:
    """Whether the grammar has this sentence."""
    words = text[:-1].split(" ")
    if not text.endswith(".") or len(words) < 5 or words[0] != "the" or words[-2] != "a":
        return False
    adjectives, noun, verb = words[1:-4], words[-4], words[-3]
    if noun in NOUNS:
        agree = verb[-1:] == "s" and verb[:-1] in VERBS
    else:
        agree = noun[-1:] == "s" and noun[:-1] in NOUNS and verb in VERBS
    return agree and len(adjectives) < 2 and set(adjectives) <= {*ADJECTIVES} and words[-1] in NOUNS


def encoded(sentences: List[str]) -> flow.Tensor:
    """Sentences as tokens (n, LENGTH + 1): END, the characters, END again, then PAD."""
    rows = np.full((len(sentences), LENGTH + 1), PAD, dtype=np.int64)
    for row, text in zip(rows, sentences):
        row[: len(text) + 2] = [END, *(2 + CHARACTERS.index(each) for each in text), END]
    return flow.tensor(rows)


def loaders(batch_size: int) -> Tuple[DataLoader, DataLoader]:
    """Batches of 640 sentences to train on, and of 128 others; always the same ones."""
    draw = np.random.RandomState(0)
    tokens = encoded([sentence(draw) for _ in range(640 + 128)])
    train, held_out = TensorDataset(tokens[:640]), TensorDataset(tokens[640:])
    return DataLoader(train, batch_size, shuffle=True), DataLoader(held_out, 64)


# ---------------------------------------------------------------------- the task


class Block(nn.Module):
    """Attention to what came before, then a perceptron; each after a norm and added to its input.

    Args:
        width: features of a token.
        heads: how many attentions share them.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: flow.Tensor, mask: flow.Tensor) -> flow.Tensor:
        n, length, width = x.shape
        qkv = self.to_qkv(self.norm1(x)).reshape(n, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (n, heads, length, width of a head)
        scores = flow.matmul(q, k.transpose(2, 3)) / math.sqrt(width // self.heads) + mask
        mixed = flow.matmul(flow.softmax(scores, dim=-1), v)
        x = x + self.to_out(mixed.permute(0, 2, 1, 3).reshape(n, length, width))
        return x + self.perceptron(self.norm2(x))


class LanguageModel(TaskModule):
    """A transformer that says, at each token, what comes next.

    Args:
        width: features of a token.
        depth: how many blocks.
        rate: the learning rate after warm-up; it falls to a tenth along a cosine.
        warmup: how much of all steps the warm-up takes.
    """

    def __init__(
        self, width: int = 48, depth: int = 2, rate: float = 1e-2, warmup: float = 0.1
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(TOKENS, width)
        self.pos_embed = nn.Parameter(0.02 * flow.randn(1, LENGTH, width))
        self.blocks = nn.ModuleList([Block(width, heads=4) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, TOKENS)
        # Before the softmax: -1e9 for all that comes later, so that it is not looked at.
        self.register_buffer("mask", flow.triu(flow.ones(LENGTH, LENGTH), diagonal=1) * -1e9)
        self.val_loss = Mean()

    def forward(self, tokens: flow.Tensor) -> flow.Tensor:
        """Tokens (n, LENGTH) to scores of the next ones (n, LENGTH, TOKENS)."""
        x = self.embed(tokens) + self.pos_embed
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(self.norm(x))

    def mean_loss(self, batch: Any) -> Tuple[flow.Tensor, flow.Tensor]:
        """The mean loss over the batch's tokens that are no padding, and how many these are."""
        tokens, following = batch[0][:, :-1], batch[0][:, 1:].reshape(-1)
        scores = self(tokens).reshape(-1, TOKENS)
        counts = (following != PAD).float()
        losses = nn.functional.cross_entropy(scores, following, reduction="none")
        return (losses * counts).sum() / counts.sum(), counts.sum()

    def training_step(self, batch: Any, batch_idx: int) -> Dict[str, flow.Tensor]:
        loss, tokens = self.mean_loss(batch)
        return {"loss": loss, "weight": tokens}  # a step's mean is that over all of its tokens

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_loss.update(*self.mean_loss(batch))
        self.log("val_loss", self.val_loss, prog_bar=True)

    def configure_optimizers(self) -> Dict[str, Any]:
        rate, steps = self.hparams["rate"], self.trainer.total_steps
        groups = no_weight_decay(self, weight_decay=0.05)  # not of norms, biases, positions
        # A gradient that is only rounding (that of the keys' biases) is divided by eps, too: with
        # OneFlow's 1e-8 it would move its weight as any other.
        optimizer = flow.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), eps=1e-6)
        cosine = CosineAnnealingLR(optimizer, steps, eta_min=rate / 10)
        warmup = max(1, round(self.hparams["warmup"] * steps))
        return {"optimizer": optimizer, "lr_scheduler": WarmupLR(cosine, 0.0, warmup)}

    def write(self, count: int, seed: int = 0) -> List[str]:
        """So many sentences, each character drawn by what the model thinks of it."""
        draw = np.random.RandomState(seed)
        tokens = np.full((count, LENGTH), PAD, dtype=np.int64)
        tokens[:, 0] = END
        self.eval()
        with flow.no_grad():
            for place in range(LENGTH - 1):
                scores = self(flow.tensor(tokens, device=self.device))[:, place].numpy()
                scores[:, PAD] = -np.inf
                # The largest of scores and Gumbel noise is a draw from their softmax.
                tokens[:, place + 1] = (scores + draw.gumbel(size=scores.shape)).argmax(axis=1)
        texts = [[*row[1:], END] for row in tokens.tolist()]
        return ["".join(CHARACTERS[t - 2] for t in row[: row.index(END)]) for row in texts]


# ---------------------------------------------------------------------- the run


def train(arguments: argparse.Namespace) -> Tuple[LanguageModel, Trainer]:
    """Fit a language model; return it and what knows its course."""
    data, held_out = loaders(arguments.batch_size)
    seed_everything(arguments.seed)
    task = LanguageModel()
    trainer = Trainer(
        mode=arguments.mode,
        device=arguments.device,
        max_epochs=arguments.epochs,
        accumulate_grad_batches=arguments.accumulate,
        gradient_clip_val=1.0,
        seed=arguments.seed,
        cpu_speedups=True,  # OneFlow's layer norms would take most of the time on a CPU
        log_every_n_steps=1,
        callbacks=LearningRateMonitor(),
        default_root_dir=arguments.logs,
    )
    trainer.fit(task, data, held_out)
    return task, trainer


def digest(module: nn.Module) -> str:
    """What tells these weights from all others."""
    state = module.state_dict()
    kept = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        kept.update(np.ascontiguousarray(state[name].numpy()).tobytes())
    return kept.hexdigest()


def plot(path: str, trainer: Trainer) -> None:
    """Draw loss and rate by step to ``path``, a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    def curve(name: str) -> Tuple[List[int], List[float]]:
        rows = [row for row in trainer.history if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    left.plot(*curve("loss"), linewidth=0.8, label="a batch of each step")
    left.plot(*curve("val_loss"), marker="o", label="held-out sentences")
    left.set(xlabel="optimizer step", ylabel="nats a character", title="Loss", ylim=(0, None))
    left.legend()
    left.grid(alpha=0.3)
    name = next(each for row in trainer.history for each in row if each.startswith("lr/"))
    right.plot(*curve(name))
    right.set(xlabel="optimizer step", ylabel="learning rate", title="Warm-up, then a cosine")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mode", choices=["eager", "graph"], default="graph")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8, help="sentences in a batch")
    parser.add_argument("--accumulate", type=int, default=4, help="batches in a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", metavar="FOLDER", default="logs")
    parser.add_argument("--plot", metavar="FILE.png", help="draw loss and rate; needs matplotlib")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """Train, write, draw; return the exit code."""
    arguments = parse(argv)
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        print("--plot needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 1
    try:
        task, trainer = train(arguments)
    except OFEngineError as error:
        print(error, file=sys.stderr)
        return 1
    written = task.write(100)
    print("\nWhat it writes:", *written[:8], sep="\n  ")
    right = sum(map(is_right, written))
    print(f"{right} of {len(written)} sentences are right by the grammar.")
    print(f"held-out loss: {trainer.callback_metrics['val_loss']:.4f} nats a character")
    print(f"the weights' digest: {digest(task)}")
    if arguments.plot:
        plot(arguments.plot, trainer)
        print(f"The picture is {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
