"""What a step asks of modules is answered alike in both modes; what a graph ignores is refused."""

from __future__ import annotations

from typing import Any, Callable, Dict

import oneflow as flow
import pytest
from helpers import (
    MODES,
    ByStep,
    bits,
    fill_deterministically,
    quiet_trainer,
    random_rows,
    weights_of,
)
from oneflow import nn

from ofengine import GraphModeError, TaskModule

Step = Callable[[Any, Any], Any]


class Parts(ByStep):
    """Modules of several kinds."""

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        self.first = nn.Linear(7, 7)
        self.rest = nn.Sequential(nn.Linear(7, 7), nn.ReLU(), nn.Sequential(nn.Linear(7, 7)))
        self.factors = nn.ParameterList([nn.Parameter(flow.ones(7)) for _ in range(3)])
        self.norm = nn.BatchNorm1d(7)
        self.instances = nn.InstanceNorm1d(1, affine=True, track_running_stats=True)
        self.table = nn.Embedding(5, 7)
        fill_deterministically(self, spread=0.4)

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.02, momentum=0.9)


def out(task: Any, x: Any) -> Any:
    return task.rest(task.first(x)).pow(2).mean()


def frozen_statistics(task: Any, x: Any) -> Any:
    task.norm.eval()
    return task.norm(task.first(x)).pow(2).mean()


STEPS: Dict[str, Step] = {
    "isinstance of a layer": lambda t, x: (2 if isinstance(t.first, nn.Linear) else 1) * out(t, x),
    "isinstance of Module": lambda t, x: (2 if isinstance(t.rest, nn.Module) else 1) * out(t, x),
    "not isinstance": lambda t, x: (2 if isinstance(t.first, nn.Conv2d) else 1) * out(t, x),
    "a penalty of layers": lambda t, x: out(t, x) + sum(
        m.weight.pow(2).sum() for m in t.modules() if isinstance(m, nn.Linear)
    ),
    "a penalty by name": lambda t, x: out(t, x) + sum(
        m.weight.abs().sum() for n, m in t.named_modules() if isinstance(m, nn.Linear) and n != ""
    ),
    "parameters of a part": lambda t, x: out(t, x) + sum(
        p.pow(2).sum() for p in t.rest.parameters()
    ),
    "its named parameters": lambda t, x: out(t, x) + sum(
        p.pow(2).sum() for n, p in t.rest.named_parameters() if n.endswith("weight")
    ),
    "a list of parameters": lambda t, x: sum(f * x for f in t.factors).pow(2).mean(),
    "children": lambda t, x: sum(child(x) for child in t.rest.children()).pow(2).mean(),
    "batch norm": lambda t, x: t.norm(t.first(x)).pow(3).mean(),
    "batch norm in eval": frozen_statistics,
    "instance norm": lambda t, x: t.instances(t.first(x).unsqueeze(1)).pow(3).mean(),
}  # fmt: skip


def trained(task: TaskModule, mode: str, **arguments: Any) -> Any:
    rows = random_rows([5] * 4, 7)
    trainer = quiet_trainer(mode=mode, max_epochs=2, num_sanity_val_steps=0, **arguments)
    trainer.fit(task, rows[:3], rows[3:])
    return bits(task), trainer.callback_metrics


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", list(STEPS))
def test_modules_answer_alike_in_both_modes(name: str, accumulate: int) -> None:
    """Buffers and the count of batches included."""
    eager, graph = (
        trained(Parts(STEPS[name]), mode, accumulate_grad_batches=accumulate) for mode in MODES
    )
    assert eager == graph


def test_after_a_trace_modules_are_what_they_were() -> None:
    task = Parts(out)
    before = [type(module) for module in task.modules()]
    trained(task, "graph")
    assert [type(module) for module in task.modules()] == before


def hooked(task: Any) -> None:
    task.rest[0].register_forward_hook(lambda module, inputs, output: output * 2)


def hooked_before(task: Any) -> None:
    task.rest[0].register_forward_pre_hook(lambda module, inputs: inputs)


def normed(task: Any) -> None:
    nn.utils.weight_norm(task.rest[0])


@pytest.mark.parametrize("change", [hooked, hooked_before, normed])
def test_a_forward_hook_is_refused_in_graph_mode(change: Callable[[Any], None]) -> None:
    task = Parts(out)
    change(task)
    before = weights_of(task)
    with pytest.raises(GraphModeError, match=r"Parts\.rest\.0 has a forward hook.*eager"):
        trained(task, "graph")
    assert all((before[name] == now).all() for name, now in weights_of(task).items())
    trained(task, "eager")


def test_an_embedding_with_max_norm_is_refused_in_graph_mode() -> None:
    task = Parts(lambda t, x: t.table(flow.arange(5)).pow(2).mean() + out(t, x))
    task.table = nn.Embedding(5, 7, max_norm=0.5)
    with pytest.raises(GraphModeError, match=r"Parts\.table has max_norm=0\.5.*eager"):
        trained(task, "graph")
