"""CachedImageFolder gives what ImageFolder gives, bit for bit, and decodes each image once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import shutil
import signal
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import oneflow as flow
import pytest
from flowvision import transforms
from flowvision.datasets import ImageFolder
from oneflow.utils.data import DataLoader
from PIL import Image

from ofengine import (
    CachedImageFolder,
    ConfigurationError,
    DataError,
    OFEngineWarning,
    in_memory_loader,
)
from ofengine.data import image_folder

IMAGES = 7
REST = [
    transforms.RandomCrop(8, padding=1), transforms.RandomHorizontalFlip(),
    transforms.ToTensor(), transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
]  # fmt: skip
TRANSFORMS: Dict[str, Any] = {
    "none": None,
    "one that draws": transforms.RandomCrop(5),
    "a chain that draws at once": transforms.Compose(REST),
    "Resize alone": transforms.Resize(9),
    "Resize of the shorter edge": transforms.Compose([transforms.Resize(9), *REST]),
    "Resize and CenterCrop": transforms.Compose(
        [transforms.Compose([transforms.Resize(9)]), transforms.CenterCrop(8), *REST]
    ),
    "a function": lambda image: image.rotate(90),
}
TO_ONE_SIZE = TRANSFORMS["Resize and CenterCrop"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    generator = np.random.RandomState(0)
    for index in range(IMAGES):
        folder = tmp_path / "images" / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.randint(0, 256, (10 + index, 21 - index, 3)).astype("uint8")
        image = Image.fromarray(pixels) if index else Image.fromarray(pixels[..., 0])
        image.save(folder / f"{index}.{('png', 'jpg')[index % 2]}")
    return tmp_path / "images"


def opened(root: Path, transform: Any = TO_ONE_SIZE, **options: Any) -> CachedImageFolder:
    return CachedImageFolder(root, transform, **{"cache_dir": root.parent / "cache", **options})


def half_more(target: int) -> float:
    return target + 0.5


def items(dataset: Any) -> List[Any]:
    random.seed(1)
    np.random.seed(2)
    flow.manual_seed(3)
    made = [dataset[index] for index in (*range(len(dataset)), -1)]
    numbers = [each if isinstance(each, flow.Tensor) else flow.tensor(np.array(each))
               for each, _ in made]  # fmt: skip
    return [(each.shape, each.dtype, each.numpy().tobytes(), target)
            for each, (_, target) in zip(numbers, made)]  # fmt: skip


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> List[str]:
    """The paths that were decoded."""
    paths: List[str] = []
    loader = image_folder.pil_loader
    monkeypatch.setattr(
        image_folder, "pil_loader", lambda path: (paths.append(path), loader(path))[1]
    )
    return paths


@pytest.mark.parametrize("name", TRANSFORMS)
def test_items_are_those_of_image_folder_and_decoded_once(
    name: str, root: Path, decoded: List[str]
) -> None:
    theirs = ImageFolder(str(root), TRANSFORMS[name], half_more)
    for _ in range(2):
        ours = opened(root, TRANSFORMS[name], target_transform=half_more)
        assert items(ours) == items(theirs)
        assert (ours.classes, ours.samples, ours.imgs, repr(ours.transforms)) == (
            theirs.classes, theirs.samples, theirs.imgs, repr(theirs.transforms),
        )  # fmt: skip
    assert sorted(decoded) == sorted(path for path, _ in theirs.samples)
    with pytest.raises(IndexError):
        ours[IMAGES]


def test_a_copy_for_another_process_maps_the_same_file(root: Path) -> None:
    ours = opened(root)
    sent = pickle.dumps(ours)
    assert len(sent) < 4000
    assert items(pickle.loads(sent)) == items(ours)


@pytest.mark.parametrize("shuffle", [False, True])
def test_whole_batches_are_those_of_a_data_loader(shuffle: bool, root: Path) -> None:
    def passes(make: Any, dataset: Any) -> List[bytes]:
        np.random.seed(2)
        flow.manual_seed(3)
        generator = flow.Generator("cpu")
        generator.manual_seed(4)
        loader = make(dataset, batch_size=3, shuffle=shuffle, generator=generator)
        return [each.numpy().tobytes() for _ in range(2) for batch in loader for each in batch]

    theirs = passes(DataLoader, ImageFolder(str(root), TO_ONE_SIZE))
    assert passes(in_memory_loader, opened(root)) == theirs
    assert len(theirs) == 12


# ---------------------------------------------------------------------- when it is decoded


def test_a_changed_folder_is_told_and_decoded_anew(root: Path, decoded: List[str]) -> None:
    opened(root)
    opened(root, transforms.Resize(4))  # another beginning, in another file
    changed = root / "cat" / "0.png"
    Image.new("RGB", (30, 20), (1, 2, 3)).save(changed)
    del decoded[:]
    with pytest.warns(OFEngineWarning, match="have changed since they were decoded"):
        ours = opened(root)
    assert len(decoded) == IMAGES
    assert items(ours) == items(ImageFolder(str(root), TO_ONE_SIZE))
    os.utime(changed, ns=(0, 5))
    with pytest.warns(OFEngineWarning, match="not needed any more"):
        opened(root)
    shutil.copy(changed, root / "dog" / "new.png")
    with pytest.warns(OFEngineWarning, match="have changed"):
        assert len(opened(root)) == IMAGES + 1


def _dies(root: Path) -> None:
    loader, left = image_folder.pil_loader, iter(range(IMAGES - 2))

    def load(path: str) -> Any:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return loader(path)

    image_folder.pil_loader = load
    opened(root)


def test_of_a_process_that_is_killed_meanwhile_nothing_is_left(
    root: Path, decoded: List[str]
) -> None:
    killed = multiprocessing.get_context("fork").Process(target=_dies, args=(root,))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    left = {path.name for path in (root.parent / "cache").iterdir()}
    assert any(name.endswith(".tmp") for name in left)
    assert items(opened(root)) == items(ImageFolder(str(root), TO_ONE_SIZE))
    assert len(decoded) == IMAGES
    left = {path.name for path in (root.parent / "cache").iterdir()}
    assert sorted(name.rpartition(".")[2] for name in left) == ["images", "lock"]


def _opens(root: Path, together: Any, decoded: Any, found: Any) -> None:
    loader = image_folder.pil_loader

    def load(path: str) -> Any:
        with decoded.get_lock():
            decoded.value += 1
        return loader(path)

    image_folder.pil_loader = load
    together.wait()
    dataset = opened(root, transforms.Resize((8, 9)))
    found.put([np.asarray(dataset[index][0]).tobytes() for index in range(IMAGES)])


def test_of_several_processes_one_decodes(root: Path) -> None:
    context = multiprocessing.get_context("fork")
    together, decoded, found = context.Barrier(3), context.Value("i", 0), context.Queue()
    arguments = (root, together, decoded, found)
    processes = [context.Process(target=_opens, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    seen = [found.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    theirs = ImageFolder(str(root), transforms.Resize((8, 9)))
    assert seen == [[np.asarray(image).tobytes() for image, _ in theirs]] * 3
    assert decoded.value == IMAGES


@pytest.mark.parametrize("damage", [b"", b"ofengine images1", b"other", None])
def test_what_is_no_whole_file_is_not_used(damage: Any, root: Path, decoded: List[str]) -> None:
    opened(root)
    (path,) = (root.parent / "cache").glob("*.images")
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    with pytest.warns(OFEngineWarning, match="is not whole"):
        ours = opened(root)
    assert items(ours) == items(ImageFolder(str(root), TO_ONE_SIZE))
    assert len(decoded) == 2 * IMAGES


# ---------------------------------------------------------------------- mistakes


def test_no_images_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        with pytest.raises(DataError, match=f"no images in .*{name}.* a folder of images for"):
            opened(tmp_path / name)


def test_an_unreadable_image_is_named(root: Path) -> None:
    path = root / "dog" / "1.jpg"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"no image"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"the image .*dog/1.jpg cannot be read .* repair it"):
            opened(root)
    assert not list((root.parent / "cache").glob("*.[it]m*"))


def test_too_small_a_disk_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 100))
    with pytest.raises(DataError, match=r"needs 0.00 GiB in .*cache, and 0.00 GiB are free"):
        opened(root)


def test_a_folder_that_cannot_be_written_is_told(root: Path) -> None:
    (root.parent / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot keep its images in .* give another cache_dir"):
        opened(root, cache_dir=root.parent / "file")


def test_files_that_change_meanwhile_are_told(root: Path, monkeypatch: Any) -> None:
    loader = image_folder.pil_loader

    def load(path: str) -> Any:
        os.utime(root / "cat" / "0.png", ns=(0, 5))
        return loader(path)

    monkeypatch.setattr(image_folder, "pil_loader", load)
    with pytest.raises(DataError, match="changed while they were decoded"):
        opened(root)
    assert not list((root.parent / "cache").glob("*.[it]m*"))


def test_wrong_arguments_are_told(root: Path) -> None:
    with pytest.raises(ConfigurationError, match="whose folders are the classes"):
        opened(root, cache_dir=root / "cache")
    with pytest.raises(ConfigurationError, match="cache_dir=None is none: give the path"):
        opened(root, cache_dir=None)
    with pytest.raises(ConfigurationError, match="leave loader out, or use ImageFolder"):
        opened(root, loader=Image.open)
    ours = opened(root, transforms.Compose([transforms.Resize(5), *REST]))
    with pytest.raises(ConfigurationError, match="make another CachedImageFolder"):
        ours.transform = None
    with pytest.raises(ConfigurationError, match=r"sizes .* begin the transform with Resize"):
        in_memory_loader(ours)


@pytest.mark.parametrize("name", ["\u56fe" * 80, "a" * 250, "a" + "\U0001f600" * 62])
def test_a_root_with_a_long_name_in_bytes_is_kept_too(name: str, root: Path) -> None:
    root = root.rename(root.with_name(name))
    expected = items(opened(root))
    (path,) = (root.parent / "cache").glob("*.images")
    assert path.name.startswith(name[:50])
    decoded_at = path.stat().st_mtime_ns
    assert items(opened(root)) == expected
    assert path.stat().st_mtime_ns == decoded_at
