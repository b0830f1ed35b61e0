"""Metrics in a run: logged and reset as in Lightning, the same in both modes, exact on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import Notes, quiet_trainer
from helpers.resuming import Net, Outcome, assert_same_run, check_exact, run
from oneflow import nn
from oneflow.utils.data import DataLoader, TensorDataset
from sklearn.metrics import accuracy_score, roc_auc_score

from ofengine import Callback, CheckpointError, ConfigurationError, GraphModeError, TaskModule
from ofengine.metrics import AUROC, Accuracy, ConfusionMatrix, Mean, MeanSquaredError, Metric
from ofengine.metrics.base import _Sums

_DRAWN = np.random.default_rng(0)
INPUTS = _DRAWN.normal(size=(22, 3)).astype(np.float32)
LABELS = (INPUTS[:, 0] > 0).astype(np.int64)
SIZES = (8, 8, 6)


def batches() -> List[Any]:
    ends = np.cumsum(SIZES)
    return [
        (flow.tensor(INPUTS[end - size : end]), flow.tensor(LABELS[end - size : end]))
        for end, size in zip(ends, SIZES)
    ]


class Classifier(TaskModule):
    """One layer, and an accuracy that training and validation share."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        with flow.no_grad():
            self.layer.weight.copy_(flow.tensor([[-0.5, 1.0, 0.0], [0.2, -1.0, 0.5]]))
            self.layer.bias.zero_()
        self.acc = Accuracy()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.layer(batch[0])
        self.acc(logits, batch[1])
        self.log("acc", self.acc, on_step=True, on_epoch=True)
        return {"loss": nn.functional.cross_entropy(logits, batch[1]), "logits": logits.detach()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.acc.update(self.layer(batch[0]), batch[1])
        self.log("val_acc", self.acc)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.5)


class Keeps(Callback):
    """The guesses of each training batch, and the accuracy of each epoch's validation."""

    def __init__(self) -> None:
        self.guesses: List[np.ndarray] = []
        self.validated: List[float] = []

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, i: int) -> None:
        self.guesses.append(outputs["logits"].numpy().argmax(axis=1))

    def on_validation_start(self, trainer: Any, task: Any) -> None:
        guesses = task.layer(flow.tensor(INPUTS)).numpy().argmax(axis=1)
        self.validated.append(accuracy_score(LABELS, guesses))


def test_an_accuracy_is_logged_and_reset(mode: str) -> None:
    keeps, notes = Keeps(), Notes()
    trainer = quiet_trainer(
        mode=mode, max_epochs=2, log_every_n_steps=1, logger=notes, callbacks=keeps,
        num_sanity_val_steps=1, val_check_interval=2,
    )  # fmt: skip
    trainer.fit(Classifier(), batches(), batches())
    labels = [each[1].numpy() for each in batches()] * 2
    by_step = [accuracy_score(a, b) for a, b in zip(labels, keeps.guesses)]
    by_epoch = [accuracy_score(LABELS, np.concatenate(keeps.guesses[i : i + 3])) for i in (0, 3)]
    logged: Dict[str, List[float]] = {}
    for _, _, metrics in notes.rows:
        for name, value in metrics.items():
            logged.setdefault(name, []).append(value)
    assert logged["acc_step"] == by_step
    assert logged["acc_epoch"] == by_epoch
    assert logged["val_acc"] == keeps.validated[1:]  # the first was the sanity check
    assert len({*by_epoch, *keeps.validated}) > 2
    history = trainer.history
    assert [v for v in history["acc_step"] if not np.isnan(v)] == by_step
    assert [(r["epoch"], r["step"], r["acc_epoch"]) for r in history if "acc_epoch" in r] == [
        (0, 3, by_epoch[0]), (1, 6, by_epoch[1])
    ]  # fmt: skip
    assert trainer.logged_metrics["acc_epoch"] == trainer.callback_metrics["acc"] == by_epoch[1]


def test_each_evaluation_and_each_loader_begins_anew(mode: str) -> None:
    task, trainer = Classifier(), quiet_trainer(mode=mode)
    guesses = task.layer(flow.tensor(INPUTS)).numpy().argmax(axis=1)
    whole = accuracy_score(LABELS, guesses)
    for _ in range(2):
        assert trainer.validate(task, batches()) == [{"val_acc": whole}]
    parts = [slice(0, 8), slice(8, 22)]
    loaders = [
        DataLoader(TensorDataset(flow.tensor(INPUTS[p]), flow.tensor(LABELS[p])), batch_size=8)
        for p in parts
    ]
    assert trainer.test(task, loaders) == [
        {f"val_acc/dataloader_idx_{i}": accuracy_score(LABELS[p], guesses[p])}
        for i, p in enumerate(parts)
    ]


def test_nothing_is_read_between_two_logs(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: List[int] = []
    trainer = quiet_trainer(mode=mode, max_epochs=1, log_every_n_steps=100)
    read = _Sums.read
    monkeypatch.setattr(
        _Sums, "read", lambda sums: reads.append(trainer.batches_seen) or read(sums)
    )
    trainer.fit(Classifier(), batches() * 5)
    assert reads == [15]


class Counting(Net):
    """All kinds of metrics: logged by step and by epoch, in a dict, not logged, of a callback."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.errors = {"mse": MeanSquaredError()}
        self.mean, self.area, self.val_mean = Mean(), AUROC(), Mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        returned = super().training_step(batch, batch_idx)
        loss = returned["loss"] if isinstance(returned, dict) else returned
        inputs = batch[0].reshape(batch[0].shape[0], -1)
        self.errors["mse"](inputs[:, 0], inputs[:, 1])
        self.log("mse", self.errors["mse"], on_step=True, on_epoch=True)
        self.area(inputs[:, 0], (inputs[:, 1] > 0).long())
        self.log("area", self.area, on_step=False, on_epoch=True)
        self.mean(loss, weight=inputs.shape[0])
        return returned

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.val_mean(batch[0])
        self.log("val_mean", self.val_mean)
        return super().validation_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("by_hand", self.mean.compute())
        self.mean.reset()


class Counts(Callback):
    """A metric that is the callback's."""

    def __init__(self) -> None:
        self.seen = Mean()

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, i: int) -> None:
        self.seen.update(outputs["loss"])

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        trainer.log_metrics({"seen": self.seen.compute()})


def counted(mode: str, **arguments: Any) -> Outcome:
    """A run whose epochs have five batches, in windows of two."""
    return run(
        mode, task=Counting, callbacks=lambda: [Counts()], accumulate_grad_batches=2,
        val_check_interval=2, log_every_n_steps=1, **arguments,
    )  # fmt: skip


def test_a_resumed_run_counts_as_one_that_never_stopped(tmp_path: Path) -> None:
    whole, graph = counted("eager", save_to=tmp_path), counted("graph")
    assert whole.saves is not None
    assert graph.rows == whole.rows, "both modes"
    assert list(graph.trainer.history) == list(whole.trainer.history)
    assert {"mse", "area", "by_hand", "seen", "val_mean"} <= set(whole.rows[-1][1])
    files = {path.stem[4:]: path for path in whole.saves.files[:-4]}
    for mode, kind in (("eager", "batch"), ("eager", "validating"), ("graph", "batch")):
        resumed, path = counted(mode, resume_from=files[kind]), files[kind]
        assert_same_run(resumed, whole, whole.saves.rows_before[path], path.name)
        assert list(resumed.trainer.history) == list(whole.trainer.history), path.name
        assert resumed.trainer.logged_metrics == whole.trainer.logged_metrics, path.name


@pytest.mark.slow
def test_a_run_resumed_from_anywhere_counts_the_same(mode: str, tmp_path: Path) -> None:
    check_exact(tmp_path, mode, task=Counting, callbacks=lambda: [Counts()], val_check_interval=2)


def test_an_option_that_is_changed_counts_from_then_on(mode: str) -> None:
    class Widens(Classifier):
        def on_train_epoch_end(self) -> None:
            self.acc.top_k = 2

    notes = Notes()
    trainer = quiet_trainer(mode=mode, max_epochs=2, logger=notes)
    trainer.fit(Widens(), batches())
    epochs = [metrics["acc_epoch"] for _, _, metrics in notes.rows if "acc_epoch" in metrics]
    assert epochs[0] < 1.0 == epochs[1]  # both classes are among the two best


def test_counting_compiles_nothing_anew(caplog: pytest.LogCaptureFixture) -> None:
    class Own(Metric):
        def __init__(self) -> None:
            self.names = ["sum"]

        def sums(self, values: Any) -> Dict[str, Any]:
            return {name: values.double().sum().reshape(1) for name in self.names}

        def value(self, state: Any) -> float:
            return float(state["sum"][0])

    class Sums(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.own = Own()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.own(batch[0])
            self.log("own", self.own, on_epoch=True)
            return super().training_step(batch, batch_idx)

    notes = Notes()
    with caplog.at_level("INFO", "ofengine"):
        quiet_trainer(mode="graph", max_epochs=3, logger=notes).fit(Sums(), batches())
    assert not [each for each in caplog.messages if "compiled again" in each]
    sums = [metrics["own_epoch"] for _, _, metrics in notes.rows if "own_epoch" in metrics]
    assert sums == [pytest.approx(INPUTS.astype("f8").sum(), rel=1e-12)] * 3


def test_an_area_over_an_epoch_is_not_a_mean_of_areas(mode: str) -> None:
    class Areas(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.area = AUROC()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.area(batch[0][:, 1], batch[1])
            self.log("area", self.area)

    results = quiet_trainer(mode=mode).validate(Areas(), batches())
    assert results == [{"area": pytest.approx(roc_auc_score(LABELS, INPUTS[:, 1]), rel=1e-14)}]


def test_lr_find_leaves_the_sums_as_they_were(mode: str) -> None:
    task = Classifier()
    task.acc(flow.tensor([[0.0, 1.0]]), flow.tensor([1]))
    quiet_trainer(mode=mode).lr_find(task, batches(), num_steps=10)
    assert task.acc.state_dict()["counts"].tolist() == [1, 1, 0]


# ---------------------------------------------------------------------- mistakes


def test_a_metric_without_a_batch_is_told(mode: str) -> None:
    class Forgets(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("acc", self.acc)
            return self.layer(batch[0]).mean()

    with pytest.raises(ConfigurationError, match=r"log\('acc', Accuracy\) came before"):
        quiet_trainer(mode=mode, max_epochs=1).fit(Forgets(), batches())


def test_a_matrix_is_no_number_to_log(mode: str) -> None:
    class Logs(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.acc: Any = ConfusionMatrix(2)

    with pytest.raises(ConfigurationError, match=r"ConfusionMatrix\): its value is an array"):
        quiet_trainer(mode=mode, max_epochs=1).fit(Logs(), batches())


@pytest.mark.parametrize("method", ["compute", "reset"])
def test_what_needs_numbers_is_refused_in_a_compiled_step(method: str) -> None:
    class Reads(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            returned = super().training_step(batch, batch_idx)
            getattr(self.acc, method)()
            return returned

    with pytest.raises(GraphModeError, match=rf"Accuracy.{method}\(\) cannot be used inside"):
        quiet_trainer(mode="graph", max_epochs=1).fit(Reads(), batches())


def test_a_number_in_a_compiled_step_is_refused() -> None:
    class Counts(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.mean = Mean()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.mean(0.5)
            return super().training_step(batch, batch_idx)

    with pytest.raises(GraphModeError, match=r"Mean.update\(0.5\) in a compiled step"):
        quiet_trainer(mode="graph", max_epochs=1).fit(Counts(), batches())


def test_an_update_in_a_graph_of_one_s_own_is_refused() -> None:
    class Own(Classifier):
        def build_graph(self) -> nn.Graph:
            layer, optimizer, metric = self.layer, self.optimizer, self.acc

            class Step(nn.Graph):
                def __init__(self) -> None:
                    super().__init__()
                    self.layer = layer
                    self.add_optimizer(optimizer)

                def build(self, inputs: Any, labels: Any) -> Any:
                    logits = self.layer(inputs)
                    metric.update(logits, labels)
                    loss = nn.functional.cross_entropy(logits, labels)
                    loss.backward()
                    return loss

            return Step()

    with pytest.raises(
        GraphModeError, match=r"Accuracy.update\(\) is called in a graph of your own"
    ):
        quiet_trainer(mode="graph", max_epochs=1).fit(Own(), batches())


def test_a_metric_that_no_checkpoint_finds_is_told(tmp_path: Path) -> None:
    somewhere = Accuracy()

    class Hides(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.acc = somewhere
            returned = super().training_step(batch, batch_idx)
            del self.acc
            return returned

    trainer = quiet_trainer(max_epochs=1, callbacks=SavesOnce(tmp_path / "a.safetensors"))
    with pytest.warns(UserWarning, match="no checkpoint can keep the sums"):
        trainer.fit(Hides(), batches())


class SavesOnce(Callback):
    """Saves after the second batch of the first epoch."""

    fires_last = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, i: int) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


def test_sums_of_another_metric_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    quiet_trainer(max_epochs=1, callbacks=SavesOnce(path)).fit(Classifier(), batches())

    class Others(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.acc: Any = MeanSquaredError()

    with pytest.raises(
        CheckpointError, match=r"task\.acc was a Accuracy, and is a MeanSquaredError"
    ):
        quiet_trainer(max_epochs=1).fit(Others(), batches(), ckpt_path=path)


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        (np.zeros(4, dtype=np.int64), "has int64 of shape (4,) for 'counts'"),
        (np.zeros(3), "has float64 of shape (3,) for 'counts'"),
    ],
)
def test_sums_of_another_shape_are_refused(counts: np.ndarray, says: str) -> None:
    assert Accuracy().misfit({"counts": np.zeros(3, dtype=np.int64)}) is None
    assert Accuracy().misfit({"counts": counts}) == says
