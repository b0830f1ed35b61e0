"""Weights: set, copied, compared."""

from __future__ import annotations

from typing import Dict, Mapping, Tuple, Union

import numpy as np
import oneflow as flow
from oneflow import nn

Arrays = Mapping[str, np.ndarray]


def fill_deterministically(module: nn.Module, seed: int = 0, spread: float = 0.1) -> None:
    """Set every parameter of ``module`` to random numbers that depend on ``seed`` alone."""
    generator = np.random.RandomState(seed)
    for name, parameter in module.named_parameters():
        values = generator.standard_normal(tuple(parameter.shape)).astype("float32") * spread
        if name.endswith("weight") and parameter.ndim == 1:  # a normalization layer's
            values = values + 1
        parameter.data.copy_(flow.tensor(values.astype("float32")))


def weights_of(module: nn.Module) -> Dict[str, np.ndarray]:
    """A copy of everything in ``module.state_dict()``, running statistics too."""
    return {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}


def bits(weights: Union[nn.Module, Arrays]) -> Dict[str, bytes]:
    """Every number of a module's ``state_dict``, or of arrays, bit for bit."""
    arrays = weights_of(weights) if isinstance(weights, nn.Module) else weights
    return {name: array.tobytes() for name, array in arrays.items()}


def largest_difference(ours: Arrays, theirs: Arrays) -> Tuple[float, str]:
    """The largest absolute difference between two ``weights_of``, and where it is."""
    assert list(ours) == list(theirs)
    differences = []
    for name, array in ours.items():
        assert array.shape == theirs[name].shape, name
        difference = np.abs(array.astype("float64") - theirs[name].astype("float64"))
        largest = float(difference.max()) if difference.size else 0.0
        differences.append((largest if np.isfinite(largest) else float("inf"), name))
    return max(differences)


def assert_same_arrays(ours: Arrays, theirs: Arrays) -> None:
    """The same names in the same order, dtypes, shapes and numbers, bit for bit."""
    assert list(ours) == list(theirs)
    for name, array in ours.items():
        assert (array.dtype, array.shape) == (theirs[name].dtype, theirs[name].shape), name
    unequal = [name for name, array in ours.items() if array.tobytes() != theirs[name].tobytes()]
    if unequal:
        largest, where = largest_difference(ours, theirs)
        raise AssertionError(f"{unequal} differ, by up to {largest:.3g} in {where}")


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Every number of both modules' ``state_dict`` is the same, bit for bit."""
    assert_same_arrays(weights_of(ours), weights_of(theirs))
