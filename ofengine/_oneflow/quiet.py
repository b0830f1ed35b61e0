"""A clean terminal while ofengine imports OneFlow 0.9, which writes to descriptor 2 from C++."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from typing import ContextManager, Iterator

_NOISE = rb"^libibverbs not available, ibv_fork_init skipped\n"
if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))):
    # With a GPU these lines are news: its driver is missing or too old.
    _NOISE += (
        rb"|^[WE]\S+ .* cuda_device_(descriptor_class|manager_factory)\.cpp:\d+\] .*"
        rb"CUDA driver version is insufficient for CUDA runtime version\n"
    )


def quietly() -> ContextManager[None]:
    """Hold back what is written to descriptor 2 in the block; pass on all but OneFlow's noise.

    Not where descriptor 2 is closed, and not for one of several ranks: it may wait here for the
    others and be ended, and its last words must come out when they are said.
    """
    try:
        os.fstat(2)
    except OSError:
        return contextlib.nullcontext()
    several = os.environ.get("WORLD_SIZE", "1") != "1"  # OneFlow itself sets 1
    return contextlib.nullcontext() if several else _held_back()


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            with open(2, "wb", closefd=False) as out:
                out.write(re.sub(_NOISE, b"", held.read(), flags=re.MULTILINE))
