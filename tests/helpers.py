"""What several tests need. Nothing here computes what a test expects of the engine."""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import oneflow as flow
from oneflow import nn

from ofengine import TaskModule, Trainer

MODES = ("eager", "graph")


class ByStep(TaskModule):
    """A task whose loss ``step`` makes of the task and of a batch; a subclass adds the modules."""

    def __init__(self, step: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.step = step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.step(self, batch))


def quiet_trainer(**arguments: Any) -> Trainer:
    """A Trainer on the CPU that prints nothing and writes no file, unless told otherwise."""
    quiet = {
        "device": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(**{**quiet, **arguments})


def weights_of(module: nn.Module) -> Dict[str, np.ndarray]:
    """A copy of everything in ``module.state_dict()``, running statistics too."""
    return {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}


def largest_difference(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> Tuple[float, str]:
    """The largest absolute difference between two ``weights_of``, and where it is."""
    assert list(ours) == list(theirs)
    differences = []
    for name, array in ours.items():
        assert array.shape == theirs[name].shape, name
        difference = np.abs(array.astype("float64") - theirs[name].astype("float64"))
        largest = float(difference.max()) if difference.size else 0.0
        differences.append((largest if np.isfinite(largest) else float("inf"), name))
    return max(differences)


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Every number of both modules' ``state_dict`` is the same, bit for bit."""
    first, second = weights_of(ours), weights_of(theirs)
    assert list(first) == list(second)
    unequal = [name for name in first if first[name].tobytes() != second[name].tobytes()]
    largest = largest_difference(first, second)
    assert not unequal, f"{unequal} differ, by up to {largest[0]:.3g} in {largest[1]}"


def image_batches(
    sizes: Sequence[int],
    shape: Tuple[int, ...] = (3, 8, 8),
    classes: int = 5,
    seed: int = 0,
) -> List[Tuple[Any, Any]]:
    """Batches of so many random images each, with labels; the same for the same arguments."""
    generator = np.random.RandomState(seed)
    return [
        (
            flow.tensor(generator.standard_normal((size, *shape)).astype("float32")),
            flow.tensor(generator.randint(0, classes, size)),
        )
        for size in sizes
    ]


class OfUnknownLength:
    """Batches behind an iterable without ``__len__``, each pass with its own.

    Args:
        passes: the batches of each pass; the last is repeated for further passes.
    """

    def __init__(self, *passes: Iterable[Any]) -> None:
        self._passes = [list(batches) for batches in passes]
        self.begun = 0
        """How many passes were begun."""

    def __iter__(self) -> Iterator[Any]:
        batches = self._passes[min(self.begun, len(self._passes) - 1)]
        self.begun += 1
        return (batch for batch in batches)


def fill_deterministically(module: nn.Module, seed: int = 0, spread: float = 0.1) -> None:
    """Set every parameter of ``module`` to random numbers that depend on ``seed`` alone."""
    generator = np.random.RandomState(seed)
    for name, parameter in module.named_parameters():
        values = generator.standard_normal(tuple(parameter.shape)).astype("float32") * spread
        if name.endswith("weight") and parameter.ndim == 1:  # a normalization layer's
            values = values + 1
        parameter.data.copy_(flow.tensor(values.astype("float32")))


def first_line(error: Optional[BaseException]) -> str:
    """The first line of an error's text."""
    return str(error).splitlines()[0] if error is not None else ""
