"""OneFlow's own switches for graphs, set in ``configure_graph``."""

from __future__ import annotations

from typing import Any, Callable, Dict, List

import oneflow as flow
import pytest
from helpers import assert_same_weights, fill_deterministically, image_batches, quiet_trainer
from oneflow import nn

from ofengine import ConfigurationError, OFEngineWarning, TaskModule

SWITCHES: Dict[str, Callable[[Any], None]] = {
    "allow_fuse_add_to_output": lambda config: config.allow_fuse_add_to_output(True),
    "allow_fuse_cast_scale": lambda config: config.allow_fuse_cast_scale(True),
    "allow_fuse_model_update_ops": lambda config: config.allow_fuse_model_update_ops(True),
    "enable_multi_tensor_update": lambda config: config.enable_multi_tensor_update(True),
    "outputs_buffer_size": lambda config: config.set_outputs_buffer_size(1),
    "three outputs": lambda config: config.set_outputs_buffer_size(3),
    "enable_zero": lambda config: config.enable_zero(True, stage=1, shard_min_size=1),
    "straighten": lambda config: config.enable_straighten_algorithm("MemoryFirst"),
    "straighten for speed": lambda config: config.enable_straighten_algorithm("SpeedFirst"),
}


class Small(TaskModule):
    """A residual block and two groups of their own rate; ``configure`` sets the switches."""

    def __init__(self, configure: Callable[[Any], None] = lambda config: None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3 * 8 * 8, 5)
        self.configure = configure
        self.configured: List[Any] = []
        fill_deterministically(self)

    def forward(self, images: Any) -> Any:
        return self.head((images + self.norm(self.conv(images)).relu()).flatten(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def param_groups(self) -> Any:
        body = [*self.conv.parameters(), *self.norm.parameters()]
        return [
            {"name": "body", "params": body, "lr": 0.1, "lr_scale": 0.3, "lr_decay_scale": 0.9},
            {"name": "head", "params": self.head.parameters(), "lr": 0.05},
        ]

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), momentum=0.9)

    def configure_graph(self, config: Any) -> None:
        self.configured.append(config)
        self.configure(config)


def trained(task: Small, **arguments: Any) -> Any:
    trainer = quiet_trainer(max_epochs=2, log_every_n_steps=1, **arguments)
    trainer.fit(task, image_batches([4] * 5), image_batches([4] * 2, seed=1))
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("switch", list(SWITCHES))
def test_weights_and_metrics_under_a_switch_are_those_of_eager_mode(
    switch: str, accumulate: int
) -> None:
    eager, graph = Small(SWITCHES[switch]), Small(SWITCHES[switch])
    by_eager = trained(eager, mode="eager", accumulate_grad_batches=accumulate)
    by_graph = trained(graph, mode="graph", accumulate_grad_batches=accumulate)
    assert_same_weights(eager, graph)
    assert set(by_eager.callback_metrics) == {"loss", "val_loss"}
    assert by_eager.callback_metrics == by_graph.callback_metrics
    assert eager.configured == []


@pytest.mark.parametrize(
    "accumulate, graphs",
    [(1, ["training", "evaluation"]), (2, ["gradients", "update", "evaluation"])],
)
def test_each_graph_of_the_task_is_configured_once(accumulate: int, graphs: List[str]) -> None:
    task = Small()
    trained(task, mode="graph", accumulate_grad_batches=accumulate)
    assert len(task.configured) == len({id(config) for config in task.configured}) == len(graphs)
    assert [config.training for config in task.configured].count(False) == 1


class Noting(Small):
    """Keeps its training graph."""

    def on_before_graph_compile(self, graph: Any) -> None:
        self.compiled = [graph]  # in a list, or nn.Module would take it for a child


def test_a_switch_reaches_the_compiled_job() -> None:
    """What OneFlow compiled says itself whether it was to fuse."""
    fused: List[bool] = []
    for switch in (lambda config: None, SWITCHES["allow_fuse_add_to_output"]):
        task = Noting(switch)
        trained(task, mode="graph")
        fused.append(bool(task.compiled[0]._full_job_proto.job_conf.enable_fuse_add_to_output))
    assert fused == [False, True]


def test_mixed_precision_reaches_the_job_and_a_cpu_knows_none() -> None:
    task, plain = Noting(lambda config: config.enable_amp(True)), Small()
    with pytest.warns(OFEngineWarning, match="changes nothing on a CPU"):
        trained(task, mode="graph")
    assert task.compiled[0]._full_job_proto.job_conf.enable_auto_mixed_precision
    trained(plain, mode="graph")
    assert_same_weights(task, plain)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_oneflow_s_own_accumulation_is_refused(
    accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENABLE_LOGICAL_CHAIN", "false")  # the call below sets it
    task = Small(lambda config: config.set_gradient_accumulation_steps(4))
    with pytest.raises(ConfigurationError, match=r"accumulate_grad_batches=4"):
        trained(task, mode="graph", accumulate_grad_batches=accumulate)
