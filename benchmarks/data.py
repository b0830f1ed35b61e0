"""Whole batches in the place of samples: what a batch costs, and what of an epoch waits for it.

    python benchmarks/data.py

A batch is asked for while the device is idle, from a DataLoader and from ``in_memory_loader`` in
turns; both give the same numbers. Then the small CNN is trained in both modes by turns on batches
of ``in_memory_loader`` and on batches that were made before: what the former take longer is what
waits for data. And a worker process that has nothing to do but to hand batches over does so
OneFlow's way and the engine's.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import tempfile
import time
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Tuple

import oneflow as flow
from _measure import Report, alternate, child, parser, quartiles, show, tell
from oneflow.utils.data import DataLoader, Dataset

BATCH, IMAGES = 32, 1920
BLOCK = 10
"""Steps between two turns."""


def recipes() -> Dict[str, List[Any]]:
    """Chains of transforms, without what all of them end in."""
    from flowvision import transforms

    return {
        "none": [],
        "crop and flip, as for CIFAR-10": [
            transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
        ],
        "Resize(36), then these": [
            transforms.Resize(36), transforms.RandomCrop(32), transforms.RandomHorizontalFlip(),
        ],
        "RandomResizedCrop and flip": [
            transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip(),
        ],
        "these, ColorJitter and RandomErasing": [
            transforms.RandomResizedCrop(32), transforms.ColorJitter(0.4, 0.4, 0.4, 0.1),
            transforms.RandomHorizontalFlip(),
        ],
    }  # fmt: skip


def dataset(recipe: str) -> Any:
    """Images of CIFAR-10's shape."""
    import numpy as np
    from flowvision import transforms
    from flowvision.data import RandomErasing

    from ofengine import ImageArrays

    generator = np.random.RandomState(0)
    pixels = generator.randint(0, 256, (IMAGES, 32, 32, 3)).astype("uint8")
    chain = [
        *recipes()[recipe],
        transforms.ToTensor(),
        transforms.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)),
    ]
    chain += [RandomErasing(0.25, device="cpu")] if "Erasing" in recipe else []
    return ImageArrays(pixels, generator.randint(0, 10, IMAGES), transforms.Compose(chain))


def a_batch(recipe: str, batches: int) -> Dict[str, List[float]]:
    """Milliseconds of a batch, by who makes it."""
    from ofengine import in_memory_loader
    from ofengine._oneflow.session import synchronize

    makers: Dict[str, Callable[..., Any]] = {"sample": DataLoader, "batch": in_memory_loader}
    images = dataset(recipe)
    loaders = {name: make(images, batch_size=BATCH, shuffle=True) for name, make in makers.items()}
    for _ in loaders["batch"]:  # what is done once, is done
        pass
    took: Dict[str, List[float]] = {name: [] for name in makers}
    opened = {name: iter(loader) for name, loader in loaders.items()}
    for _ in range(batches):
        for name, batches_of in opened.items():
            synchronize()
            begun = time.perf_counter()
            next(batches_of)
            synchronize()
            took[name].append(1e3 * (time.perf_counter() - begun))
    return took


class Turns:
    """Batches by turns out of a loader, pass by pass, and out of a list; how long a turn takes."""

    def __init__(self, loader: Any, pairs: int) -> None:
        self.loader, self.pairs = loader, pairs
        self.ready = list(loader)[:BLOCK]
        self.seconds: List[Tuple[float, float]] = []

    def __len__(self) -> int:
        return 2 * BLOCK * (self.pairs + 1)

    def _passes(self) -> Iterator[Any]:
        while True:
            yield from self.loader

    def __iter__(self) -> Iterator[Any]:
        from ofengine._oneflow.session import synchronize

        loaded = self._passes()
        next(loaded)
        yield from self.ready  # the first steps compile
        yield from self.ready
        for pair in range(self.pairs):
            took: List[float] = []
            for turn in (0, 1) if pair % 2 else (1, 0):
                synchronize()
                begun = time.perf_counter()
                for step in range(BLOCK):
                    yield self.ready[step] if turn else next(loaded)
                synchronize()
                took.append(time.perf_counter() - begun)
            of_loader, of_list = took if pair % 2 else took[::-1]
            self.seconds.append((of_loader, of_list))


def training(mode: str, pairs: int) -> Dict[str, Any]:
    """Seconds of the turns, and the profiler's of asking for a batch against those of a step."""
    import _cases
    from oneflow import nn

    from ofengine import Trainer, in_memory_loader

    def trained(data: Any, **options: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            trainer = Trainer(
                mode=mode, device="cpu", default_root_dir=folder, **_cases.OFF, **options
            )
            trainer.fit(_cases.Task(_cases.small_cnn(), nn.CrossEntropyLoss()), data)
        return trainer

    loader = in_memory_loader(
        dataset("crop and flip, as for CIFAR-10"), batch_size=BATCH, shuffle=True
    )
    turns = Turns(loader, pairs)
    trained(turns, max_epochs=1)
    profile = trained(loader, max_epochs=3, profiler="simple").profile
    row = profile.rows["data: train_dataloader"]
    seconds = sum(each.seconds for each in profile.rows.values())
    return {"turns": turns.seconds, "profiler": row.seconds / seconds}


class Ready(Dataset):
    """Batches of 64 images, made before."""

    def __init__(self, batches: int) -> None:
        self.images = flow.randn(64, 3, 32, 32)
        self.targets = flow.arange(64)
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> Any:
        return self.images, self.targets


def handed_over(way: str, batches: int) -> List[float]:
    """Milliseconds a batch from one worker: of the main process's thread, of the worker's CPU."""
    from ofengine._oneflow.loaders import workers_noted

    around = workers_noted() if way == "the engine's" else contextlib.nullcontext()
    with around:
        loader = DataLoader(Ready(batches), batch_size=None, num_workers=1, collate_fn=list)
        given = iter(loader)
        next(given)
        thread = time.thread_time()
        for _ in given:
            pass
        thread = time.thread_time() - thread
        del given, loader
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return [1e3 * seconds / batches for seconds in (thread, used.ru_utime + used.ru_stime)]


def main() -> None:
    """Run the processes and report."""
    options = parser(__doc__).parse_args()
    if options.child:
        what, which, count = options.child.split("|")
        call: Any = {"batch": a_batch, "training": training, "worker": handed_over}[what]
        print(json.dumps(call(which, int(count))))
        return
    report = Report("data", "Batches in memory")
    report.note(
        f"""Milliseconds that a batch of {BATCH} images of 3 x 32 x 32 takes while the device is
        idle; ``ToTensor`` and ``Normalize`` are at the end of each chain. Both ways give the same
        numbers, bit for bit."""
    )
    rows = []
    for recipe in recipes():
        took = child([__file__, "--child", f"batch|{recipe}|{10 if options.quick else 50}"])
        report.raw[recipe] = took
        ratios = [ours / theirs for theirs, ours in zip(took["sample"], took["batch"])]
        rows.append([recipe, show(took["sample"], 2), show(took["batch"], 2), show(ratios, 3)])
        tell(recipe)
    report.table(["transforms", "DataLoader, ms", "in_memory_loader, ms", "ratio"], rows)
    report.note(
        f"""The small CNN, cropped and flipped at random: turns of {BLOCK} steps on batches of
        ``in_memory_loader`` and on batches that were made before. What the former take longer
        waits for data. ``profiler="simple"`` counts under data all the time until a batch is there;
        the draw of the flips waits for the steps handed over before, so that most of it is the
        step's: the device computes meanwhile."""
    )
    rows = []
    for mode in ("eager", "graph"):
        found = child([__file__, "--child", f"training|{mode}|{6 if options.quick else 40}"])
        report.raw[mode] = found
        shares = [100 * (1 - ready / loaded) for loaded, ready in found["turns"]]
        step = 1e3 * quartiles([loaded / BLOCK for loaded, _ in found["turns"]])[0]
        rows.append([mode, f"{step:.1f}", show(shares), f"{100 * found['profiler']:.0f}"])
        tell(mode)
    report.table(
        ["mode", "a step, ms", "waiting for data, %", "data in the profiler's table, %"], rows
    )
    report.note(
        """One worker hands over batches of 64 images that are ready: milliseconds of CPU a batch,
        the worker's with its start and end."""
    )
    ways = ("OneFlow's", "the engine's")
    count = 100 if options.quick else 1000
    of_ways = {way: partial(child, [__file__, "--child", f"worker|{way}|{count}"]) for way in ways}
    seen = alternate(of_ways, 1 if options.quick else 5)
    report.raw["workers"] = seen
    report.table(
        ["way", "main process, ms", "worker, ms"],
        [[way, *(show(list(each), 2) for each in zip(*seen[way]))] for way in ways],
    )
    report.save(options.json)


if __name__ == "__main__":
    main()
