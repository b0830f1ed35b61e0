"""A clean terminal while ofengine imports OneFlow 0.9, which writes to descriptor 2 from C++."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from typing import Iterator

_NOISE = rb"^libibverbs not available, ibv_fork_init skipped\n"
if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))):
    # With a GPU these lines are news: its driver is missing or too old.
    _NOISE += (
        rb"|^[WE]\S+ .* cuda_device_(descriptor_class|manager_factory)\.cpp:\d+\] .*"
        rb"CUDA driver version is insufficient for CUDA runtime version\n"
    )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Hold back what is written to descriptor 2 in the block; pass on all but OneFlow's noise.

    Not where descriptor 2 is closed, and not for one of several ranks (OneFlow itself sets 1): it
    may wait here for the others and be ended, and its last words must come out when they are said.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" or not os.path.exists("/dev/fd/2"):
        return (yield)
    with tempfile.TemporaryFile() as held, open(os.dup(2), "wb") as stderr:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr.fileno(), 2)
            held.seek(0)
            stderr.write(re.sub(_NOISE, b"", held.read(), flags=re.MULTILINE))
