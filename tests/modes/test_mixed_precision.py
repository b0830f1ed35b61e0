"""``precision="16-mixed"``: where it is refused, and the graphs that it makes.

No GPU that OneFlow can use is at hand. On a CPU half precision changes no number, so that what is
left of it there (the scale of the loss, the way of the gradients) must change no bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import (
    Line,
    assert_same_weights,
    fill_deterministically,
    quiet_trainer,
    refused,
)
from oneflow import nn

from ofengine import ConfigurationError, OFEngineWarning, TaskModule, Trainer
from ofengine.checkpoint.file import read
from ofengine.run import settings as settings_module
from ofengine.run.precision import check_mixed, check_precision

MIXED = ["16-mixed", "bf16-mixed"]


class Rows(TaskModule):
    """Three layers and a frozen one; keeps its graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 3)
        self.configs: List[Any] = []
        self.graphs: List[Any] = []
        fill_deterministically(self)
        self.frozen.weight.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = nn.functional.cross_entropy(self.head(self.norm(self.frozen(self.body(x)))), y)
        self.log("loss", loss)
        return {"loss": loss, "weight": float(len(y))}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1]))

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1, momentum=0.9)

    def configure_graph(self, config: Any) -> None:
        self.configs.append(config)

    def on_before_graph_compile(self, graph: Any) -> None:
        self.graphs.append([graph])  # in a list, or nn.Module would take it for a child


def rows(*sizes: int) -> List[Any]:
    generator = np.random.RandomState(0)
    return [
        (
            flow.tensor(generator.standard_normal((size, 6)).astype("float32")),
            flow.tensor(generator.randint(0, 3, size)),
        )
        for size in sizes
    ]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed precision is not refused for the device."""
    monkeypatch.setattr(settings_module, "check_mixed", lambda values: None)


def trained(task: Rows, precision: Any = "32-true", **options: Any) -> Trainer:
    ckpt_path = options.pop("ckpt_path", None)
    options = {"mode": "graph", "max_epochs": 1, "log_every_n_steps": 1, **options}
    trainer = quiet_trainer(precision=precision, **options)
    trainer.fit(task, rows(4, 4, 3, 4), rows(4), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2},
    ],
    ids=["plain", "clipped windows"],
)
def test_the_loss_scale_changes_no_bit(as_on_a_gpu: None, options: Dict[str, Any]) -> None:
    """Clipping sees gradients without it, and so do windows; what is logged is the loss itself."""
    plain = Rows()
    by_plain = trained(plain, **options)
    for precision in MIXED:
        mixed = Rows()
        by_mixed = trained(mixed, precision, **options)
        assert_same_weights(plain, mixed)
        assert by_plain.callback_metrics == by_mixed.callback_metrics


@pytest.mark.parametrize(("precision", "scale"), [("16-mixed", 1024.0), ("bf16-mixed", 1.0)])
def test_what_oneflow_is_to_compile(as_on_a_gpu: None, precision: str, scale: float) -> None:
    """All graphs mix precision; each gradient is float32 before anything else has to do with it."""
    task = Rows()
    trained(task, precision, gradient_clip_val=0.05)
    half = {"16-mixed": 9, "bf16-mixed": 11}[precision]  # data_type.proto: kFloat16, kBFloat16
    protos = [config.proto for config in task.configs]
    assert {config.training for config in task.configs} == {True, False}
    assert {(p.enable_auto_mixed_precision, p.mixed_precision_data_type) for p in protos} == {
        (True, half)
    }
    job = task.graphs[0][0]._forward_job_proto
    readers: Dict[str, List[Any]] = {}
    for op in job.net.op:
        for places in op.user_conf.input.values():
            for name in places.s:
                readers.setdefault(name, []).append(op)
    barriers = [o for o in job.net.op if o.user_conf.op_type_name == "amp_black_identity"]
    assert len(barriers) == len([p for p in task.parameters() if p.requires_grad]) == 5
    for barrier in barriers:
        (raw,) = barrier.user_conf.input["in"].s
        assert readers[raw] == [barrier]
        (after,) = readers[barrier.user_conf.output["out"].s[0]]
        assert _factor(after) == 1.0 / scale
    (loss,) = job.job_conf.train_conf.loss_lbn
    (scaled,) = [op for op in job.net.op if loss in _outputs(op)]
    assert (_factor(scaled) == scale) is (scale != 1.0)


def _outputs(op: Any) -> List[str]:
    return [name for places in op.user_conf.output.values() for name in places.s]


def _factor(op: Any) -> Any:
    if op.user_conf.op_type_name != "scalar_mul":
        return None
    return op.user_conf.attr["float_operand"].at_double


def test_a_resumed_run_goes_on_to_the_bit_and_says_where_its_precision_is_another(
    as_on_a_gpu: None, tmp_path: Path
) -> None:
    whole, part, other = Rows(), Rows(), Rows()
    trained(whole, 16, max_epochs=2)
    path = trained(part, 16, max_steps=2).save_checkpoint(tmp_path / "part")
    state = read(path).state
    assert state is not None and state["run"]["precision"] == "16-mixed"
    resumed = Rows()
    trained(resumed, 16, max_epochs=2, ckpt_path=path)
    assert_same_weights(whole, resumed)
    says = 'begun with precision="16-mixed" and goes on with precision="32-true"'
    with pytest.warns(OFEngineWarning, match=says):
        trained(other, max_steps=3, ckpt_path=path)


# ---------------------------------------------------------------------- refused


def test_lightning_s_names() -> None:
    names: Dict[str, List[Any]] = {
        "32-true": [32, "32", "32-true"],
        "16-mixed": [16, "16", "16-mixed"],
        "bf16-mixed": ["bf16", "bf16-mixed"],
    }
    for name, spelt in names.items():
        assert {check_precision("precision", each) for each in spelt} == {name}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("16-true", 'write "16-mixed"'),
        ("bf16-true", 'write "16-mixed"'),
        ("transformer-engine", 'write "16-mixed"'),
        ("64-true", "task.double()"),
        (64, "task.double()"),
        ("half", 'use one of "32-true", "16-mixed", "bf16-mixed"'),
        (None, "use one of"),
        (True, "use one of"),
        (16.0, "use one of"),
        ([16], "use one of"),
        (8, "use one of"),
    ],
)
def test_another_value(value: Any, says: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        Trainer(precision=value)
    assert says in str(error.value)


@pytest.mark.parametrize("precision", MIXED)
@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"device": flow.device("cpu")}, "is for GPUs"),
        ({"mode": "eager"}, 'write mode="graph"'),
        ({"detect_anomaly": True}, "Leave out one of them"),
    ],
)
def test_where_it_cannot_be(precision: str, values: Dict[str, Any], says: str) -> None:
    gpu = {"device": flow.device("cuda"), "mode": "graph", "detect_anomaly": False}
    check_mixed({"precision": precision, **gpu})
    check_mixed({"precision": "32-true", **gpu, **values})
    with pytest.raises(ConfigurationError) as error:
        check_mixed({"precision": precision, **gpu, **values})
    assert str(error.value).startswith(f'precision="{precision}" ') and says in str(error.value)


def test_a_cpu_is_refused_when_the_trainer_is_made() -> None:
    with pytest.raises(ConfigurationError, match='precision="16-mixed" is for GPUs'):
        Trainer(mode="graph", device="cpu", precision=16)


class OwnGraph(Rows):
    def build_graph(self) -> Any:
        return super().build_graph()


class Switches(Rows):
    def __init__(self, switch: Callable[[Any], None]) -> None:
        super().__init__()
        self.switch = switch

    def configure_graph(self, config: Any) -> None:
        self.switch(config)


def test_a_graph_of_one_s_own(as_on_a_gpu: None) -> None:
    says = r'precision="16-mixed" cannot reach into OwnGraph\.build_graph\(\)'
    refused(OwnGraph(), ConfigurationError, says, mode="graph", precision=16)


def test_a_switch_that_says_something_else(as_on_a_gpu: None) -> None:
    off = Switches(lambda config: config.enable_amp(False))
    says = r'precision="32-true" of Trainer\(precision="16-mixed"\)'
    train = rows(4)
    refused(off, ConfigurationError, says, mode="graph", precision=16, train=train)
    other = Switches(lambda config: config.enable_amp(True, dtype=flow.bfloat16))
    says = r'precision="bf16-mixed" of Trainer\(precision="16-mixed"\)'
    refused(other, ConfigurationError, says, mode="graph", precision=16, train=train)


def test_a_proof(as_on_a_gpu: None) -> None:
    with pytest.raises(ConfigurationError, match="prove compares graph mode with eager mode"):
        quiet_trainer(mode="graph", precision=16).prove(Line(), [flow.ones(1, 1)])
