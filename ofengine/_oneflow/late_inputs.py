"""Graphs that take on inputs while they are traced."""

from __future__ import annotations

from typing import Any, List

from oneflow import nn
from oneflow.framework.graph_build_util import build_graph_input_arg

from ofengine._oneflow.tracing import outside_the_trace


class LateInputs(nn.Graph):
    """A graph whose ``build`` may ask for further inputs.

    :attr:`late` has to be the last argument that the graph is compiled with. It is empty until the
    trace, and holds an eager tensor like each of the further inputs from then on; ``nn.Graph``
    looks at its arguments again when ``build`` is over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.late: List[Any] = []

    def add_input(self, example: Any) -> Any:
        """One more input, a tensor like ``example``, which is an eager one; to be used in build."""
        name = f"_{self.name}_input.late.{len(self.late)}"
        lazy = build_graph_input_arg(name, example)
        self.late.append(example)
        self._input_names.append(name)
        return lazy

    def _Graph__build_io(self, io_type: str, build: Any, *args: Any, **kwargs: Any) -> Any:
        built = super()._Graph__build_io(io_type, build, *args, **kwargs)
        if io_type == "input":
            self._input_names = built[0]
        return built


def eager_result(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``function`` gives outside of the trace that is going on."""
    with outside_the_trace():
        return function(*args, **kwargs)
