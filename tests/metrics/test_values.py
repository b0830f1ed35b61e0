"""The values of ofengine.metrics are those of scikit-learn, batch by batch or at once."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import oneflow as flow
import pytest
from oneflow import nn
from sklearn import metrics as reference

from ofengine import ConfigurationError, DataError
from ofengine.metrics import (
    AUROC,
    Accuracy,
    ConfusionMatrix,
    F1Score,
    Mean,
    MeanSquaredError,
    Metric,
    Precision,
    Recall,
)

_DRAWN = np.random.default_rng(3)
_CLASSES = 5
SCORES = _DRAWN.random((90, _CLASSES)).astype(np.float32)
SCORES /= SCORES.sum(axis=1, keepdims=True)
TARGETS = _DRAWN.integers(0, _CLASSES, 90)
GUESSES = SCORES.argmax(axis=1)
ONE_SCORE = np.round(_DRAWN.random(90), 1).astype(np.float32)  # many ties
YES = _DRAWN.integers(0, 2, 90)
NO_MATRIX = np.array([[0, 0], [0, 0]])

CASES: List[Tuple[str, Callable[[], Metric], Any, Any, Any]] = [
    ("accuracy", Accuracy, SCORES, TARGETS, reference.accuracy_score(TARGETS, GUESSES)),
    (
        "top 3",
        lambda: Accuracy(top_k=3),
        SCORES,
        TARGETS,
        reference.top_k_accuracy_score(TARGETS, SCORES, k=3),
    ),
    ("class numbers", Accuracy, GUESSES, TARGETS, reference.accuracy_score(TARGETS, GUESSES)),
    (
        "threshold",
        lambda: Accuracy(threshold=0.35),
        ONE_SCORE,
        YES,
        reference.accuracy_score(YES, np.float32(0.35) < ONE_SCORE),
    ),
    (
        "matrix",
        lambda: ConfusionMatrix(_CLASSES),
        SCORES,
        TARGETS,
        reference.confusion_matrix(TARGETS, GUESSES),
    ),
    *[
        (
            f"matrix by {each}",
            lambda each=each: ConfusionMatrix(_CLASSES, normalize=each),
            SCORES,
            TARGETS,
            reference.confusion_matrix(TARGETS, GUESSES, normalize=each),
        )
        for each in ("true", "pred", "all")
    ],
    *[
        (
            f"{kind.__name__} {average}",
            lambda kind=kind, average=average: kind(_CLASSES, average=average),
            SCORES,
            TARGETS,
            function(
                TARGETS, GUESSES, average=None if average == "none" else average, zero_division=0
            ),
        )
        for kind, function in (
            (Precision, reference.precision_score),
            (Recall, reference.recall_score),
            (F1Score, reference.f1_score),
        )
        for average in ("macro", "micro", "weighted", "none")
    ],
    *[
        (f"{kind.__name__} binary", lambda kind=kind: kind(2), ONE_SCORE, YES, value)
        for kind, value in (
            (Precision, reference.precision_score(YES, ONE_SCORE > 0.5)),
            (Recall, reference.recall_score(YES, ONE_SCORE > 0.5)),
            (F1Score, reference.f1_score(YES, ONE_SCORE > 0.5)),
        )
    ],
    ("area", AUROC, ONE_SCORE, YES, reference.roc_auc_score(YES, ONE_SCORE)),
    (
        "area of two columns",
        AUROC,
        np.stack([-ONE_SCORE, ONE_SCORE], axis=1),
        YES,
        reference.roc_auc_score(YES, ONE_SCORE),
    ),
    *[
        (
            f"area {average}",
            lambda average=average: AUROC(_CLASSES, average=average),
            SCORES,
            TARGETS,
            reference.roc_auc_score(TARGETS, SCORES, multi_class="ovr", average=average),
        )
        for average in ("macro", "weighted")
    ],
    (
        "area of each class",
        lambda: AUROC(_CLASSES, average="none"),
        SCORES,
        TARGETS,
        [reference.roc_auc_score(c == TARGETS, SCORES[:, c]) for c in range(_CLASSES)],
    ),
    (
        "mean squared error",
        MeanSquaredError,
        SCORES,
        SCORES[::-1].copy(),
        reference.mean_squared_error(SCORES.astype(np.float64), SCORES[::-1].astype(np.float64)),
    ),
    (
        "its root",
        lambda: MeanSquaredError(squared=False),
        SCORES[:, 0].copy(),
        SCORES[:, 1].copy(),
        np.sqrt(reference.mean_squared_error(SCORES[:, 0].astype("f8"), SCORES[:, 1].astype("f8"))),
    ),
]


def batches(*arrays: np.ndarray, sizes: Tuple[int, ...] = (40, 1, 29, 20)) -> List[List[Any]]:
    ends = np.cumsum(sizes)
    return [
        [flow.tensor(each[end - size : end]) for each in arrays] for end, size in zip(ends, sizes)
    ]


each_case = pytest.mark.parametrize(
    ("make", "given", "target", "wanted"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)


@each_case
def test_the_value_is_scikit_learn_s(
    make: Callable[[], Metric], given: Any, target: Any, wanted: Any
) -> None:
    metric, at_once = make(), make()
    for each in batches(given, target):
        metric.update(*each)
    at_once.update(flow.tensor(given), flow.tensor(target))
    value = metric.compute()
    np.testing.assert_allclose(value, wanted, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(value, at_once.compute(), rtol=1e-14)
    metric.reset()
    metric.update(flow.tensor(given), flow.tensor(target))
    np.testing.assert_array_equal(metric.compute(), at_once.compute())


@each_case
def test_states_of_ranks_merge_into_the_state_of_one_process(
    make: Callable[[], Metric], given: Any, target: Any, wanted: Any
) -> None:
    whole, ranks = make(), [make(), make()]
    for index, each in enumerate(batches(given, target)):
        ranks[index // 2].update(*each)
        whole.update(*each)
    merged = make()
    merged.merge([rank.state_dict() for rank in ranks])
    np.testing.assert_allclose(merged.compute(), whole.compute(), rtol=1e-15)
    if all(each.dtype.kind == "i" for each in whole.state_dict().values()):
        np.testing.assert_array_equal(merged.compute(), whole.compute())
    more = batches(given, target)[0]
    merged.update(*more)
    whole.update(*more)
    np.testing.assert_allclose(merged.compute(), whole.compute(), rtol=1e-15)


def test_a_graph_computes_the_same_sums() -> None:
    made = [(name, make(), make(), *data) for name, make, *data, _ in CASES]

    class Sums(nn.Graph):
        def build(self, *tensors: Any) -> Any:
            pairs = zip(made, tensors[::2], tensors[1::2])
            return [dict(graphed.sums(x, y)) for (_, _, graphed, *_), x, y in pairs]

    tensors = [flow.tensor(each) for *_, given, target in made for each in (given, target)]
    for (name, eager, graphed, *_), sums, x, y in zip(
        made, Sums()(*tensors), tensors[::2], tensors[1::2]
    ):
        eager.update(x, y)
        graphed.add(sums)
        kept, of_graph = eager.state_dict(), graphed.state_dict()
        assert kept.keys() == of_graph.keys()
        for key in kept:
            np.testing.assert_array_equal(kept[key], of_graph[key], err_msg=f"{name}: {key}")


def test_weights_of_a_mean() -> None:
    values, weights = np.array([0.5, 2.0, -1.0, 4.0]), np.array([1.0, 3.0, 0.0, 2.0])
    mean = Mean()
    mean.update(flow.tensor(values[:2]), flow.tensor(weights[:2]))
    mean.update(flow.tensor(values[2:]), flow.tensor(weights[2:]))
    assert mean.compute() == np.average(values, weights=weights)
    mean.reset()
    for value, weight in zip(values, weights):
        mean.update(flow.tensor(value), weight=weight)
    assert mean.compute() == np.average(values, weights=weights)
    mean.reset()
    mean(1.5)
    mean(flow.tensor([[1.0, 2.0]]), weight=2)
    mean(flow.tensor([3.0, 5.0]), weight=flow.tensor(4.0))
    assert mean.compute() == (1.5 + 2 * 3 + 4 * 8) / (1 + 4 + 8)


def test_a_mean_of_many_small_numbers_is_in_float64() -> None:
    mean = Mean()
    mean.update(flow.full((3,), 2.0**24))
    mean.update(flow.full((1,), 1.0))
    mean.update(flow.full((1,), 1.0))
    assert mean.compute() == (3 * 2.0**24 + 2) / 5  # float32 would lose the ones


@pytest.mark.parametrize("kind", [Accuracy, ConfusionMatrix, Precision, Recall, F1Score, AUROC])
def test_the_target_ignore_index_is_left_out(kind: Any) -> None:
    keeps = YES[:] == YES
    keeps[::3] = False
    targets = np.where(keeps, YES, -100)
    left_out, without = kind(num_classes=2, ignore_index=-100), kind(num_classes=2)
    left_out.update(flow.tensor(ONE_SCORE), flow.tensor(targets))
    without.update(flow.tensor(ONE_SCORE[keeps]), flow.tensor(YES[keeps]))
    np.testing.assert_array_equal(left_out.compute(), without.compute())


def test_pixels_count_each() -> None:
    scores = _DRAWN.random((2, 4, 3, 3)).astype(np.float32)
    targets = _DRAWN.integers(0, 4, (2, 3, 3))
    flat, guesses = targets.reshape(-1), scores.argmax(axis=1).reshape(-1)
    top = scores.transpose(0, 2, 3, 1).reshape(-1, 4)
    wanted: Dict[Metric, Any] = {
        Accuracy(): reference.accuracy_score(flat, guesses),
        Accuracy(top_k=2): reference.top_k_accuracy_score(flat, top, k=2, labels=range(4)),
        ConfusionMatrix(4): reference.confusion_matrix(flat, guesses, labels=range(4)),
        F1Score(4): reference.f1_score(flat, guesses, average="macro"),
    }
    for metric, value in wanted.items():
        metric.update(flow.tensor(scores), flow.tensor(targets))
        np.testing.assert_allclose(metric.compute(), value, rtol=1e-14)


def test_a_class_that_is_nowhere_is_no_part_of_a_mean() -> None:
    targets, guesses = np.array([0, 0, 2, 2]), np.array([0, 2, 2, 2])
    for kind, function in (
        (Precision, reference.precision_score),
        (Recall, reference.recall_score),
        (F1Score, reference.f1_score),
    ):
        metric = kind(4)
        metric.update(flow.tensor(guesses), flow.tensor(targets))
        assert metric.compute() == pytest.approx(function(targets, guesses, average="macro"))


def test_rows_of_many_batches_are_all_counted() -> None:
    metric = AUROC()
    scores, yes = np.tile(ONE_SCORE, 7), np.tile(YES, 7)
    for each in batches(scores, yes, sizes=(1,) * 630):
        metric.update(*each)
    assert metric.compute() == pytest.approx(reference.roc_auc_score(yes, scores), rel=1e-14)
    assert metric.state_dict()["scores"].tolist() == scores.tolist()


def test_what_was_given_may_be_filled_anew() -> None:
    metric, scores, yes = AUROC(), flow.tensor([0.1, 0.9]), flow.tensor([0, 1])
    metric.update(scores, yes)
    scores.fill_(0.5)
    yes.fill_(1)
    assert metric.compute() == 1.0


def test_an_area_without_a_pair_is_no_number() -> None:
    metric = AUROC()
    metric.update(flow.tensor([0.1, 0.9]), flow.tensor([1, 1]))
    assert np.isnan(metric.compute())


ids = flow.tensor([0, 1])
MISTAKES: List[Tuple[Callable[[], Any], str]] = [
    (lambda: Accuracy().compute(), "had no update since it was reset"),
    (lambda: Accuracy(top_k=0), "top_k=0"),
    (lambda: Accuracy(num_classes=1), "num_classes=1"),
    (lambda: Accuracy(task="multiclass"), "'task': num_classes tells it"),
    (lambda: Accuracy(clases=3), "no argument 'clases'"),
    (lambda: Accuracy(top_k=3).update(flow.ones(2, 2), ids), "scores of 3 classes or more"),
    (lambda: Accuracy(num_classes=3).update(flow.ones(2, 2), ids), "scores of 2 classes"),
    (lambda: Accuracy().update(flow.ones(2, 2), flow.ones(2)), "give class numbers"),
    (lambda: Accuracy().update(flow.ones(2, 2), ids.reshape(2, 1)), r"shape \(2, 2\) for targets"),
    (lambda: Accuracy().update([1, 2], ids), "list for its predictions: give tensors"),
    (lambda: ConfusionMatrix(3, normalize="rows"), "normalize='rows'"),
    (lambda: ConfusionMatrix(3).update(flow.ones(2), ids), "one score for each sample"),
    (lambda: F1Score(3, average="binary"), '"binary" is for two classes'),
    (lambda: F1Score(3, average="mean"), "give one of binary, macro"),
    (lambda: AUROC(average="micro"), "AUROC"),
    (lambda: AUROC(3).update(flow.ones(2), ids), "one score for each sample"),
    (lambda: AUROC().update(ids, ids), "scores of oneflow.int64"),
    (lambda: MeanSquaredError().update(flow.ones(2, 1), flow.ones(2)), "targets of shape"),
    (lambda: Mean().update("1,5"), "Mean.update got"),
    (lambda: Mean().update(flow.ones(4), flow.ones(2)), "a weight of shape"),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "says"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_told_in_a_sentence(mistake: Callable[[], Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as told:
        mistake()
    assert str(told.value).endswith((".", "?"))


@pytest.mark.parametrize("kind", [Accuracy, ConfusionMatrix, Precision, Recall, F1Score, AUROC])
@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_told(kind: Any, label: int) -> None:
    metric = kind(num_classes=3)
    metric.update(flow.tensor(SCORES[:3, :3]), flow.tensor([0, label, 2]))
    with pytest.raises(DataError, match="got 1 labels that are no class"):
        metric.compute()


def test_scores_that_are_no_numbers_are_told() -> None:
    metric = AUROC()
    metric.update(flow.tensor([0.1, float("nan")]), flow.tensor([0, 1]))
    with pytest.raises(DataError, match="NaN"):
        metric.compute()
