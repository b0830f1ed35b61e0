"""Checkpoints: the file, what a run puts into it, how a run goes on from it.

The names below are what code outside of a run may want of a file.
"""

import ofengine._oneflow  # noqa: F401  first: it imports OneFlow quietly
from ofengine.checkpoint.file import (
    EXTENSION,
    FORMAT,
    FORMAT_VERSION,
    Checkpoint,
    encode,
    put,
    put_first,
    read,
    write,
)
from ofengine.checkpoint.header import metadata_of
from ofengine.checkpoint.weights import arrays_of, load_weights, save_weights
from ofengine.disk import remove_leftovers

__all__ = [
    "EXTENSION",
    "FORMAT",
    "FORMAT_VERSION",
    "Checkpoint",
    "arrays_of",
    "encode",
    "load_weights",
    "metadata_of",
    "put",
    "put_first",
    "read",
    "remove_leftovers",
    "save_weights",
    "write",
]
