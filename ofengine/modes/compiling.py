"""What surrounds the compiling of a graph: what is refused before, what is kept away during it."""

from __future__ import annotations

import contextlib
import gc
import io
import sys
from typing import Iterator

from oneflow import nn

from ofengine._oneflow.tracing import has_forward_hooks
from ofengine.errors import GraphModeError
from ofengine.task import TaskModule


def refuse_what_graphs_ignore(task: TaskModule) -> None:
    """Raise where a module does something that would silently be left out of a graph."""
    for name, module in task.named_modules():
        where = f"{type(task).__name__}.{name}" if name else type(task).__name__
        if has_forward_hooks(module):
            raise GraphModeError(
                f"{where} has a forward hook (register_forward_hook, register_forward_pre_hook or "
                "weight_norm), which OneFlow does not call in a static graph: write what it does "
                'into forward, or use mode="eager".'
            )
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            raise GraphModeError(
                f"{where} has max_norm={module.max_norm}, to which OneFlow does not keep in a "
                'static graph: leave it out, or use mode="eager".'
            )


@contextlib.contextmanager
def no_garbage_collected() -> Iterator[None]:
    """Keep the garbage collector from deleting an old graph while a new one is compiled.

    ``nn.Graph.__del__`` resets a table of variables that all graphs share. Where that happens
    in the middle of a compilation, it fails: "must be a variable created in nn.Graph".
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def compile_quietly() -> Iterator[None]:
    """Hold back the copy of an exception's text that ``nn.Graph`` prints to stderr."""
    held, stderr = io.StringIO(), sys.stderr
    sys.stderr = held
    text = ""
    try:
        yield
    except BaseException as error:
        text = f"{error}\n" if str(error) else ""
        raise
    finally:
        sys.stderr = stderr
        stderr.write(held.getvalue().replace(text, "") if text else held.getvalue())
