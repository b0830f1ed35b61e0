"""What graph mode trains on several ranks, to be compared with one process on the whole batch.

Each case is a function of a :class:`Place`; alone, it takes batches as large as those of all ranks
together. Run as a program, one rank goes through all cases and writes down what it got.
"""

from __future__ import annotations

import gc
import pickle
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional
from unittest.mock import patch

import numpy as np
import oneflow as flow
from cases_of_batches import Synced, by_schedule
from cases_of_checkpoints import SavesAt, rates_found
from cases_of_decisions import Skips, ended_by_a_signal
from oneflow import nn
from oneflow.utils.data import DataLoader
from rank_basics import Place as EagerPlace, Result, dataset, weights

from ofengine import Callback, OFEngineError, TaskModule, Trainer
from ofengine.callbacks import EMAWeightAveraging, LRDecayCallback, PredictionWriter
from ofengine.metrics import Accuracy, ConfusionMatrix
from ofengine.speedups import activations, convolutions, norms, recurrent

CASES: Dict[str, Callable[[Place], Result]] = {}


def case(function: Callable[[Place], Result]) -> Callable[[Place], Result]:
    CASES[function.__name__] = function
    return function


class Place(EagerPlace):
    """Where a case runs: on one of ``size`` ranks, or alone, with the batches of all of them."""

    together = True
    """False where a process that is alone takes the batches of ranks one after the other."""

    def rows(self, batch_size: int) -> int:
        """``batch_size`` of each rank, in the rows that this process takes at once."""
        return batch_size * self.size if self.alone and self.together else batch_size

    def trainer(self, accumulate: int = 1, **options: Any) -> Trainer:
        given = {"accumulate_grad_batches": accumulate, "mode": "graph", **options}
        return super().trainer(**given)

    def loader(self, samples: int = 46, batch_size: int = 4, shuffle: bool = True) -> DataLoader:
        return DataLoader(dataset(samples), batch_size=self.rows(batch_size), shuffle=shuffle)


class Net(TaskModule):
    """Two layers, and one that nothing uses."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        flow.manual_seed(1)
        self.optimizer_name = optimizer
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)
        self.never = nn.Linear(2, 2)
        self.register_buffer("scale", flow.tensor([0.9]))
        self.matrix, self.acc = ConfusionMatrix(3), Accuracy()

    def scores(self, x: Any) -> Any:
        return self.second(self.first(x).relu() * self.scale)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        scores = self.scores(x)
        loss = nn.functional.cross_entropy(scores, y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_acc", (scores.argmax(dim=-1) == y).to(flow.float32).mean())
        return {"loss": loss, "scores": scores}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        scores = self.scores(x)
        self.log("val_loss", nn.functional.cross_entropy(scores, y))
        self.acc.update(scores, y)
        self.matrix.update(scores, y)
        self.log("val_acc", self.acc)

    def on_validation_epoch_end(self) -> None:
        for index, row in enumerate(self.matrix.compute()):
            self.log(f"row_{index}", float((row * np.arange(1, 4)).sum()))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.scores(batch[0])

    def configure_optimizers(self) -> Any:
        if self.optimizer_name == "sgd":
            return flow.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return flow.optim.AdamW(self.parameters(), lr=0.02)


def fitted(
    task: TaskModule, trainer: Trainer, train: Any, val: Any = None, **options: Any
) -> Result:
    before = {name: id(each) for name, each in task.named_parameters()}
    trainer.fit(task, train, val, **options)
    after = dict(task.named_parameters())
    assert {name: id(each) for name, each in after.items()} == before
    assert all(each.is_local for each in (*after.values(), *task.buffers()))
    return {
        "weights": weights(task),
        "metrics": dict(trainer.callback_metrics),
        "steps": trainer.global_step,
    }


@case
def five_steps_of_sgd(place: Place) -> Result:
    return fitted(Net(), place.trainer(max_steps=5, max_epochs=-1), place.loader())


class LossScaled(Net):
    """A CPU computes no half precision, but gradients go their way past the scale of the loss."""

    def configure_graph(self, config: Any) -> None:
        config.enable_amp(True)


@case
def a_loss_scale_in_clipped_windows(place: Place) -> Result:
    trainer = place.trainer(2, max_steps=5, max_epochs=-1, gradient_clip_val=0.3)
    return fitted(Net() if place.alone else LossScaled(), trainer, place.loader())


@case
def five_steps_of_adamw(place: Place) -> Result:
    return fitted(Net("adamw"), place.trainer(max_steps=5, max_epochs=-1), place.loader())


class Layered(TaskModule):
    """One layer of each kind that has faster operators; it makes tensors of numbers as it goes."""

    def __init__(self) -> None:
        super().__init__()
        flow.manual_seed(1)
        self.conv = nn.Conv2d(4, 4, 5, padding=2, groups=4)
        self.norm, self.gelu, self.silu = nn.LayerNorm(16), nn.GELU(), nn.SiLU()
        self.lstm, self.head = nn.LSTM(16, 6, batch_first=True), nn.Linear(6, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        rows = self.conv(batch).reshape(batch.shape[0], 4, 16)
        rows = rows + rows.new_ones((1, 4, 16)) * rows.new_full((16,), 0.5)
        if rows.is_global:  # as OneFlow's own layers do
            rows = rows + flow.zeros(1, 16, placement=rows.placement, sbp=rows.sbp)
        return self.head(self.lstm(self.silu(self.gelu(self.norm(rows))))[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.parameters(), lr=0.1)


def layered(place: Place, faster: bool) -> Result:
    images = flow.tensor(np.random.RandomState(2).rand(20, 4, 4, 4).astype(np.float32))
    batches = list(images.split(place.rows(2)))
    used: List[Any] = []
    calls = [(norms, "layer_norm"), (activations, "gelu"), (activations, "silu")]
    calls += [(convolutions, "depthwise"), (recurrent, "lstm")]
    with ExitStack() as watched:
        for module, name in calls:
            spied = patch.object(module, name, wraps=getattr(module, name))
            used.append(watched.enter_context(spied))
        found = fitted(Layered(), place.trainer(cpu_speedups=faster), batches)
    return {**found, "used": [each.called for each in used]}


@case
def layers_of_each_kind(place: Place) -> Result:
    return layered(place, faster=False)


@case
def layers_of_each_kind_in_faster_operators(place: Place) -> Result:
    found = layered(place, faster=True)
    assert found["used"] == [True] * 5
    return found


@case
def weight_decay_and_momentum_by_schedule(place: Place) -> Result:
    """The optimizer makes its step on each rank, with the gradients of all."""

    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            return by_schedule(self)

    one, two = Scheduled(), Scheduled()
    first = fitted(one, place.trainer(gradient_clip_val=0.05), place.loader(), place.loader())
    return {"by batch": first, "by window": fitted(two, place.trainer(2), place.loader())}


@case
def layerwise_rates_clipping_and_all_that(place: Place) -> Result:
    """Over windows of two rounds, with an epoch's end that cuts one short and is uneven."""

    class Layerwise(Net):
        def configure_optimizers(self) -> Any:
            groups = [
                {"params": self.first.parameters(), "lr": 0.02, "name": "a", "lr_scale": 0.5},
                {"params": [*self.second.parameters(), *self.never.parameters()], "lr": 0.02,
                 "name": "b", "lr_decay_scale": 0.9},
            ]  # fmt: skip
            optimizer = flow.optim.AdamW(groups, lr=0.02)
            cosine = flow.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
            return {"optimizer": optimizer, "lr_scheduler": cosine}

    callbacks = [LRDecayCallback(every_n_batches=2), EMAWeightAveraging(decay=0.9)]
    trainer = place.trainer(accumulate=2, gradient_clip_val=0.05, callbacks=callbacks)
    # Of 5 rows and one, the last rank has few, or none.
    val = place.loader(batch_size=9, samples=9 * place.size + 1)
    result = fitted(Layerwise(), trainer, place.loader(), val)
    rates = [trainer.rates.rates(step) for step in range(trainer.global_step)]
    return {**result, "rates": rates}


class Changing(Callback):
    """Freezes a layer, gives another new memory, and changes what a step reads, as it goes on."""

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            task.first.requires_grad_(False)
        if trainer.global_step == 4:
            task.first.requires_grad_(True)
            task.second.weight.data = task.second.weight.data * 0.5
            task.factor = 0.5


class Versatile(Net):
    """Makes tensors in its step, writes into a buffer, and trains by a rate that metrics change."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0
        self.register_buffer("mean", flow.zeros(6))
        self.register_buffer("seen", flow.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.seen.add_(flow.tensor([float(x.shape[0])], device=x.device))
        shift = flow.ones(6, device=x.device).to(x.device) * flow.linspace(0.0, 1.0, 6)
        scores = self.scores((x - shift).to(flow.float32)) + flow.zeros(x.shape[0], 3)
        return nn.functional.cross_entropy(scores, y) * self.factor

    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.parameters(), lr=0.4)
        plateau = flow.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"},
        }


@case
def a_task_that_changes_as_it_trains(place: Place) -> Result:
    trainer = place.trainer(callbacks=[Changing()], gradient_clip_val=0.01,
                            gradient_clip_algorithm="value")  # fmt: skip
    loader = place.loader(samples=12 * place.size, batch_size=4)
    return fitted(Versatile(), trainer, loader, loader)


class Normed(Net):
    """With a batch norm that is called twice in a step, in eval mode in between, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8, momentum=0.3)
        self.other_norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.4)

    def scores(self, x: Any) -> Any:
        if self.training:
            self.norm(self.first(x) + 1.0)
            self.norm.eval()
            self.norm(self.first(x))
            self.norm.train()
        return self.second(self.dropout(self.norm(self.first(self.other_norm(x))).relu()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.cross_entropy(self.scores(x), y)


@case
def batch_norms_and_dropout(place: Place) -> Result:
    """Of each rank's batch alone, as in the process that accumulates these batches."""
    place.together = False
    options = {"mode": "eager", "accumulate": place.size} if place.alone else {}
    loader = place.loader(samples=16 * place.size, batch_size=4)
    val = place.loader(9 * place.size, 3)
    result = fitted(Normed(), place.trainer(**options), loader, val)
    del result["metrics"]["loss"]  # that of the last batch, which is that of all ranks, or of one
    return result


def synced(place: Place, rows: int, accumulate: int, **options: Any) -> Result:
    """Each rank has ``rows`` in all, and rank 0 four more where nothing accumulates."""
    callbacks, path = options.get("callbacks", []), options.get("ckpt_path")
    trainer = place.trainer(accumulate, sync_batchnorm=True, callbacks=callbacks)
    loader = place.loader(rows * place.size + 4 * (accumulate == 1), 4)
    task = Synced()
    result = fitted(task, trainer, loader, ckpt_path=path)
    assert type(task.images) is nn.BatchNorm2d and "forward" not in vars(task.images)
    return result


@case
def batch_norms_of_all_ranks(place: Place) -> Result:
    """By all rows of a round; in the last round one rank has some."""
    return synced(place, 12, 1)


@case
def batch_norms_of_all_ranks_resumed_in_a_window(place: Place) -> Result:
    path = place.folder / "own.safetensors"
    done = 3 if place.alone else 3 * place.size
    whole = synced(place, 16, 2)
    synced(place, 16, 2, callbacks=[SavesAt(done, path)])
    resumed = synced(place, 16, 2, ckpt_path=path)
    for name, each in whole["weights"].items():
        assert np.array_equal(each, resumed["weights"][name]), name
    return whole


class Weighed(Net):
    """The mean loss of rows that count unequally, and what they count together."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        counts = x[:, 0].abs() + 0.1
        losses = nn.functional.cross_entropy(self.scores(x), y, reduction="none")
        return {"loss": (losses * counts).sum() / counts.sum(), "weight": counts.sum()}


def weighed(place: Place, *callbacks: Callback, path: Optional[Path] = None) -> Result:
    """In windows of two rounds; alone, eagerly, of as many batches. One is left in the end."""
    place.together = False
    accumulate, mode = (2 * place.size, "eager") if place.alone else (2, "graph")
    given = {"mode": mode, "callbacks": list(callbacks), "gradient_clip_val": 0.5}
    loader = place.loader(4 * 6 * place.size + 3, 4)
    result = fitted(Weighed("adamw"), place.trainer(accumulate, **given), loader, ckpt_path=path)
    return {key: result[key] for key in ("weights", "steps")}


@case
def rounds_of_unequal_weight(place: Place) -> Result:
    return weighed(place)


@case
def rounds_of_unequal_weight_resumed_in_a_window(place: Place) -> Result:
    path = place.folder / "own.safetensors"
    whole = weighed(place)
    weighed(place, SavesAt(3 * place.size, path))
    resumed = weighed(place, path=path)
    for name, each in whole["weights"].items():
        assert np.array_equal(each, resumed["weights"][name]), name
    return whole


@case
def epochs_that_are_left(place: Place) -> Result:
    """In a window, in a round that one rank has a batch for, and at once."""
    skips = Skips(int, 3, 5, 0)
    trainer = place.trainer(2, callbacks=[skips], max_epochs=3)
    return fitted(Net(), trainer, place.loader(4 * (5 * place.size + 1), 4))


@case
def rates_that_are_found(place: Place) -> Result:
    return rates_found(place, Net(), place.loader(4 * 5 * place.size, 4), max_lr=1.0)


@case
def batch_norms_in_eager_mode_and_graphs_that_evaluate(place: Place) -> Result:
    place.together = False
    accumulate = place.size if place.alone else 1
    options = {"mode": "eager", "eval_mode": "graph", "num_sanity_val_steps": 0}
    results = []
    for sync in (False, True):
        if sync and place.alone:  # as one process with larger batches
            place.together, accumulate = True, 1
        trainer = place.trainer(accumulate, sync_batchnorm=sync, **options)
        loader = place.loader(12 * place.size, 4)
        place.together = False
        val = place.loader(9 * place.size, 3, shuffle=False)
        results.append(fitted(Synced() if sync else Normed(), trainer, loader, val))
        del results[-1]["metrics"]["loss"]
    return {"of each": results[0], "of all": results[1]}


@case
def evaluations(place: Place) -> Result:
    writer = PredictionWriter(place.folder)
    trainer, task = place.trainer(callbacks=[writer]), Net()
    loaders = [place.loader(11, 4, shuffle=False), place.loader(3, 4, shuffle=False)]
    results = [trainer.validate(task, loaders), trainer.test(task, loaders[1])]
    predicted = trainer.predict(task, loaders[0])
    rows = np.concatenate([each.numpy() for each in predicted])
    with np.load(place.folder / "version_0" / "loader_0.npz") as arrays:
        assert np.array_equal(arrays["predictions"], rows)
    return {"results": results, "predicted": rows}


# ---------------------------------------------------------------------- ends and refusals


@case
def a_signal_to_one_rank(place: Place) -> Result:
    return ended_by_a_signal(place, Net(), place.loader())


class Beside(Net):
    """Reads a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = flow.ones(6)

    def scores(self, x: Any) -> Any:
        return super().scores(x + self.shift)


class OfAList(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[:2], batch_idx)


class OfItsOwnGraph(Net):
    """With a batch norm, which its graph does not synchronize."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def build_graph(self) -> Any:
        graph = super().build_graph()

        class Own(type(graph)):  # type: ignore[misc]
            pass

        graph.__class__ = Own
        return graph


class Zero(Net):
    def configure_graph(self, config: Any) -> None:
        config.enable_zero(True, stage=2)


@case
def what_is_refused(place: Place) -> Result:
    """On all ranks, which go on afterwards; alone nothing needs to be."""
    if place.alone:
        return {"raised": True}
    x, y = flow.ones(4, 6), flow.zeros(4, dtype=flow.int64)
    uneven = [(x, y), (x[:, :3], y), (x, y)][: place.size]
    averages = Net()
    averages.norm = nn.BatchNorm1d(6, momentum=None)
    raised = True
    for task, batches, says in (
        (Beside(), [(x, y)] * place.size, "neither of its batch nor a parameter or buffer"),
        (OfAList(), [(x, y, flow.tensor(1.0))] * place.size, "along their first dimension"),
        (Net(), uneven, "batches of other shapes"),
        (Net(), [(x, y), (x, y + 7), (x, y)][: place.size], "4 of "),
        (averages, [(x, y)] * place.size, "momentum=None"),
        (Zero(), [(x, y)] * place.size, "enable_zero(True) leaves each rank a part"),
        (OfItsOwnGraph(), [(x, y)] * place.size, "not reach into OfItsOwnGraph.build_graph()"),
    ):
        try:
            trainer = place.trainer(sync_batchnorm=True)
            trainer.fit(task, batches)
        except OFEngineError as error:
            raised = raised and says in str(error)
        else:
            raised = False
    if trainer.global_rank == 0:
        gc.collect()  # a graph that is collected would wait for the other ranks
    return {"raised": raised}


# ---------------------------------------------------------------------- files


def resumable(place: Place, mode: str, callbacks: Any = (), path: Optional[Path] = None) -> Result:
    place.together = False
    loader = place.loader(4 * 6 * place.size, 4)
    accumulate = place.size * 2 if place.alone else 2
    trainer = place.trainer(accumulate, mode=mode, callbacks=list(callbacks), max_epochs=2)
    result = fitted(Net("adamw"), trainer, loader, ckpt_path=path)
    return {key: result[key] for key in ("weights", "steps")}  # metrics are of other batches


@case
def saved_for_others(place: Place) -> Result:
    """In the middle of a window; of the process that is alone, in the middle of a round."""
    done = 3 * place.size + (1 if place.alone else 0)
    name = "alone" if place.alone else "ranks"
    resumable(place, "graph", [SavesAt(done, place.shared / f"{name}.safetensors")])
    return {}


@case
def resumed_here_and_there(place: Place) -> Result:
    """In either mode, on ranks or alone, a run goes on as the one that never stopped."""
    whole = resumable(place, "graph")
    runs = {
        f"{mode} from {name}": resumable(place, mode, path=place.shared / f"{name}.safetensors")
        for mode, name in (("graph", "alone"), ("graph", "ranks"), ("eager", "ranks"))
    }
    return {"whole": whole, **runs}


def run_case(name: str, place: Place) -> Result:
    place.folder.mkdir(parents=True, exist_ok=True)
    flow.manual_seed(0)
    return CASES[name](place)


def main(folder: Path, names: Any) -> None:
    from ofengine.launch.environment import read

    world = read()
    assert world is not None
    results: Dict[str, Any] = {}
    for name in names:
        place = Place(world.world_size, False, folder / "ranks" / name, folder)
        results[name] = run_case(name, place)
    (folder / f"results_{world.rank}.pickle").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3:])
