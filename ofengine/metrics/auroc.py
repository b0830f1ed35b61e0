"""AUROC: the area under the ROC curve, exact."""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple

import numpy as np

from ofengine.errors import ConfigurationError, DataError
from ofengine.metrics.base import State
from ofengine.metrics.classification import _OfClasses


class AUROC(_OfClasses):
    """How probable it is that a sample of a class has a higher score for it than another one.

    Args:
        num_classes: 2, or more: then each class is compared with all others.
        average: of more than 2 classes: "macro", the mean over classes; "weighted", by how many
            targets they have; "none" for an array with the value of each class.
        ignore_index: the target that is left out.

    ``update(scores, target)``: of 2 classes, scores of shape (N,) for class 1, or (N, 2), of which
    the difference counts; of more, (N, num_classes), of which each column is ranked as it is:
    give softmax's for what scikit-learn computes. Ties count half.

    It is exact, and so keeps all scores and targets of an epoch: on the device, and in a
    checkpoint. NaN where a class has no sample, or no other class has.

    Raises:
        ConfigurationError: an argument is wrong, or what ``update`` is given does not fit.
        DataError: in ``compute``, where a target is no class or a score is NaN.
    """

    rows = ("scores", "targets")

    def __init__(
        self,
        num_classes: int = 2,
        average: str = "macro",
        ignore_index: Optional[int] = None,
    ) -> None:
        self._options(num_classes, ignore_index)
        if average not in ("macro", "weighted", "none"):
            raise ConfigurationError(
                f'AUROC(average={average!r}): give "macro", "weighted" or "none".'
            )
        self.average = average
        self.is_scalar = average != "none" or num_classes == 2

    def sums(self, scores: Any, target: Any) -> Dict[str, Any]:
        """The scores and targets themselves."""
        target, _ = self._target(scores, target)
        if target.dim() != 1 or not scores.dtype.is_floating_point:
            raise ConfigurationError(
                f"AUROC.update got scores of {scores.dtype} and shape {tuple(scores.shape)}: give "
                "numbers of shape (N,) or (N, classes), for targets of shape (N,)."
            )
        if scores.dim() == 1 and self.num_classes != 2:
            raise ConfigurationError(
                f"AUROC.update got one score for each sample, and num_classes={self.num_classes}: "
                f"give scores of shape (N, {self.num_classes})."
            )
        if scores.dim() == 2 and self.num_classes == 2:
            scores = scores[:, 1] - scores[:, 0]
        # Copies: what they are may be filled anew for the next batch.
        return {"scores": scores * 1, "targets": target + 0}

    def layout(self) -> Dict[str, Tuple[str, Tuple[Any, ...]]]:
        """See :class:`Metric`."""
        columns = () if self.num_classes == 2 else (self.num_classes,)
        return {"scores": ("f", (None, *columns)), "targets": ("i", (None,))}

    def value(self, state: State) -> Any:
        """The area, or an array with that of each class."""
        scores, targets = state["scores"], state["targets"]
        kept = targets != (-1 << 62 if self.ignore_index is None else self.ignore_index)
        scores, targets = scores[kept], targets[kept]
        count = int(self.num_classes or 2)
        self._refuse_outside(int(((targets < 0) | (targets >= count)).sum()), count)
        if np.isnan(scores).any():
            raise DataError("AUROC got scores that are NaN, which have no order.")
        if count == 2:
            return _area(scores, targets == 1)
        areas = np.array([_area(scores[:, each], targets == each) for each in range(count)])
        if self.average == "none":
            return areas
        if self.average == "macro":
            return float(areas.mean())
        return float(np.average(areas, weights=np.bincount(targets, minlength=count)))


def _area(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """The Mann-Whitney statistic: pairs in the right order, ties for a half, over all pairs."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    positives, negatives = int(is_positive.sum()), int((~is_positive).sum())
    if not positives or not negatives:
        return float("nan")
    twice = 2 * np.cumsum(counts) - counts + 1  # twice the mean rank of each score, whole numbers
    ranks = int(twice[place.reshape(-1)][is_positive].sum())
    return (ranks - positives * (positives + 1)) / (2 * positives * negatives)
