"""Where OneFlow's compiled core is."""

from __future__ import annotations

import glob
import os

import oneflow as flow


def liboneflow() -> str:
    """The path of the library that holds OneFlow's compiled core.

    Raises:
        OSError: it is not where the wheels of OneFlow 0.9 have it.
    """
    folder = os.path.join(os.path.dirname(flow.__file__), os.pardir, "oneflow.libs")
    paths = glob.glob(os.path.join(glob.escape(folder), "liboneflow-*.so"))
    if len(paths) != 1:
        raise OSError("liboneflow was not found")
    return paths[0]
