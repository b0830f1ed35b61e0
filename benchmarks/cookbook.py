"""The cookbook's whole loop against ``Trainer.fit``, data loading and transforms included.

Images of CIFAR-10's shape, made by the script. By hand: the loop of the README's "Before and
after", with a PIL transform for each sample and ``loss.item()`` at each step, as the cookbook has
it. The engine trains over the same DataLoader, with its defaults, and once more over batches
that are made from one array, which is a change of the data and not of the engine::

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
from typing import Any, List

from _measure import Report, alternate, child, parser, show, tell

BATCH = 32
EPOCHS = 3
KINDS = ("cookbook", "engine", "engine, array batches")


def run(kind: str, mode: str, network: str, images: int) -> float:
    """Seconds of an epoch, the median of those after the first, which compiles."""
    import _cases
    import numpy as np
    import oneflow as flow
    from flowvision import transforms
    from oneflow import nn
    from oneflow.utils.data import DataLoader, Dataset
    from PIL import Image

    from ofengine import Callback, Trainer

    generator = np.random.RandomState(0)
    pixels = generator.randint(0, 256, (images, 32, 32, 3)).astype("uint8")
    labels = generator.randint(0, 10, images)
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))]
    )

    class Images(Dataset):
        def __len__(self) -> int:
            return images

        def __getitem__(self, index: int) -> Any:
            return transform(Image.fromarray(pixels[index])), int(labels[index])

    class ArrayBatches:
        def __len__(self) -> int:
            return images // BATCH

        def __iter__(self) -> Any:
            order = np.random.permutation(images)
            for at in range(0, images, BATCH):
                chosen = order[at : at + BATCH]
                x = pixels[chosen].transpose(0, 3, 1, 2).astype("float32")
                x /= 255
                x -= 0.5
                x /= 0.25
                yield flow.from_numpy(x), flow.from_numpy(labels[chosen])

    data: Any = DataLoader(Images(), batch_size=BATCH, shuffle=True)
    model, loss_fn = getattr(_cases, network)(), nn.CrossEntropyLoss()
    moments: List[float] = []
    if kind == "cookbook":
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
    else:

        class Clock(Callback):
            def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
                moments.append(time.perf_counter())

            def on_train_end(self, trainer: Any, task: Any) -> None:
                moments.append(time.perf_counter())

        groups = [{"params": list(model.parameters()), "lr": 1e-3, "lr_decay_scale": 0.9}]
        if "array" in kind:
            data = ArrayBatches()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            trainer = Trainer(
                mode=mode,
                device="cpu",
                max_epochs=EPOCHS,
                callbacks=[Clock()],
                default_root_dir=folder,
            )
            trainer.fit(_cases.Task(model, loss_fn, groups=groups), data)
    return statistics.median(b - a for a, b in zip(moments[1:], moments[2:]))


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
        f"""Batches of {BATCH} images, MobileNetV2 over 160 and the small CNN over 640 of them.
        {rounds} process(es) of each kind, in turns; an epoch after the first, checkpoint and log
        files of the engine's defaults included. Median and quartiles; ratios round by round."""
    )
    rows = []
    for network, images in (("small_cnn", 640), ("mobilenet_v2", 160)):
        for mode in ("eager", "graph"):
            runs = {
                kind: partial(child, [__file__, "--child", f"{kind}|{mode}|{network}|{images}"])
                for kind in KINDS
            }
            seen = alternate(runs, rounds)
            tell(f"{network}, {mode}")
            report.raw[f"{network}|{mode}"] = seen
            for kind in KINDS:
                ratios = [b / a for a, b in zip(seen["cookbook"], seen[kind])]
                rows.append([network, mode, kind, show(seen[kind], 2), show(ratios, 2)])
    report.table(["network", "mode", "loop", "seconds an epoch", "ratio to the cookbook"], rows)
    report.save(options.json)


if __name__ == "__main__":
    main()
