"""The cookbook's whole loop against ``Trainer.fit``, data loading and transforms included.

Images of CIFAR-10's shape, made by the script. By hand: the loop of the README's "Before and
after", with a PIL transform for each sample and ``loss.item()`` at each step, as the cookbook has
it. The engine trains over the same DataLoader, with its defaults, and once more over
``in_memory_loader``, which gives the same batches, bit for bit. Cookbook and engine run with one
worker, too. An epoch over a list of batches that were made before tells what the data cost: the
share of an epoch beyond it waits for them::

    python benchmarks/cookbook.py
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import tempfile
import time
from functools import partial
from typing import Any, List, Tuple

from _measure import Report, alternate, child, parser, show, tell

BATCH = 32
EPOCHS = 3
KINDS = (
    "cookbook",
    "engine",
    "engine, in_memory_loader",
    "cookbook, 1 worker",
    "engine, 1 worker",
    "engine, batches made before",
)


def run(kind: str, mode: str, network: str, images: int) -> Tuple[float, float]:
    """Seconds of an epoch, the median of those after the first, which compiles.

    Of all of it, and of what comes after its last batch.
    """
    import _cases
    import numpy as np
    from flowvision import transforms
    from oneflow import nn
    from oneflow.utils.data import DataLoader

    from ofengine import Callback, ImageArrays, Trainer, in_memory_loader
    from ofengine._oneflow.session import synchronize

    generator = np.random.RandomState(0)
    pixels = generator.randint(0, 256, (images, 32, 32, 3)).astype("uint8")
    labels = generator.randint(0, 10, images)
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        ]
    )

    dataset = ImageArrays(pixels, labels, transform)
    make: Any = in_memory_loader if "in_memory" in kind else DataLoader
    workers = {"num_workers": int(kind.split()[1])} if "worker" in kind else {}
    data: Any = make(dataset, batch_size=BATCH, shuffle=True, **workers)
    if "before" in kind:
        data = list(data)
    model, loss_fn = getattr(_cases, network)(), nn.CrossEntropyLoss()
    moments: List[float] = []
    ends: List[float] = []
    if "cookbook" in kind:
        optimizer = _cases.sgd([{"params": model.parameters(), "lr": 1e-3, "lr_scale": 0.9}])
        graph: Any = None
        if mode == "graph":
            graph = _cases.hand_graph(model, loss_fn, optimizer)
        model.train()
        for _ in range(EPOCHS):
            moments.append(time.perf_counter())
            for batch, (x, y) in enumerate(data):
                if graph is not None:
                    loss = graph(x, y)
                else:
                    loss = loss_fn(model(x), y)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if batch % 10 == 0:
                        for group in optimizer.param_groups:
                            group["lr"] *= group["lr_scale"]
                loss.item()
        moments.append(time.perf_counter())
        ends = moments[1:]
    else:

        class Clock(Callback):
            def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
                moments.append(time.perf_counter())

            def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
                synchronize()  # the last loss was read, but its backward may be running
                ends.append(time.perf_counter())

            on_train_end = on_train_epoch_start

        groups = [{"params": list(model.parameters()), "lr": 1e-3, "lr_decay_scale": 0.9}]
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            trainer = Trainer(
                mode=mode,
                device="cpu",
                max_epochs=EPOCHS,
                callbacks=[Clock()],
                default_root_dir=folder,
            )
            trainer.fit(_cases.Task(model, loss_fn, groups=groups), data)
    return (
        statistics.median(b - a for a, b in zip(moments[1:], moments[2:])),
        statistics.median(b - a for a, b in zip(ends[1:], moments[2:])),
    )


def main() -> None:
    """Run the processes and report."""
    options = parser(__doc__).parse_args()
    if options.child:
        kind, mode, network, images = options.child.split("|")
        print(json.dumps(run(kind, mode, network, int(images))))
        return
    rounds = 1 if options.quick else 3
    report = Report("cookbook", "The cookbook's loop, a whole epoch with its data")
    report.note(
        f"""Batches of {BATCH} images, MobileNetV2 over 640 and the small CNN over 1,920 of them,
        cropped and flipped at random as for CIFAR-10. {rounds} process(es) of each kind, in turns;
        an epoch after the first, checkpoint and log files of the engine's defaults included: they
        are what comes after the last batch, which in an epoch of all 50,000 images would count
        78 and 26 times less, and which the last ratio leaves out. Median and quartiles; ratios
        round by round."""
    )
    rows = []
    for network, images in (("small_cnn", 1920), ("mobilenet_v2", 640)):
        for mode in ("eager", "graph"):
            runs = {
                kind: partial(child, [__file__, "--child", f"{kind}|{mode}|{network}|{images}"])
                for kind in KINDS
            }
            seen = alternate(runs, rounds)
            tell(f"{network}, {mode}")
            report.raw[f"{network}|{mode}"] = seen
            for kind in KINDS:
                whole = [pair[0] for pair in seen[kind]]
                batches = [pair[0] - pair[1] for pair in seen[kind]]
                by_hand = [pair[0] for pair in seen["cookbook"]]
                ready = [pair[0] - pair[1] for pair in seen[KINDS[-1]]]
                cells = [
                    show(whole, 2),
                    show([b / a for a, b in zip(by_hand, whole)], 2),
                    show([pair[1] for pair in seen[kind]], 2),
                    show([b / a for a, b in zip(by_hand, batches)], 2),
                    show([100 * (1 - b / a) for a, b in zip(batches, ready)], 0),
                ]
                rows.append([network, mode, kind, *cells])
    header = ["network", "mode", "loop", "seconds an epoch", "ratio to the cookbook"]
    end = ["after the last batch, s", "ratio without it", "waiting for data, %"]
    report.table([*header, *end], rows)
    report.save(options.json)


if __name__ == "__main__":
    main()
