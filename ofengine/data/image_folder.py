"""flowvision's ImageFolder, whose images are decoded once and kept on the disk."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Tuple, Union

import numpy as np
from flowvision import transforms
from flowvision.datasets import ImageFolder
from flowvision.datasets.folder import pil_loader
from flowvision.datasets.vision import StandardTransform

from ofengine.constructors import tells_unknown_arguments
from ofengine.data.image_cache import ImageCache, cached
from ofengine.data.transform_chain import flat
from ofengine.data.transforms import as_image
from ofengine.disk import name_of, why_no_path
from ofengine.errors import ConfigurationError, DataError, said_by, warn

_KEPT_BEHIND = (transforms.Resize, transforms.CenterCrop)
"""Transforms that draw nothing and make images smaller, as a rule."""
_ENDING = ".images"


@tells_unknown_arguments
class CachedImageFolder(ImageFolder):
    """``flowvision.datasets.ImageFolder`` whose images are decoded once, into a file on the disk.

    The first time, all images are decoded and led through those ``Resize`` and ``CenterCrop``
    that the transform begins with; a progress bar shows how far this is. What comes out is
    kept as uint8 in one file in ``cache_dir``, three bytes a pixel, which is mapped into memory
    from then on. The items are those of ``ImageFolder(root, transform, target_transform)``, bit
    for bit. Where the paths, sizes or times of change of the files are others than before, or
    the transform begins otherwise, the images are decoded anew. Of several processes one
    decodes, and the others wait. The file is there when it is whole, and not before.

    Where all images have one size behind the first transforms, ``in_memory_loader`` takes whole
    batches out of it.

    Args:
        root: a folder with a folder of images for each class.
        transform: of a PIL image. It cannot be set anew.
        target_transform: of the number of a class.
        loader: not to be given; ImageFolder has it at this place. Images are decoded by PIL.
        is_valid_file: tells of a path whether it is an image; default: by its ending.
        cache_dir: the folder for the file; it is made. Not one within ``root``.

    Raises:
        ConfigurationError: the arguments do not fit together.
        DataError: there are no images, one of them cannot be read, or the file cannot be kept.
    """

    def __init__(
        self,
        root: Union[str, Path],
        transform: Optional[Callable[[Any], Any]] = None,
        target_transform: Optional[Callable[[Any], Any]] = None,
        loader: None = None,
        is_valid_file: Optional[Callable[[str], bool]] = None,
        *,
        cache_dir: Union[str, Path],
    ) -> None:
        if loader is not None:
            raise ConfigurationError(
                "CachedImageFolder decodes images by itself, for it cannot tell whether a loader "
                "of yours has changed since: leave loader out, or use ImageFolder."
            )
        folder = _checked(root, cache_dir)
        self._first, self._rest = _parted(transform)
        self._transform = transform
        try:
            super().__init__(
                os.fspath(root), target_transform=target_transform, is_valid_file=is_valid_file
            )
        except OSError as error:
            raise DataError(
                f"CachedImageFolder found no images in {str(root)!r} ({said_by(error)}): give a "
                "folder that has a folder of images for each class."
            ) from error
        if transform is not None or target_transform is not None:
            self.transforms = StandardTransform(transform, target_transform)
        self._images = self._open(folder)

    @property
    def transform(self) -> Any:
        """Of a PIL image, as it was given."""
        return self._transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        """Raise :class:`ConfigurationError`: what is kept is what the first transforms made."""
        if transform is not None or hasattr(self, "_images"):
            raise ConfigurationError(
                "the transform of a CachedImageFolder cannot be set anew, for its images are kept "
                "behind the first of the transforms: make another CachedImageFolder."
            )

    @property
    def rest_of_transform(self) -> Any:
        """What is done to the images that are kept; None for nothing."""
        return self._rest

    @property
    def data(self) -> Any:
        """The images that are kept, where all have one size: (images, height, width, 3), uint8.

        Raises :class:`ConfigurationError` where they have several.
        """
        sizes = self._images.sizes()
        if len(sizes) > 1:
            (height, width), (other_height, other_width) = sizes[0], sizes[-1]
            raise ConfigurationError(
                f"the images of {self.root} have {len(sizes)} sizes ({height} x {width}, "
                f"{other_height} x {other_width}, ...), and a batch has one: begin the transform "
                "with Resize((height, width)), or with Resize and CenterCrop."
            )
        return self._images.array()

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        """The transformed image and target of ``index``."""
        index = range(len(self))[index]
        image, target = as_image(self._images[index]), self.targets[index]
        if self._rest is not None:
            image = self._rest(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    # ------------------------------------------------------------------ what is kept

    def _open(self, folder: Path) -> ImageCache:
        sources = [path for path, _ in self.samples]
        name = Path(os.path.abspath(self.root)).name
        kind = _digest([os.path.abspath(self.root), _pillow(), *map(repr, self._first)])[:8]
        state = _digest(_states(self.root, sources))
        path = folder / name_of(name[:100], f"-{kind}-{state}{_ENDING}")
        stem = path.name[: -len(state + _ENDING)]

        def begin() -> Callable[[], None]:
            if path.exists():
                warn(f"{path} is not whole, or no longer: the images are decoded anew.")
                return check
            before = [each for each in folder.glob("*" + _ENDING) if each.name.startswith(stem)]
            if before:
                warn(
                    f"the files in {self.root} have changed since they were decoded: they are "
                    f"decoded anew, and {before[0]} is not needed any more."
                )
            return check

        def check() -> None:
            if _digest(_states(self.root, sources)) != state:
                raise DataError(
                    f"the files in {self.root} changed while they were decoded: start again when "
                    "nothing writes to them."
                )

        size_behind = functools.lru_cache(maxsize=1024)(self._size_behind)

        def size_of(source: str) -> Tuple[int, int]:
            from PIL import Image

            with Image.open(source) as image:  # no more than its head is read
                return size_behind(image.size)

        return cached(path, sources, size_of, self._image_of, name, begin)

    def _image_of(self, source: str) -> Any:
        return np.asarray(self._behind_first(pil_loader(source)))

    def _size_behind(self, size: Tuple[int, int]) -> Tuple[int, int]:
        from PIL import Image

        width, height = self._behind_first(Image.new("L", size)).size
        return height, width

    def _behind_first(self, image: Any) -> Any:
        for each in self._first:
            image = each(image)
        return image


def _checked(root: Union[str, Path], cache_dir: Union[str, Path]) -> Path:
    for name, path in (("root", root), ("cache_dir", cache_dir)):
        wrong = why_no_path(path) if isinstance(path, (str, Path)) else "is none"
        if wrong is not None:
            raise ConfigurationError(f"{name}={path!r} {wrong}: give the path of a folder.")
    inside, folder = Path(root).expanduser().resolve(), Path(cache_dir).expanduser().resolve()
    if folder == inside or inside in folder.parents:
        raise ConfigurationError(
            f"cache_dir={str(cache_dir)!r} is in {str(root)!r}, whose folders are the classes: "
            "give a folder elsewhere."
        )
    return folder


def _parted(transform: Any) -> Tuple[List[Any], Any]:
    """Those that the transform begins with, and behind which images are kept; and the rest."""
    every = list(flat(transform))
    first: List[Any] = []
    while every and type(every[0]) in _KEPT_BEHIND:
        first.append(every.pop(0))
    if not first:
        return [], transform
    return first, transforms.Compose(every) if every else None


def _states(root: str, sources: List[str]) -> Iterator[str]:
    for source in sources:
        try:
            found = os.stat(source)
        except OSError as error:
            raise DataError(
                f"the image {source} cannot be read ({said_by(error)}): repair it, or remove it."
            ) from error
        yield f"{os.path.relpath(source, root)}\0{found.st_size}\0{found.st_mtime_ns}"


def _digest(parts: Any) -> str:
    """What tells these texts from others."""
    made = hashlib.blake2b(digest_size=12)
    for part in parts:
        encoded = os.fsencode(part)
        made.update(len(encoded).to_bytes(8, "little") + encoded)
    return made.hexdigest()


def _pillow() -> str:
    import PIL

    return PIL.__version__
