"""One training in PyTorch and in OneFlow: the same networks, first weights, images and order.

Neither framework is imported at the head of this file: each process has one of them. The loops by
hand are those that each framework's own tutorial writes, ``loss.item()`` at each step included, and
import nothing of the engines.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
import time
import warnings
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
from _measure import memory

BATCH = 32
BATCHES = {"MLP": 100, "small CNN": 60, "MobileNetV2": 20}
"""The networks, and how many batches an epoch of each has."""
KINDS = (
    "PyTorch by hand",
    "Lightning",
    "OneFlow by hand, eager",
    "OneFlow by hand, graph",
    "ofengine, eager",
    "ofengine, graph",
    "ofengine, eager, in_memory_loader",
    "ofengine, graph, in_memory_loader",
)
PYTORCH = KINDS[:2]
RATE, MOMENTUM = 0.01, 0.9


# ---------------------------------------------------------------------- networks


def network(name: str, nn: Any) -> Any:
    """The network ``name`` of ``nn``, which is ``torch.nn`` or ``oneflow.nn``; first weights."""
    if name == "MLP":
        layers = [nn.Flatten(), nn.Linear(3072, 128), nn.ReLU(), nn.Linear(128, 10)]
    elif name == "small CNN":
        layers = [
            *[nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4)],
            *[nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()],
            *[nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(16, 10)],
        ]
    elif nn.__name__.startswith("oneflow"):  # the cookbook's own
        from flowvision.models import mobilenet_v2

        layers = [mobilenet_v2(num_classes=10)]
    else:
        layers = _mobilenet_v2(nn)
    model = nn.Sequential(*layers)
    generator = np.random.RandomState(0)
    for layer in model.modules():
        if type(layer).__name__ in ("Conv2d", "Linear"):
            shape = tuple(layer.weight.shape)
            values = generator.standard_normal(shape) * (2.0 / np.prod(shape[1:])) ** 0.5
            _fill(layer.weight, values)
            if layer.bias is not None:
                _fill(layer.bias, np.zeros(tuple(layer.bias.shape)))
    return model


def _fill(parameter: Any, values: Any) -> None:
    framework = importlib.import_module(type(parameter).__module__.partition(".")[0])
    with framework.no_grad():
        parameter.copy_(framework.tensor(values.astype(np.float32)))


def _mobilenet_v2(nn: Any) -> List[Any]:
    """MobileNetV2 with ten classes, layer by layer as in flowvision and torchvision."""

    def unit(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> List[Any]:
        options = {"padding": size // 2, "groups": groups, "bias": False}
        convolution = nn.Conv2d(inputs, outputs, size, stride, **options)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True)]

    class Block(nn.Module):
        """Wide, one filter a channel, narrow again."""

        def __init__(self, inputs: int, outputs: int, stride: int, widens: int) -> None:
            super().__init__()
            hidden = inputs * widens
            layers = unit(inputs, hidden, 1) if widens > 1 else []
            layers += unit(hidden, hidden, 3, stride, hidden)
            layers += unit(hidden, outputs, 1)[:2]
            self.conv = nn.Sequential(*layers)
            self.adds = stride == 1 and inputs == outputs

        def forward(self, x: Any) -> Any:
            return x + self.conv(x) if self.adds else self.conv(x)

    layers, channels = unit(3, 32, 3, 2), 32
    for widens, outputs, times, stride in (
        *[(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)],
        *[(6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)],
    ):
        for index in range(times):
            layers.append(Block(channels, outputs, 1 if index else stride, widens))
            channels = outputs
    layers += [*unit(channels, 1280, 1), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()]
    return [*layers, nn.Dropout(0.2), nn.Linear(1280, 10)]


# ---------------------------------------------------------------------- images

_MEAN, _DEVIATION = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def images(number: int) -> Tuple[Any, Any]:
    """Pixels and labels, of CIFAR-10's shape: a pattern for each class, and noise."""
    generator = np.random.RandomState(1)
    labels = generator.randint(0, 10, number)
    patterns = generator.standard_normal((10, 32, 32, 3))
    noise = generator.standard_normal((number, 32, 32, 3))
    pixels = (128 + 20 * patterns[labels] + 40 * noise).clip(0, 255)
    return pixels.astype(np.uint8), labels


def _transform(framework: Any) -> Callable[[Any], Any]:
    """A PIL image as a normalized tensor."""
    if framework.__name__ == "oneflow":
        from flowvision import transforms

        steps = [transforms.ToTensor(), transforms.Normalize(_MEAN, _DEVIATION)]
        return transforms.Compose(steps)

    def as_torchvision(image: Any) -> Any:
        """The operations of torchvision's ToTensor and Normalize, one by one."""
        x = framework.from_numpy(np.array(image, np.uint8, copy=True))
        x = x.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()
        x = x.to(framework.float32).div(255)
        mean, deviation = (framework.tensor(each).view(-1, 1, 1) for each in (_MEAN, _DEVIATION))
        return x.clone().sub_(mean).div_(deviation)

    return as_torchvision


def loader(framework: Any, name: str, batches: int, in_memory: bool) -> Any:
    """The batches of an epoch, in the same order everywhere."""
    pixels, labels = images(batches * BATCH)
    transform = _transform(framework)
    if in_memory:
        from ofengine import ImageArrays, in_memory_loader

        return in_memory_loader(ImageArrays(pixels, labels, transform), batch_size=BATCH)
    from PIL import Image

    data = importlib.import_module(f"{framework.__name__}.utils.data")

    class Images(data.Dataset):
        """As CIFAR-10's of torchvision and flowvision."""

        def __len__(self) -> int:
            return len(pixels)

        def __getitem__(self, index: int) -> Tuple[Any, int]:
            return transform(Image.fromarray(pixels[index])), int(labels[index])

    return data.DataLoader(Images(), batch_size=BATCH)


# ---------------------------------------------------------------------- training


class Moments:
    """When the first step was over, and the last; as a callback of either engine, too."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self._newest: Any = None
        self.seen: List[float] = []
        self.loss = 0.0

    def on_train_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step."""
        self._newest = outputs["loss"]
        if batch_idx == 0:
            self._note()

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        """After the last one."""
        self._note()

    def _note(self) -> None:
        self.loss = self._newest.item()
        self._synchronize()
        self.seen.append(time.perf_counter())


def epoch(kind: str, name: str, batches: int) -> Dict[str, float]:
    """Train one epoch in the manner of ``kind``; seconds, megabytes, the last batch's loss."""
    moment = time.perf_counter()
    engine, *rest = kind.split(", ")
    bases: Tuple[Any, ...] = ()
    if not engine.endswith("by hand"):
        module = importlib.import_module(engine.lower())
        bases = (module.Callback,)
        module.Trainer  # noqa: B018 - the engine imports what it needs when it is first asked
    framework = importlib.import_module("torch" if kind in PYTORCH else "oneflow")
    nn = importlib.import_module(f"{framework.__name__}.nn")
    imports = time.perf_counter() - moment
    warnings.filterwarnings("ignore")  # flowvision's ReLU6; few workers, few batches
    data = loader(framework, name, batches, "in_memory_loader" in rest)
    model, loss_fn = network(name, nn), nn.CrossEntropyLoss()
    synchronize = synchronizer(framework)
    synchronize()
    before = memory("VmRSS")
    moments = type("Clock", (Moments, *bases), {})(synchronize)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        if engine == "Lightning":
            _with_lightning(model, loss_fn, data, moments, folder)
        elif engine == "ofengine":
            _with_ofengine(rest[0], model, loss_fn, data, moments, folder)
        else:
            _by_hand(framework, "graph" in rest, model, loss_fn, data, moments)
        end = time.perf_counter()
    first, last = moments.seen
    return {
        "imports": imports,
        "first": first - start,
        "later": (last - first) / (batches - 1),
        "epoch": end - start,
        "before": before,
        "peak": memory("VmHWM"),
        "loss": moments.loss,
        "parameters": sum(each.numel() for each in model.parameters()),
    }


def synchronizer(framework: Any) -> Callable[[], None]:
    """What waits until everything is computed; PyTorch's CPU has done so when it returns."""
    if framework.__name__ == "torch":
        return lambda: None
    wait: Callable[[], None] = framework._oneflow_internal.eager.Sync
    return wait


def sgd(framework: Any, parameters: Any) -> Any:
    return framework.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM)


def _by_hand(
    framework: Any, as_graph: bool, model: Any, loss_fn: Any, data: Any, moments: Moments
) -> None:
    optimizer = sgd(framework, model.parameters())

    def eager(x: Any, y: Any) -> Any:
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    model.train()
    step = _graph(framework, model, loss_fn, optimizer) if as_graph else eager
    for index, (x, y) in enumerate(data):
        loss = step(x, y)
        loss.item()
        moments.on_train_batch_end(None, None, {"loss": loss}, None, index)
    moments.on_train_epoch_end(None, None)


def _graph(framework: Any, model: Any, loss_fn: Any, optimizer: Any) -> Any:
    """The cookbook's graph."""

    class Graph(framework.nn.Graph):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.loss_fn = loss_fn
            self.add_optimizer(optimizer)

        def build(self, x: Any, y: Any) -> Any:
            loss = self.loss_fn(self.model(x), y)
            loss.backward()
            return loss

    return Graph()


def _step(self: Any, batch: Any, batch_idx: int) -> Any:
    x, y = batch
    return self.loss_fn(self.model(x), y)


def _with_lightning(model: Any, loss_fn: Any, data: Any, moments: Moments, folder: str) -> None:
    import lightning
    import torch

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss_fn = model, loss_fn

        training_step = _step

        def configure_optimizers(self) -> Any:
            return sgd(torch, self.parameters())

    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, default_root_dir=folder, callbacks=[moments]
    )
    trainer.fit(Task(), data)


def _with_ofengine(
    mode: str, model: Any, loss_fn: Any, data: Any, moments: Moments, folder: str
) -> None:
    import oneflow

    import ofengine

    class Task(ofengine.TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss_fn = model, loss_fn

        training_step = _step

        def configure_optimizers(self) -> Any:
            return sgd(oneflow, self.param_groups())

    trainer = ofengine.Trainer(
        mode=mode, device="cpu", max_epochs=1, default_root_dir=folder, callbacks=[moments]
    )
    trainer.fit(Task(), data)
