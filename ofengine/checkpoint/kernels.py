"""Whether a run that goes on computes with other kernels than it had: last bits can differ."""

from __future__ import annotations

import logging
from typing import Mapping

from ofengine._oneflow.blas import kernels

log = logging.getLogger("ofengine")


def kernels_in_use(speedups: bool) -> Mapping[str, str]:
    """What a checkpoint notes of them."""
    return {"blas": kernels().core, "cpu_speedups": "on" if speedups else "off"}


def tell_kernels(noted: Mapping[str, str], speedups: bool) -> None:
    """Say so where what is in use on this CPU is not what was ``noted``."""
    own, in_use = kernels(), kernels_in_use(speedups)
    before, now = noted.get("blas", own.by_oneflow), in_use["blas"]  # earlier versions took that
    if before and now and before != now:
        as_before = before == own.by_oneflow
        log.warning(
            "resume: OneFlow's BLAS computes with kernels for %s now, and did with those for "
            "%s: last bits can differ from those of a run that never stopped%s.",
            now, before, " (OFENGINE_BLAS=as-is takes the same)" if as_before else "",
        )  # fmt: skip
    before, now = noted.get("cpu_speedups", "off"), in_use["cpu_speedups"]
    if before != now:
        log.warning(
            "resume: cpu_speedups is %s now, and was %s: last bits can differ from those of a "
            "run that never stopped.", now, before,
        )  # fmt: skip
