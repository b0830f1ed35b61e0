"""Accuracy, ConfusionMatrix, Precision, Recall and F1Score: counts, which are exact."""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple, Union

import numpy as np
import oneflow as flow

from ofengine.errors import ConfigurationError, DataError
from ofengine.metrics.base import Metric, State

_AVERAGES = ("binary", "macro", "micro", "weighted", "none")


class _OfClasses(Metric):
    """What the metrics of classes share: what they are given, and which labels are left out."""

    _names: Tuple[str, ...] = ()

    def _options(self, num_classes: Optional[int], ignore_index: Optional[int]) -> None:
        own = type(self).__name__
        for name, value in (("num_classes", num_classes), ("ignore_index", ignore_index)):
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not is_whole:
                raise ConfigurationError(f"{own}({name}={value!r}): give a whole number.")
        if num_classes is not None and num_classes < 2:
            raise ConfigurationError(f"{own}(num_classes={num_classes}): give 2 or more.")
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def _target(self, predictions: Any, target: Any) -> Tuple[Any, Any]:
        """The targets as int64, and where they count."""
        own = type(self).__name__
        for name, given in (("predictions", predictions), ("targets", target)):
            if not isinstance(given, flow.Tensor):
                raise ConfigurationError(
                    f"{own}.update got {type(given).__name__} for its {name}: give tensors."
                )
        if target.dtype.is_floating_point:
            raise ConfigurationError(
                f"{own}.update got targets of {target.dtype}: give class numbers, for example "
                "target.long()."
            )
        is_scores = predictions.dim() == target.dim() + 1
        shape = tuple(predictions.shape)
        if is_scores:
            shape = (shape[0], *shape[2:])
        if shape != tuple(target.shape) or not shape:
            raise ConfigurationError(
                f"{own}.update got predictions of shape {tuple(predictions.shape)} for targets of "
                f"shape {tuple(target.shape)}: give scores of shape (N, classes) or class numbers "
                "of shape (N,) for targets of shape (N,); more dimensions may follow."
            )
        classes = self.num_classes
        if is_scores and classes is not None and predictions.shape[1] != classes:
            raise ConfigurationError(
                f"{own}(num_classes={classes}).update got scores of {predictions.shape[1]} classes."
            )
        target = target.to(flow.int64)
        return target, None if self.ignore_index is None else target != self.ignore_index

    def _classes(self, predictions: Any, target: Any, threshold: float) -> Any:
        """The class numbers predicted: where the score is highest, or above ``threshold``."""
        if predictions.dim() > target.dim():
            return flow.argmax(predictions, dim=1)
        if predictions.dtype.is_floating_point:
            if self.num_classes not in (None, 2):
                raise ConfigurationError(
                    f"{type(self).__name__}.update got one score for each sample, and "
                    f"num_classes={self.num_classes}: give scores of shape (N, {self.num_classes})."
                )
            return (predictions > threshold).to(flow.int64)
        return predictions.to(flow.int64)

    def _refuse_outside(self, outside: int, classes: Any) -> None:
        if outside:
            raise DataError(
                f"{type(self).__name__} got {outside} labels that are no class, which go from 0 to "
                f"{classes} - 1: mend the labels, or give ignore_index for one that is left out."
            )


class Accuracy(_OfClasses):
    """The share of samples whose class is right: ``update(predictions, target)``.

    Args:
        num_classes: only to have it checked; None takes what comes.
        top_k: right is what is among the k highest scores.
        ignore_index: the target that is left out, such as -100.
        threshold: above which a single score means class 1; 0.0 for logits.

    ``predictions`` are scores of shape (N, C), or of more dimensions behind these, for targets of
    shape (N, ...); or class numbers, or single scores, of the targets' shape.

    Raises:
        ConfigurationError: an argument is wrong, or what ``update`` is given does not fit.
    """

    def __init__(
        self,
        num_classes: Optional[int] = None,
        top_k: int = 1,
        ignore_index: Optional[int] = None,
        threshold: float = 0.5,
    ) -> None:
        self._options(num_classes, ignore_index)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ConfigurationError(f"Accuracy(top_k={top_k!r}): give a whole number from 1 on.")
        self.top_k = top_k
        self.threshold = threshold

    def sums(self, predictions: Any, target: Any) -> Dict[str, Any]:
        """How many are right, how many there are, and how many targets are no class."""
        target, counts = self._target(predictions, target)
        if self.top_k == 1:
            right = self._classes(predictions, target, self.threshold) == target
        else:
            if predictions.dim() == target.dim() or predictions.shape[1] < self.top_k:
                raise ConfigurationError(
                    f"Accuracy(top_k={self.top_k}).update got predictions of shape "
                    f"{tuple(predictions.shape)}: give scores of {self.top_k} classes or more."
                )
            best = flow.topk(predictions, self.top_k, dim=1)[1]
            right = (best == target.unsqueeze(1)).sum(dim=1) > 0
        classes = predictions.shape[1] if predictions.dim() > target.dim() else self.num_classes
        inside = target == target if classes is None else _is_class(target, int(classes))
        outside = ~inside
        if counts is not None:
            right, inside, outside = right & counts, inside & counts, outside & counts
        return {"counts": flow.stack([right.sum(), inside.sum(), outside.sum()])}

    def layout(self) -> Dict[str, Tuple[str, Tuple[Any, ...]]]:
        """See :class:`Metric`."""
        return {"counts": ("i", (3,))}

    def value(self, state: State) -> float:
        """Right among all; NaN where all targets are ``ignore_index``."""
        right, every, outside = map(int, state["counts"])
        self._refuse_outside(outside, "the number of classes")
        return right / every if every else float("nan")


class ConfusionMatrix(_OfClasses):
    """How often samples of a class (row) were taken for a class (column).

    Args:
        num_classes: how many classes there are.
        normalize: None for counts; "true" divides each row by its sum, "pred" each column, "all"
            by the number of samples.
        ignore_index: the target that is left out.
        threshold: above which a single score means class 1; 0.0 for logits.

    ``compute`` gives an array of shape (num_classes, num_classes), as scikit-learn does, which is
    not to be logged as a number. ``update`` takes what :class:`Accuracy` does.

    Raises:
        ConfigurationError: an argument is wrong, or what ``update`` is given does not fit.
        DataError: in ``compute``, where a label is no class.
    """

    is_scalar = False

    def __init__(
        self,
        num_classes: int,
        normalize: Optional[str] = None,
        ignore_index: Optional[int] = None,
        threshold: float = 0.5,
    ) -> None:
        self._options(num_classes, ignore_index)
        if normalize not in (None, "true", "pred", "all"):
            raise ConfigurationError(
                f'ConfusionMatrix(normalize={normalize!r}): give None, "true", "pred" or "all".'
            )
        self.normalize = normalize
        self.threshold = threshold

    def sums(self, predictions: Any, target: Any) -> Dict[str, Any]:
        """The matrix, row after row, and how many labels are no class; then those left out."""
        count = int(self.num_classes or 0)
        target, counts = self._target(predictions, target)
        given = self._classes(predictions, target, self.threshold)
        inside = _is_class(target, count) & _is_class(given, count)
        cell = flow.where(inside, target * count + given, count * count)
        if counts is not None:
            cell = flow.where(counts, cell, count * count + 1)
        return {"cells": _count(cell, count * count + 2)}

    def layout(self) -> Dict[str, Tuple[str, Tuple[Any, ...]]]:
        """See :class:`Metric`."""
        return {"cells": ("i", (int(self.num_classes or 0) ** 2 + 2,))}

    def value(self, state: State) -> np.ndarray:
        """The matrix, int64, or float64 where it is normalized; rows of no sample are 0."""
        count = int(self.num_classes or 0)
        self._refuse_outside(int(state["cells"][count * count]), count)
        matrix = state["cells"][: count * count].reshape(count, count)
        if self.normalize is None:
            return matrix
        axis = {"true": 1, "pred": 0, "all": None}[self.normalize]
        sums = matrix.sum(axis=axis, keepdims=True)
        return np.divide(matrix, sums, out=np.zeros(matrix.shape), where=sums != 0)


class _PrecisionRecall(_OfClasses):
    """What Precision, Recall and F1Score share: hits, predictions and targets of each class."""

    def __init__(
        self,
        num_classes: int,
        average: Optional[str] = None,
        ignore_index: Optional[int] = None,
        threshold: float = 0.5,
        zero_division: float = 0.0,
    ) -> None:
        self._options(num_classes, ignore_index)
        if average is None:
            average = "binary" if num_classes == 2 else "macro"
        if average not in _AVERAGES or (average == "binary" and num_classes != 2):
            raise ConfigurationError(
                f"{type(self).__name__}(num_classes={num_classes}, average={average!r}): give one "
                f'of {", ".join(_AVERAGES)}; "binary" is for two classes.'
            )
        self.average = average
        self.is_scalar = average != "none"
        self.threshold = threshold
        self.zero_division = zero_division

    def sums(self, predictions: Any, target: Any) -> Dict[str, Any]:
        """Of each class the hits, then the predictions, then the targets; labels of no class."""
        count = int(self.num_classes or 0)
        target, counts = self._target(predictions, target)
        given = self._classes(predictions, target, self.threshold)
        inside = _is_class(target, count) & _is_class(given, count)
        outside, left_out = 3 * count, 3 * count + 1
        cells = [
            flow.where(inside & (target == given), target, left_out),
            flow.where(inside, given + count, left_out),
            flow.where(inside, target + 2 * count, outside),
        ]
        if counts is not None:
            cells = [flow.where(counts, each, left_out) for each in cells]
        return {"cells": _count(flow.stack(cells), 3 * count + 2)}

    def layout(self) -> Dict[str, Tuple[str, Tuple[Any, ...]]]:
        """See :class:`Metric`."""
        return {"cells": ("i", (int(self.num_classes or 0) * 3 + 2,))}

    def value(self, state: State) -> Union[float, np.ndarray]:
        """The average, or an array of one value a class."""
        count = int(self.num_classes or 0)
        self._refuse_outside(int(state["cells"][3 * count]), count)
        hits, predicted, targets = state["cells"][: 3 * count].reshape(3, count)
        if self.average == "binary":
            return float(self._ratio(hits[1:], predicted[1:], targets[1:])[0])
        if self.average == "micro":
            sums = [np.array([each.sum()]) for each in (hits, predicted, targets)]
            return float(self._ratio(*sums)[0])
        each = self._ratio(hits, predicted, targets)
        if self.average == "none":
            return each
        weights = (predicted + targets > 0) if self.average == "macro" else targets
        total = weights.sum()
        return float((each * weights).sum() / total) if total else self.zero_division

    def _ratio(self, hits: Any, predicted: Any, targets: Any) -> np.ndarray:
        over, under = self._parts(hits, predicted, targets)
        empty = np.full(np.shape(over), self.zero_division, dtype=np.float64)
        return np.divide(over, under, out=empty, where=under != 0)

    def _parts(self, hits: Any, predicted: Any, targets: Any) -> Tuple[Any, Any]:
        raise NotImplementedError


class Precision(_PrecisionRecall):
    """Of what was taken for a class, the share that is of it.

    Args:
        num_classes: how many classes there are.
        average: "macro", the mean over classes; "micro", over all samples; "weighted", over
            classes by how many targets they have; "binary", of class 1 alone; "none" for an array
            with the value of each class. Default: "binary" of 2 classes, "macro" of more. A class
            that is neither predicted nor a target is left out of means.
        ignore_index: the target that is left out.
        threshold: above which a single score means class 1; 0.0 for logits.
        zero_division: the value where nothing is to be divided by.

    ``update`` takes what :class:`Accuracy` does.

    Raises:
        ConfigurationError: an argument is wrong, or what ``update`` is given does not fit.
        DataError: in ``compute``, where a label is no class.
    """

    def _parts(self, hits: Any, predicted: Any, targets: Any) -> Tuple[Any, Any]:
        return hits, predicted


class Recall(_PrecisionRecall):
    """Of what is of a class, the share that was taken for it. See :class:`Precision`.

    With ``average="macro"`` it is the balanced accuracy.
    """

    def _parts(self, hits: Any, predicted: Any, targets: Any) -> Tuple[Any, Any]:
        return hits, targets


class F1Score(_PrecisionRecall):
    """The harmonic mean of precision and recall of each class. See :class:`Precision`."""

    def _parts(self, hits: Any, predicted: Any, targets: Any) -> Tuple[Any, Any]:
        return 2 * hits, predicted + targets


def _is_class(labels: Any, count: int) -> Any:
    return (labels >= 0) & (labels < count)


def _count(cells: Any, size: int) -> Any:
    """How often each number from 0 to ``size`` - 1 is in ``cells``."""
    cells = cells.reshape(-1)
    return flow.scatter_add(cells.new_zeros((size,)), 0, cells, cells * 0 + 1)
