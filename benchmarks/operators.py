"""Of what a training step on a CPU is made, layer by layer, with and without ``cpu_speedups``.

Each layer's forward and backward by itself, on numbers of the shapes that it sees in the network;
models of flowvision, an LSTM and a small transformer. Eagerly: a graph calls the same kernels::

    python benchmarks/operators.py
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Dict, List, Tuple

from _measure import Report, child, parser, tell
from cpu_speedups import MODELS

NAMES = (*MODELS, "ResNet-18", "ResNet-50", "LSTM", "transformer")
RESNETS = {"ResNet-18": ("resnet18", 8), "ResNet-50": ("resnet50", 2)}
LEAST = 0.03
"""A smaller share of the faster step has no row of its own."""
WORDS, WIDTH, LENGTH, SENTENCES = 1000, 128, 64, 16


def text_model(name: str) -> Any:
    """An LSTM of two layers, or a transformer of two blocks, that tells the next word."""
    import oneflow as flow
    from oneflow import nn

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(WORDS, WIDTH)
            self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
            self.head = nn.Linear(WIDTH, WORDS)

        def forward(self, x: Any) -> Any:
            return self.head(self.lstm(self.words(x))[0])

    class Attention(nn.Module):
        """Of queries, keys and values that lie side by side, in four heads."""

        def forward(self, qkv: Any) -> Any:
            n, length, _ = qkv.shape
            q, k, v = qkv.view(n, length, 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
            scores = flow.matmul(q, k.transpose(-2, -1)) * (WIDTH // 4) ** -0.5
            out = flow.matmul(scores.softmax(dim=-1), v)
            return out.transpose(1, 2).reshape(n, length, WIDTH)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.Sequential(
                nn.LayerNorm(WIDTH),
                nn.Linear(WIDTH, 3 * WIDTH),
                Attention(),
                nn.Linear(WIDTH, WIDTH),
            )
            self.think = nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(),
                nn.Linear(4 * WIDTH, WIDTH),
            )  # fmt: skip

        def forward(self, x: Any) -> Any:
            x = x + self.attend(x)
            return x + self.think(x)

    if name == "LSTM":
        return Recurrent()
    return nn.Sequential(nn.Embedding(WORDS, WIDTH), Block(), Block(), nn.Linear(WIDTH, WORDS))


def network(name: str) -> Tuple[Any, Any, Any]:
    """The model, a batch, and the labels of all that it puts out."""
    import flowvision.models
    import oneflow as flow

    if name in ("LSTM", "transformer"):
        words = flow.randint(0, WORDS, (SENTENCES, LENGTH))
        return text_model(name), words, words.view(-1)
    made, images = {**MODELS, **RESNETS}[name]
    side = 32 if name == "ResNet-18" else 224
    model = getattr(flowvision.models, made)(num_classes=10)
    return model, flow.randn(images, 3, side, side), flow.randint(0, 10, (images,))


def layers(name: str, quick: bool) -> Dict[str, Any]:
    """Milliseconds by kind of layer, as OneFlow has them and faster, and those of whole steps."""
    import oneflow as flow
    from _peer_layers import LayerTimes
    from oneflow import nn

    from ofengine import cpu_speedups

    model, batch, labels = network(name)
    model.train()
    loss_fn = nn.CrossEntropyLoss()

    def step() -> None:
        scores = model(batch)
        loss_fn(scores.view(-1, scores.shape[-1]), labels).backward()

    rounds = 1 if quick else 5
    times = LayerTimes(flow, model, step)
    own, own_step = times.by_class(rounds), times.timed(step, rounds)
    start = time.perf_counter()
    with cpu_speedups(model):
        faster, faster_step = times.by_class(rounds), times.timed(step, rounds)
    tell(f"{name}: {time.perf_counter() - start:.0f} s")
    return {"own": own, "faster": faster, "steps": [own_step, faster_step]}


def rows_of(name: str, found: Dict[str, Any]) -> List[List[str]]:
    """A row for each kind that matters, one for what is no layer, one for the step."""
    own, faster, (own_step, faster_step) = found["own"], found["faster"], found["steps"]
    rows: List[Tuple[Any, ...]] = []
    others = [0.0, 0.0, 0.0]
    for kind, (count, before) in sorted(own.items(), key=lambda item: -faster[item[0]][1]):
        after = faster[kind][1]
        is_small = after < LEAST * faster_step and before < LEAST * own_step
        if is_small or kind == "other layers":
            others = [a + b for a, b in zip(others, (count, before, after))]
        else:
            rows.append((kind, count, before, after))
    rows.append(("other layers", *others))
    between = [
        max(step - sum(row[i] for row in rows), 0.0)
        for i, step in ((2, own_step), (3, faster_step))
    ]
    rows.append(("between the layers", 0, *between))
    rows.append(("a step", 0, own_step, faster_step))
    return [
        [
            name,
            kind,
            f"{count:.0f}" if count else "",
            f"{before:.1f}",
            f"{after:.1f}",
            f"{after / before:.2f}" if before else "",
            f"{100 * after / faster_step:.0f}",
        ]
        for kind, count, before, after in rows
    ]


def main() -> int:
    """Run the processes and report."""
    options = parser(__doc__).parse_args()
    if options.child:
        print(json.dumps(layers(options.child, options.quick)))
        return 0
    quick = ["--quick"] * options.quick
    rows: List[List[str]] = []
    report = Report("operators", "Layers on a CPU, one by one")
    for name in NAMES if not options.quick else ("transformer",):
        found = child([__file__, "--child", name, *quick], timeout=1800)
        report.raw[name] = found
        rows += rows_of(name, found)
    report.note(
        f"""Forward and backward in milliseconds: each layer by itself on the shapes that it sees,
        with a wait after each, which a whole step has not, so that the layers of a network of many
        small ones are together more than its step. "Faster": within `cpu_speedups`. The share is
        that of the faster step; kinds below {100 * LEAST:.0f} % are put together. Between the
        layers are sums, attention, reshaping and the loss. Batches as in the table above;
        ResNet-18: 8 images of 3x32x32, ResNet-50: 2 of 3x224x224; LSTM and transformer:
        {SENTENCES} sentences of {LENGTH} words, width {WIDTH}, two layers. The fastest of
        {1 if options.quick else 5} runs."""
    )
    report.table(
        ["model", "layers", "how many", "own, ms", "faster, ms", "ratio", "share, %"], rows
    )
    report.save(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
