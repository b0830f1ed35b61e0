"""What is free of the machine's memory, and what a process takes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Union

from ofengine.errors import ConfigurationError
from ofengine.run.arguments import is_whole

MOST_SHARE = 0.9
_MB = 1024 * 1024


def free_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Optional[int]:
    """The bytes that processes may yet take, of the machine or of this container; None: unknown."""
    free = bytes_of(proc / "meminfo", "MemAvailable")
    for most, now in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            left = int((groups / most).read_text()) - int((groups / now).read_text())
        except (OSError, ValueError):  # "max": no bound
            continue
        return max(0, left) if free is None else max(0, min(free, left))
    return free


def limit_of(limit: Union[int, float], free: Optional[int]) -> int:
    """The bytes that ``limit`` means: a share of what is ``free``, or so many.

    Raises:
        ConfigurationError: it is neither, or more than :data:`MOST_SHARE` of what is free.
    """
    if free is None:
        raise ConfigurationError(
            "scale_batch_size cannot bound the memory of its trials: this system has no "
            "/proc/meminfo that says what is free. Choose the batch size yourself."
        )
    if isinstance(limit, float) and 0 < limit <= MOST_SHARE:
        return int(limit * free)
    if is_whole(limit) and 0 < limit <= MOST_SHARE * free:
        return int(limit)
    raise ConfigurationError(
        f"memory_limit={limit!r}: give a share of the free memory, a float up to {MOST_SHARE}, or "
        f"bytes, up to {int(MOST_SHARE * free):,} of the {free:,} that are free."
    )


def bytes_of(file: Path, field: str) -> Optional[int]:
    """What a line such as ``VmRSS: 1000 kB`` says; None where there is none."""
    try:
        text = file.read_text()
    except OSError:
        return None
    found = [line.split() for line in text.splitlines() if line.startswith(field + ":")]
    return int(found[0][1]) * 1024 if found else None


def in_mb(count: int) -> str:
    """Bytes, for people."""
    return f"{count / _MB:,.0f} MB"
