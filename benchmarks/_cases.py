"""Networks, hand-written loops and the same as a task, for the benchmarks."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import oneflow as flow
from _measure import Pair, Turns
from oneflow import nn

from ofengine import Callback, TaskModule, Trainer
from ofengine._oneflow.session import synchronize

# flowvision's MobileNetV2 asks for an activation in place, which OneFlow does not have.
warnings.filterwarnings("ignore", message="ReLU6 module")

MODES = ("eager", "graph")
OFF: Dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}
"""The arguments that switch everything off."""


def linear() -> nn.Module:
    """32 inputs, one output."""
    return nn.Linear(32, 1)


def small_cnn() -> nn.Module:
    """Two convolutions with batch norm, for 3x32x32."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def mlp() -> nn.Module:
    """A perceptron for 3x32x32 with a hidden layer of 128."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 128), nn.ReLU(), nn.Linear(128, 10))


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 with ten classes."""
    from flowvision.models import mobilenet_v2

    return mobilenet_v2(num_classes=10)


def resnet18() -> nn.Module:
    """ResNet-18 with ten classes."""
    from flowvision.models import resnet18

    return resnet18(num_classes=10)


class Case(NamedTuple):
    """A network and how long its blocks are."""

    network: Callable[[], nn.Module]
    images: int
    """Images of a batch; 0 for the linear layer's own inputs."""
    block: int
    pairs: int

    def batch(self) -> Any:
        """A batch of random inputs and targets."""
        if not self.images:
            return flow.randn(32, 32), flow.randn(32, 1)
        return flow.randn(self.images, 3, 32, 32), flow.randint(0, 10, (self.images,))

    def loss(self) -> nn.Module:
        """What is minimized."""
        return nn.CrossEntropyLoss() if self.images else nn.MSELoss()


CASES: Dict[str, Case] = {
    "linear layer, 32 x 32": Case(linear, 0, 100, 60),
    "small CNN, batch 8": Case(small_cnn, 8, 20, 12),
    "MobileNetV2, batch 2": Case(mobilenet_v2, 2, 4, 6),
    "ResNet-18, batch 2": Case(resnet18, 2, 3, 6),
}


def sgd(parameters: Any) -> Any:
    """SGD with momentum, the same everywhere.

    At next to no rate: batch norms over two images, which MobileNetV2's last ones have, end in NaN
    after some steps, by hand as well.
    """
    return flow.optim.SGD(parameters, lr=1e-9, momentum=0.9)


def hand_step(
    mode: str,
    model: nn.Module,
    loss_fn: nn.Module,
    batch: Any,
    optimizer: Optional[Any] = None,
    scheduler: Optional[Any] = None,
    configure: Callable[[Any], None] = lambda config: None,
) -> Callable[[], Any]:
    """One step of the loop that a user would write, as a function that returns the loss.

    ``configure`` gets the graph's ``config``. ``scheduler`` is stepped in eager mode, and
    compiled in graph mode.
    """
    model.train()
    x, y = batch
    made = sgd(model.parameters()) if optimizer is None else optimizer

    def eager() -> Any:
        loss = loss_fn(model(x), y)
        loss.backward()
        made.step()
        made.zero_grad(set_to_none=True)
        if scheduler is not None:
            scheduler.step()
        return loss

    if mode == "eager":
        return eager

    graph = hand_graph(model, loss_fn, made, scheduler, configure)
    return lambda: graph(x, y)


def hand_graph(
    model: nn.Module,
    loss_fn: nn.Module,
    optimizer: Any,
    scheduler: Optional[Any] = None,
    configure: Callable[[Any], None] = lambda config: None,
) -> nn.Graph:
    """The cookbook's graph."""

    class Graph(nn.Graph):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.loss_fn = loss_fn
            if scheduler is None:
                self.add_optimizer(optimizer)
            else:
                self.add_optimizer(optimizer, lr_sch=scheduler)
            configure(self.config)

        def build(self, x: Any, y: Any) -> Any:
            loss = self.loss_fn(self.model(x), y)
            loss.backward()
            return loss

    return Graph()


class Task(TaskModule):
    """The same as a task.

    Args:
        model: the network.
        loss_fn: what is minimized.
        logs: how many names every step logs.
        groups: the parameter groups, or None for one of all.
        schedule: makes a scheduler for the optimizer, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module,
        logs: int = 0,
        groups: Optional[List[Dict[str, Any]]] = None,
        schedule: Optional[Callable[[Any], Any]] = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.log_names = [f"metric{index}" for index in range(logs)]
        self.groups = groups
        self.schedule = schedule

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss."""
        x, y = batch
        loss = self.loss_fn(self.model(x), y)
        for name in self.log_names:
            self.log(name, loss)
        return loss

    def param_groups(self) -> List[Dict[str, Any]]:
        """As given."""
        return super().param_groups() if self.groups is None else self.groups

    def configure_optimizers(self) -> Any:
        """As by hand."""
        optimizer = sgd(self.param_groups())
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}


class Idle(Callback):
    """A callback that does nothing at both hooks of a batch."""

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        """Nothing."""

    def on_train_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Nothing."""


def measure(mode: str, task: TaskModule, turns: Turns, **arguments: Any) -> List[Pair]:
    """Let ``Trainer.fit`` and the reference of ``turns`` take turns; what was measured.

    What the engine prints goes into a buffer, what it writes into a folder for the time being.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        given = {"max_epochs": 1, "default_root_dir": folder, **arguments}
        trainer = Trainer(mode=mode, device="cpu", **given)

        def stop() -> None:
            trainer.should_stop = True

        # item() would spin until OneFlow's worker gets the core: milliseconds on a busy machine,
        # which would make the loop by hand look slow.
        turns.read = lambda loss: loss.numpy()
        turns.done = stop if turns.length > turns.steps else turns.done
        trainer.fit(task, turns)
    return turns.measured


def compare(mode: str, case: Case, quick: bool = False, **arguments: Any) -> List[Pair]:
    """The engine against the hand-written loop on ``case``."""
    batch = case.batch()
    loss_fn = case.loss()
    reference = hand_step(mode, case.network(), loss_fn, batch)
    pairs = max(3, case.pairs // 5) if quick else case.pairs
    turns = Turns(batch, reference, synchronize, case.block, pairs, min(20, case.block))
    return measure(mode, Task(case.network(), loss_fn), turns, **arguments)
