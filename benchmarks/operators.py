"""Of what a training step on a CPU is made, layer by layer, with and without ``cpu_speedups``.

Each layer's forward and backward by itself, on numbers of the shapes that it sees in the network;
models of flowvision, an LSTM and a small transformer. Eagerly: a graph calls the same kernels::

    python benchmarks/operators.py
"""

from __future__ import annotations

import json
import sys
from typing import Any, Dict, List, Tuple

from _measure import Report, child, parser, tell
from _models import LENGTH, MODELS, RESNETS, SENTENCES, TEXT, WIDTH, network

NAMES = (*MODELS, *RESNETS, *TEXT)
LEAST = 0.03
"""A smaller share of the faster step has no row of its own."""


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
        loss_fn(model(batch), labels).backward()

    rounds = 1 if quick else 5
    times = LayerTimes(flow, model, step)
    own, own_step = times.by_class(rounds), times.timed(step, rounds)
    with cpu_speedups(model):
        faster, faster_step = times.by_class(rounds), times.timed(step, rounds)
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
        tell(name)
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
