"""in_memory_loader gives what DataLoader gives, bit for bit, order and random draws included."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import oneflow as flow
import pytest
from flowvision import transforms
from flowvision.data import Mixup, RandomErasing
from flowvision.datasets import CIFAR10, MNIST
from flowvision.transforms import functional
from helpers import assert_same_weights, fill_deterministically, quiet_trainer
from oneflow import nn
from oneflow.utils.data import DataLoader, Dataset, Subset, TensorDataset
from oneflow.utils.data._utils.collate import default_collate

from ofengine import Callback, ConfigurationError, ImageArrays, TaskModule, in_memory_loader

ALL_JITTER = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
NORMALIZE = [transforms.ToTensor(), transforms.Normalize((0.49, 0.48, 0.44), (0.2, 0.3, 0.25))]
TRANSFORMS: Dict[str, List[Any]] = {
    "ToTensor": [transforms.ToTensor()],
    "Normalize": NORMALIZE,
    "as for CIFAR-10": [
        transforms.RandomCrop(12, padding=2), transforms.RandomHorizontalFlip(), *NORMALIZE,
    ],
    "both flips": [
        transforms.RandomHorizontalFlip(0.3), transforms.RandomVerticalFlip(0.7), *NORMALIZE,
    ],
    "crops between flips": [
        transforms.RandomHorizontalFlip(), transforms.RandomCrop((10, 8)),
        transforms.RandomVerticalFlip(), transforms.RandomCrop(7), *NORMALIZE,
    ],
    "CenterCrop": [transforms.CenterCrop(9), *NORMALIZE],
    "CenterCrop to a larger size": [transforms.CenterCrop((17, 15)), *NORMALIZE],
    "Pad": [
        transforms.Pad(1), transforms.Pad((2, 3)), transforms.Pad([1, 2, 3, 4], 9), *NORMALIZE,
    ],
    "nested": [
        transforms.Compose([transforms.RandomHorizontalFlip()]), transforms.Compose(NORMALIZE),
    ],
    "a crop that fits": [transforms.RandomCrop(12), *NORMALIZE],
    "a crop that is padded where needed": [
        transforms.RandomCrop((16, 11), pad_if_needed=True), *NORMALIZE,
    ],
    "Resize, which is done once": [
        transforms.Resize((9, 14)), transforms.CenterCrop(8), transforms.Pad(1),
        transforms.RandomHorizontalFlip(), *NORMALIZE,
    ],
    "Resize behind a crop": [transforms.RandomCrop(9), transforms.Resize(11), *NORMALIZE],
    "RandomResizedCrop": [
        transforms.RandomResizedCrop((10, 7)), transforms.RandomHorizontalFlip(),
        transforms.RandomResizedCrop(9), *NORMALIZE,
    ],
    "ColorJitter": [
        transforms.ColorJitter(0.4, 0.4, 0.4, 0.1), transforms.RandomHorizontalFlip(), *NORMALIZE,
    ],
    "ColorJitter of a part": [
        transforms.RandomVerticalFlip(), transforms.ColorJitter(0, 0.4, hue=0.2),
        transforms.ColorJitter(), *NORMALIZE,
    ],
    "RandomErasing": [*NORMALIZE, RandomErasing(0.8, device="cpu")],
    "RandomErasing with colours": [
        transforms.RandomHorizontalFlip(), *NORMALIZE, RandomErasing(mode="rand", device="cpu"),
    ],
    "RandomErasing before Normalize": [
        NORMALIZE[0], RandomErasing(0.8, mode="pixel", max_count=3, device="cpu"),
        RandomErasing(0.8, device="cpu"), NORMALIZE[1],
    ],
    "all that draws": [
        transforms.Resize(13), transforms.RandomResizedCrop(12), ALL_JITTER,
        transforms.RandomHorizontalFlip(), *NORMALIZE, RandomErasing(mode="pixel", device="cpu"),
    ],
}  # fmt: skip


def pixels(count: int = 23, shape: Tuple[int, ...] = (12, 12, 3)) -> Tuple[Any, Any]:
    generator = np.random.RandomState(0)
    return (
        generator.randint(0, 256, (count, *shape)).astype("uint8"),
        generator.randint(0, 10, count),
    )


def arrays(name: str = "as for CIFAR-10", **options: Any) -> ImageArrays:
    return ImageArrays(*pixels(), transform=transforms.Compose(TRANSFORMS[name]), **options)


def passes(make: Callable[..., DataLoader], dataset: Any, **options: Any) -> List[bytes]:
    """All batches of three passes, and what the generators give afterwards."""
    random.seed(2)
    np.random.seed(3)
    flow.manual_seed(4)
    if options.pop("given", True):
        options["generator"] = flow.Generator("cpu")
    loader = make(dataset, **{"batch_size": 5, **options})
    generator = loader.generator
    generator.manual_seed(5)
    found = []
    for _ in range(3):
        for batch in loader:
            for each in batch:
                found.append(repr((each.shape, each.dtype)).encode() + each.numpy().tobytes())
    after = np.random.rand(), flow.rand(1).item(), flow.rand(1, generator=generator).item()
    return [*found, repr((after, random.random(), len(loader))).encode()]


def check(dataset: Any, theirs: Callable[..., DataLoader] = DataLoader, **options: Any) -> None:
    own = {name: options.pop(name) for name in ("batch_transform",) if name in options}
    ours = passes(in_memory_loader, dataset, **own, **options)
    assert len(ours) > 15
    assert ours == passes(theirs, dataset, **options)


@pytest.mark.parametrize("shuffle", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_batches_are_the_same(name: str, shuffle: bool) -> None:
    check(arrays(name), shuffle=shuffle)


def test_without_a_generator() -> None:
    check(arrays(), shuffle=True, given=False)


def test_with_drop_last_and_a_transform_of_targets() -> None:
    check(arrays(target_transform=lambda target: target * 2.5), shuffle=True, drop_last=True)


def test_with_a_transform_of_targets_that_draws_from_all_generators() -> None:
    def change(target: int) -> float:
        return target + random.random() + np.random.rand() + flow.rand(1).item()

    check(arrays("all that draws", target_transform=change), shuffle=True)


@pytest.mark.parametrize("most", [0, 2**30])
def test_images_are_resized_once_where_there_is_room(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ofengine.data.in_memory._MOST_KEPT", most)
    seen: List[Any] = []
    resize = functional.resize
    dataset = arrays("Resize, which is done once")
    check(dataset, shuffle=True)
    loader = in_memory_loader(Subset(dataset, range(10)), batch_size=5)
    monkeypatch.setattr(functional, "resize", lambda *a: seen.append(1) or resize(*a))
    for _ in range(3):
        for _ in loader:
            pass
    assert len(seen) == (10 if most else 30)


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.8, 1.0)])
def test_mixup(alphas: Tuple[float, float]) -> None:
    mixup = Mixup(*alphas, num_classes=10)

    def theirs(dataset: Any, **options: Any) -> DataLoader:
        return DataLoader(
            dataset, **options, collate_fn=lambda samples: mixup(*default_collate(samples))
        )

    dataset = arrays()
    check(dataset, theirs, batch_size=4, shuffle=True, drop_last=True, batch_transform=mixup)
    in_both = TensorDataset(flow.tensor(pixels()[0]).to(flow.float32), flow.tensor(pixels()[1]))
    check(in_both, theirs, batch_size=4, drop_last=True, batch_transform=mixup)
    before = flow.tensor(pixels()[0]).to(flow.float32).numpy()
    assert np.array_equal(in_both.tensors[0].numpy(), before)  # Mixup writes into its images


def test_parts_of_parts_of_a_dataset() -> None:
    half = Subset(arrays(), list(range(22, 0, -1)))
    check(Subset(half, [3, 1, 4, 15, 9, 2, 6, 5, 8, 20, 7]), shuffle=True)


def test_tensors() -> None:
    generator = np.random.RandomState(0)
    x = flow.tensor(generator.standard_normal((23, 3, 4)).astype("float32"))
    check(TensorDataset(x, flow.arange(23)), shuffle=True)


def test_flowvisions_cifar10() -> None:
    dataset = object.__new__(CIFAR10)
    data, targets = pixels()
    dataset.data, dataset.targets = data, targets.tolist()
    dataset.transform = transforms.Compose(TRANSFORMS["as for CIFAR-10"])
    dataset.target_transform = None
    check(dataset, shuffle=True)


def test_flowvisions_mnist() -> None:
    dataset = object.__new__(MNIST)
    data, targets = pixels(shape=(12, 12))
    dataset.data, dataset.targets = flow.tensor(data), flow.tensor(targets)
    dataset.transform = transforms.Compose(
        [
            transforms.Resize(11),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.1),
            transforms.RandomCrop(12, padding=1),
            transforms.ToTensor(),
            transforms.Normalize(0.1, 0.3),
        ]
    )
    dataset.target_transform = None
    check(dataset, shuffle=True)


class Linear(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12 * 12 * 3, 10)
        fill_deterministically(self, spread=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.layer(batch[0].reshape(-1, 432)), batch[1])

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1)


class Saves(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 7:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("seed", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_a_run_goes_on_with_either_loader(mode: str, seed: Any, tmp_path: Path) -> None:
    dataset = arrays("all that draws")

    def run(make: Any, **arguments: Any) -> TaskModule:
        random.seed(0)
        np.random.seed(1)
        flow.manual_seed(2)
        generator = flow.Generator("cpu")
        generator.manual_seed(3)
        task = Linear()
        callbacks = Saves(tmp_path / "a.safetensors") if not arguments else None
        trainer = quiet_trainer(mode=mode, max_epochs=2, seed=seed, callbacks=callbacks)
        trainer.fit(
            task, make(dataset, batch_size=5, shuffle=True, generator=generator), **arguments
        )
        return task

    whole = run(DataLoader)
    assert_same_weights(run(in_memory_loader), whole)
    for make in (DataLoader, in_memory_loader):
        assert_same_weights(run(make, ckpt_path=tmp_path / "a.safetensors"), whole)


# ---------------------------------------------------------------------- what has no such form


class Own(Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return index


class OwnItems(ImageArrays):
    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)


@pytest.mark.parametrize(
    "dataset, match",
    [
        (Own(), "cannot take batches out of Own"),
        (OwnItems(*pixels()), "cannot take batches out of OwnItems"),
        (ImageArrays(*pixels()), "makes no tensors: add"),
        (ImageArrays(*pixels(), transform=transforms.Resize(8)), "makes no tensors: add"),
        (
            ImageArrays(*pixels(), transform=transforms.Compose([*NORMALIZE, NORMALIZE[0]])),
            r"of the transform ToTensor\(\), or not at this place",
        ),
        (
            ImageArrays(*pixels(), transform=transforms.RandomGrayscale()),
            "of the transform RandomGrayscale",
        ),
        (
            ImageArrays(
                *pixels(), transform=transforms.Compose([transforms.RandomCrop(13), *NORMALIZE])
            ),
            r"RandomCrop\(size=\(13, 13\), padding=None\) is larger than the images, which are "
            "12 x 12",
        ),
        (
            ImageArrays(*pixels(), transform=transforms.Compose([*NORMALIZE, RandomErasing()])),
            r"RandomErasing\(device='cuda'\) erases there, .* write RandomErasing\(..., device=",
        ),
        (
            ImageArrays(*pixels(shape=(12, 12)), transform=transforms.Compose(NORMALIZE)),
            r"Normalize\(.*\) does not fit images of 1 channel",
        ),
        (ImageArrays(*pixels(), transform=abs), "of the transform <built-in function abs>"),
        (
            ImageArrays(*pixels(), transform=transforms.Pad(1, padding_mode="reflect")),
            "of the transform Pad",
        ),
        (
            ImageArrays(
                *pixels(), transform=transforms.Compose([*NORMALIZE, transforms.CenterCrop(3)])
            ),
            "or not at this place",
        ),
    ],
)
def test_what_has_no_form_for_batches_is_told(dataset: Any, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        in_memory_loader(dataset)


@pytest.mark.parametrize(
    "mixup, batch_size, match",
    [
        (3, 4, "batch_transform=3: give a function"),
        (Mixup(num_classes=10), 5, "a batch has 5: give an even batch_size"),
        (Mixup(num_classes=10), 4, r"a batch has 3: write drop_last=True"),
        (Mixup(num_classes=9), 22, "a batch has 1: write drop_last=True"),
        (Mixup(mode="elem", num_classes=10), 4, 'needs np.bool, .* write mode="batch"'),
    ],
)
def test_what_mixup_would_fail_at_is_told(mixup: Any, batch_size: int, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        in_memory_loader(arrays(), batch_size=batch_size, batch_transform=mixup)


def test_too_few_classes_for_mixup_are_told() -> None:
    highest = int(max(pixels()[1]))
    with pytest.raises(ConfigurationError, match=f"write num_classes={highest + 1} or more"):
        in_memory_loader(
            arrays(), batch_size=4, drop_last=True, batch_transform=Mixup(num_classes=highest)
        )


@pytest.mark.parametrize("batch_size", [0, 2.5, "4", True])
def test_a_wrong_batch_size_is_told(batch_size: Any) -> None:
    with pytest.raises(ConfigurationError, match="batch_size"):
        in_memory_loader(arrays(), batch_size=batch_size)


@pytest.mark.parametrize(
    "data, match",
    [
        (np.zeros((3, 4, 4)), "give uint8"),
        (np.zeros((3, 4), dtype="uint8"), "give uint8"),
        (np.zeros((4, 4, 4), dtype="uint8"), "4 images and 3 targets"),
    ],
)
def test_wrong_arrays_are_told(data: Any, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        ImageArrays(data, [0, 1, 2])
