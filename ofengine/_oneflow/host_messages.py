"""What OneFlow sends from the host of one process to those of all others."""

from __future__ import annotations

from typing import Optional

import oneflow as flow


def broadcast(own: Optional[bytes], of: int) -> bytes:
    """What the rank ``of`` gives, of any size; all ranks call it, the others with None.

    It is how OneFlow hands a checkpoint on that one rank has read. It takes no turn behind what a
    device has still to compute, and while it waits other threads of Python go on.
    """
    received: bytes = flow._oneflow_internal.cpu_broadcast(own, of)
    return received
