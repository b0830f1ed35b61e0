"""The update of graph mode where a schedule moves weight decay or momentum.

A graph has these as attributes of its operators, which were fixed when it was compiled. So the
graph ends with the gradients, and the optimizer makes its own step with them: the very kernels,
with the very numbers, of eager mode.
"""

from __future__ import annotations

from typing import Any, Iterable, Optional, Tuple

from ofengine._oneflow.bias_correction import let_optimizers_ask, step_as_graphs
from ofengine._oneflow.global_tensors import local
from ofengine.errors import ConfigurationError
from ofengine.modes.own_graphs import has_own_graph
from ofengine.modes.steps import clip
from ofengine.run.state import Run


class EagerUpdate:
    """Clipping and update of ``run``, by the gradients that a graph has computed."""

    def __init__(self, run: Run) -> None:
        self._run = run
        let_optimizers_ask()

    def __call__(self, gradients: Iterable[Tuple[int, Any]]) -> None:
        """Make one optimizer step; ``gradients`` come with the number of their parameter."""
        run, optimizer = self._run, self._run.made.optimizer
        run.rates.write(run.progress.global_step)
        for index, gradient in gradients:
            run.parameters[index].grad = local(gradient)
        clip(run)
        step_as_graphs(optimizer.step)
        optimizer.zero_grad(set_to_none=True)


def eager_update(run: Run) -> Optional[EagerUpdate]:
    """What makes the update of ``run`` in graph mode, or None where its graphs do.

    Raises :class:`ConfigurationError` where a graph of the user's own is to make it.
    """
    if run.rates.options is None:
        return None
    if has_own_graph(run.task):
        keys = " and ".join(each.key for each in run.made.options)
        raise ConfigurationError(
            f"{keys} cannot reach into {type(run.task).__name__}.build_graph(), whose update has "
            "weight decay and momentum fixed: leave build_graph() as it is, or use "
            'mode="eager".'
        )
    return EagerUpdate(run)
