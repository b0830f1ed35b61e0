"""A clean terminal: `import oneflow` without its two lines of known noise.

OneFlow 0.9 writes these to file descriptor 2, from C++, at every import on a machine
without a GPU::

    libibverbs not available, ibv_fork_init skipped
    W2022... cuda_device_descriptor_class.cpp:48] CUDA driver version is insufficient ...

and one more, ``cuda_device_manager_factory.cpp``, when the first graph is made.

While OneFlow is imported, descriptor 2 leads through a small ``sh`` process that drops
exactly those lines and passes every other one on at once. It is a process of its own
because OneFlow may stop the whole interpreter during its import (a taken port), or wait
there for other ranks: its last words must come out, and come out when they are said.
``GLOG_minloglevel`` is left alone for the same reason: it would hide them all.

`OFENGINE_KEEP_NOISE=1` in the environment switches all of this off.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Iterator, List, Optional, Sequence

# Patterns of the shell's `case`. The C++ file is part of each, so that a program which
# prints a like sentence is not cut short.
_NO_DRIVER = "CUDA driver version is insufficient for CUDA runtime version"
_NOISE = ["'libibverbs not available, ibv_fork_init skipped'"]
_NOISE_WITHOUT_GPU = [
    f"W*' cuda_device_descriptor_class.cpp:'*'] {_NO_DRIVER}'",
    f"E*' cuda_device_manager_factory.cpp:'*'] Failed to get cuda runtime version: {_NO_DRIVER}'",
]
_GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")

# Filters that outlive their block: somebody forked meanwhile and writes through them.
_still_in_use: List[subprocess.Popen[bytes]] = []


def quiet_oneflow_import() -> None:
    """Make the first `import oneflow` of this process a quiet one. Costs nothing twice."""
    wanted = not os.environ.get("OFENGINE_KEEP_NOISE")
    if wanted and "oneflow" not in sys.modules and OneFlowFinder not in sys.meta_path:
        sys.meta_path.insert(0, OneFlowFinder)


class OneFlowFinder:
    """Entry of `sys.meta_path` that finds OneFlow where Python would, with a quiet loader."""

    @classmethod
    def find_spec(
        cls, name: str, path: Optional[Sequence[str]] = None, target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        """Return OneFlow's spec, None for any other module."""
        if name != "oneflow":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _QuietLoader(spec.loader)
        return spec


class _QuietLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> Optional[ModuleType]:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if OneFlowFinder in sys.meta_path:
            sys.meta_path.remove(OneFlowFinder)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        with without_known_noise():
            self._loader.exec_module(module)


@contextlib.contextmanager
def without_known_noise() -> Iterator[None]:
    """Inside the block, drop OneFlow's known noise from descriptor 2 and nothing else.

    It works on the descriptor, so it does not mind what `sys.stderr` is. Where it cannot
    work (descriptor 2 is closed, no process can be started) the block runs unfiltered.
    """
    stderr = None if os.environ.get("OFENGINE_KEEP_NOISE") else _copy_of_stderr()
    child = None if stderr is None else _start_filter(stderr)
    if stderr is None or child is None or child.stdin is None:
        yield
        return
    _flush_stderr()
    os.dup2(child.stdin.fileno(), 2)
    child.stdin.close()
    try:
        yield
    finally:
        _flush_stderr()
        os.dup2(stderr, 2)
        os.close(stderr)
        _wait_for(child)


def _copy_of_stderr() -> Optional[int]:
    try:
        return os.dup(2)
    except OSError:
        return None


def _start_filter(stderr: int) -> Optional[subprocess.Popen[bytes]]:
    noise = list(_NOISE)
    if not any(os.path.exists(path) for path in _GPU_FILES):
        # With a GPU the same lines are news: its driver is missing or too old.
        noise += _NOISE_WITHOUT_GPU
    script = f"""
        while IFS= read -r line; do
            case $line in
                {" | ".join(noise)}) ;;
                *) printf '%s\\n' "$line" ;;
            esac
        done
        printf '%s' "$line" """
    try:
        return subprocess.Popen(
            ["/bin/sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=stderr,
            env={"LC_ALL": "C"},
            start_new_session=True,  # a Ctrl-C meant for Python must not end the filter
        )
    except OSError:
        os.close(stderr)
        return None


def _wait_for(child: subprocess.Popen[bytes]) -> None:
    """Wait until every line is out: the filter ends when nobody can write to it any more."""
    try:
        child.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        _still_in_use.append(child)


def _flush_stderr() -> None:
    with contextlib.suppress(Exception):
        sys.stderr.flush()
