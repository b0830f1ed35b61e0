"""Weight decay and momentum by schedule: what loops by hand over OneFlow compute, in both modes."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import numpy as np
import oneflow as flow
import pytest
from helpers import (
    MODES,
    Line,
    assert_same_arrays,
    batches,
    bits,
    fill_deterministically,
    largest_difference,
    quiet_trainer,
    refused,
    sentence,
    weights_of,
)
from helpers.resuming import Net, check_exact
from oneflow import nn

from ofengine import Callback, ConfigurationError, RateError, TaskModule, Trainer
from ofengine.callbacks import EMAWeightAveraging, GradualUnfreezing, LearningRateMonitor
from ofengine.checkpoint import read
from ofengine.checkpoint.schema import check_state
from ofengine.errors import CheckpointError

Make = Callable[[Any], Any]
STEPS = 8
FALLING = [0.95, 0.9, 0.9, 0.85, 0.8, 0.85, 0.9, 0.95]


def rising(step: int) -> float:
    """DINO's cosine from 0.04 to 0.4."""
    return 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * step / (STEPS - 1)))


def rows(sizes: Sequence[int]) -> List[Any]:
    rng = np.random.default_rng(0)
    return [
        (
            flow.tensor(rng.standard_normal((size, 4)).astype(np.float32)),
            flow.tensor(rng.integers(0, 3, size)),
        )
        for size in sizes
    ]


DATA = rows([6, 6, 6, 5])
"""The last batch of an epoch is a smaller one, which has a graph of its own."""


class Decays(TaskModule):
    """Weights that decay, and biases that do not."""

    def __init__(self, make: Make, **schedules: Any) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.make, self.schedules = make, schedules
        fill_deterministically(self, spread=0.3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.head(self.body(batch[0]).relu()), batch[1])

    def param_groups(self) -> List[Dict[str, Any]]:
        weights, biases = ([getattr(m, kind) for m in (self.body, self.head)] for kind in KINDS)
        return [
            {"name": "weights", "params": weights},
            {"name": "biases", "params": biases, "weight_decay": 0.0},
        ]

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.param_groups())
        cosine = flow.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return {"optimizer": optimizer, "lr_scheduler": cosine, **self.schedules}


KINDS = ("weight", "bias")
BOTH = {"weight_decay_schedule": rising, "momentum_schedule": FALLING}
DECAY = {"weight_decay_schedule": rising}


def by_hand(make: Make, schedules: Dict[str, Any], accumulate: int = 1) -> Dict[str, np.ndarray]:
    """A loop over OneFlow alone, eager, that writes into the groups before each step."""
    task = Decays(make)
    optimizer = make(task.param_groups())
    cosine = flow.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    step = 0
    for index, batch in enumerate(DATA * 2):
        (task.training_step(batch, 0) / accumulate).backward()
        if (index + 1) % accumulate:
            continue
        optimizer.param_groups[0]["weight_decay"] = rising(step)
        for group in optimizer.param_groups if "momentum_schedule" in schedules else ():
            if "betas" in group:
                group["betas"] = (FALLING[step], group["betas"][1])
            else:
                group["momentum"] = FALLING[step]
        if accumulate > 1:
            nn.utils.clip_grad_norm_(list(task.parameters()), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        cosine.step()
        step += 1
    return weights_of(task)


def by_engine(make: Make, schedules: Dict[str, Any], mode: str, **options: Any) -> Any:
    task = Decays(make, **schedules)
    quiet_trainer(mode=mode, max_epochs=2, **options).fit(task, DATA)
    return weights_of(task)


EXACT: Dict[str, Any] = {
    "SGD": (lambda g: flow.optim.SGD(g, lr=0.1, weight_decay=0.1), DECAY),
    "momentum": (lambda g: flow.optim.SGD(g, 0.1, momentum=0.9, weight_decay=0.1), BOTH),
    "nesterov": (lambda g: flow.optim.SGD(g, 0.1, nesterov=True, weight_decay=0.1), BOTH),
    "AdamW": (
        lambda g: flow.optim.AdamW(g, 0.01, weight_decay=0.1, do_bias_correction=False),
        BOTH,
    ),
    "RMSprop": (lambda g: flow.optim.RMSprop(g, lr=0.01, weight_decay=0.1), DECAY),
    "Adagrad": (lambda g: flow.optim.Adagrad(g, lr=0.05, weight_decay=0.1), DECAY),
    "Adadelta": (lambda g: flow.optim.Adadelta(g, lr=1.0, weight_decay=0.1), DECAY),
}
CORRECTED: Dict[str, Make] = {
    "Adam": lambda g: flow.optim.Adam(g, lr=0.01, weight_decay=0.1),
    "AdamW": lambda g: flow.optim.AdamW(g, lr=0.01, weight_decay=0.1),
    "LAMB": lambda g: flow.optim.LAMB(g, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("name", EXACT)
def test_both_modes_are_the_loop_by_hand_to_the_bit(mode: str, name: str) -> None:
    make, schedules = EXACT[name]
    assert_same_arrays(by_engine(make, schedules, mode), by_hand(make, schedules))


@pytest.mark.parametrize("name", CORRECTED)
def test_with_a_bias_correction_modes_are_equal_and_the_loop_is_near(name: str) -> None:
    """The engine computes it in both modes as graphs do, a loop by hand in float64."""
    make = CORRECTED[name]
    eager, graph = (by_engine(make, BOTH, mode) for mode in MODES)
    assert_same_arrays(eager, graph)
    assert largest_difference(eager, by_hand(make, BOTH))[0] < 2e-6


def test_over_windows_and_with_clipping(mode: str) -> None:
    make, schedules = EXACT["momentum"]
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    ours = by_engine(make, schedules, mode, **options)
    assert_same_arrays(ours, by_hand(make, schedules, accumulate=2))


class Constant(TaskModule):
    """One parameter, whose gradient is ``slope`` at each step."""

    def __init__(self, make: Make, slope: float, **schedules: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(flow.tensor([1.5]))
        self.make, self.slope, self.schedules = make, slope, schedules

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.weight * self.slope).sum()

    def configure_optimizers(self) -> Any:
        return {"optimizer": self.make(self.parameters()), **self.schedules}


def test_closed_forms(mode: str) -> None:
    """Decoupled decay alone is a product; momentum alone is a sum of products."""
    adamw = Constant(lambda p: flow.optim.AdamW(p, lr=0.5, weight_decay=1.0), 0.0, **DECAY)
    quiet_trainer(mode=mode, max_epochs=1).fit(adamw, batches(STEPS))
    product = math.prod(1 - 0.5 * rising(step) for step in range(STEPS))
    assert float(adamw.weight) == pytest.approx(1.5 * product, rel=1e-6)

    sgd = Constant(lambda p: flow.optim.SGD(p, lr=0.125), 1.0, momentum_schedule=FALLING)
    quiet_trainer(mode=mode, max_epochs=1).fit(sgd, batches(STEPS))
    steps = range(STEPS)
    moved = [math.prod(FALLING[b + 1 : step + 1]) for step in steps for b in range(step + 1)]
    assert float(sgd.weight) == pytest.approx(1.5 - 0.125 * sum(moved), rel=1e-6)


def test_a_schedule_of_equal_values_is_the_option_itself(mode: str) -> None:
    for make in (
        lambda g: flow.optim.SGD(g, 0.1, momentum=0.9, weight_decay=0.1),
        lambda g: flow.optim.AdamW(g, 0.01, betas=(0.9, 0.99), weight_decay=0.1),
    ):
        constant = {"weight_decay_schedule": [0.1], "momentum_schedule": lambda step: 0.9}
        assert_same_arrays(by_engine(make, constant, mode), by_engine(make, {}, mode))


# ---------------------------------------------------------------------- what a schedule may be


class Seen(Callback):
    """What stands in the groups while a step is made, and what is logged of it."""

    def __init__(self) -> None:
        self.decays: List[List[float]] = []
        self.logged: List[Dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        moved = trainer.rates.scheduled(trainer.global_step - 1)
        self.decays.append(moved.get("weight_decay", []))
        logged = trainer.callback_metrics.items()
        self.logged.append({k: v for k, v in logged if k.startswith(("momentum/", "weight_d"))})


def seen_in(task: TaskModule, mode: str, epochs: int = 2, data: Any = None) -> Seen:
    monitor = LearningRateMonitor(log_momentum=True, log_weight_decay=True)
    seen = Seen()
    trainer = quiet_trainer(
        mode=mode, max_epochs=epochs, callbacks=[monitor, seen], log_every_n_steps=1
    )
    trainer.fit(task, DATA[:2] if data is None else data)
    return seen


def test_by_epoch_by_group_and_as_an_array(mode: str) -> None:
    make = EXACT["momentum"][0]
    by_epoch = {"scheduler": np.array([0.1, 0.2]), "interval": "epoch"}
    seen = seen_in(Decays(make, weight_decay_schedule=by_epoch), mode)
    assert seen.decays == [[0.1, None], [0.1, None], [0.2, None], [0.2, None]]

    of_biases = {"scheduler": {"biases": (0.3, 0.4)}, "frequency": 2}
    seen = seen_in(Decays(make, weight_decay_schedule=of_biases), mode)
    assert seen.decays == [[None, 0.3], [None, 0.3], [None, 0.4], [None, 0.4]]


def test_the_monitor_logs_what_each_step_had_by_schedule_or_not(mode: str) -> None:
    seen = seen_in(Decays(EXACT["momentum"][0], **BOTH), mode)
    for step, logged in enumerate(seen.logged):
        assert logged == {
            "momentum/weights": FALLING[step],
            "momentum/biases": FALLING[step],
            "weight_decay/weights": rising(step),
            "weight_decay/biases": 0.0,
        }
    seen = seen_in(Decays(CORRECTED["AdamW"], **DECAY), mode, epochs=1)
    assert [each["momentum/weights"] for each in seen.logged] == [0.9, 0.9]
    assert [each["weight_decay/weights"] for each in seen.logged] == [rising(0), rising(1)]


def test_the_groups_are_left_as_a_loop_by_hand_leaves_them(mode: str) -> None:
    task = Decays(EXACT["momentum"][0], **BOTH)
    trainer = quiet_trainer(mode=mode, max_epochs=2, limit_train_batches=2)
    trainer.fit(task, DATA)
    weights, biases = trainer.param_groups
    assert (weights["weight_decay"], weights["momentum"]) == (rising(3), FALLING[3])
    assert (biases["weight_decay"], biases["momentum"]) == (0.0, FALLING[3])


def test_the_preview_has_them() -> None:
    preview = quiet_trainer(max_epochs=2).preview(Decays(EXACT["momentum"][0], **BOTH), DATA)
    head, _, weights, biases = str(preview).splitlines()[1:5]
    assert re.search("end +weight_decay +momentum", head)
    assert re.search(r" 0.04 to 0.4 +0.95 to 0.95, 0.8..0.95$", weights)
    assert " to 0.4 " not in biases
    assert preview.plan.scheduled(2)["momentum"] == [0.9, 0.9]


def test_lr_find_has_them_too() -> None:
    stood = []

    class Notes(Decays):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            stood.append(self.trainer.param_groups[0]["weight_decay"])
            return super().training_step(batch, batch_idx)

    task = Notes(EXACT["momentum"][0], **BOTH)
    before = bits(task)
    quiet_trainer().lr_find(task, DATA, num_steps=4, early_stop_threshold=None)
    assert stood == [rising(step) for step in range(4)]
    assert bits(task) == before


# ---------------------------------------------------------------------- beside all the rest


class Weighs(Decays):
    """Returns what a batch weighs, logs, and has a metric that its rates follow."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_epoch=True)
        return {"loss": loss, "weight": batch[1].numel() + 0 * loss.detach()}

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.param_groups())
        plateau = flow.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1.0)
        schedule = {"scheduler": plateau, "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule, **self.schedules}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_with_weights_plateau_averages_and_layers_that_join(accumulate: int) -> None:
    found = []
    for mode in MODES:
        task = Weighs(CORRECTED["AdamW"], **BOTH)
        joins = GradualUnfreezing({0: "weights", 1: "biases"})
        trainer = quiet_trainer(
            mode=mode,
            max_epochs=2,
            callbacks=[EMAWeightAveraging(decay=0.9), joins],
            accumulate_grad_batches=accumulate,
        )
        trainer.fit(task, DATA)
        found.append((bits(task), trainer.rates.rates(trainer.global_step)))
    assert found[0] == found[1]
    assert found[0][1] == pytest.approx([1e-4, 1e-4])  # the plateau has lowered them twice


class Pair(TaskModule):
    """Two nets with an optimizer each, of which the second steps in every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)
        fill_deterministically(self, spread=0.3)

    def training_step(self, batch: Any, batch_idx: int, optimizer_name: str) -> Any:
        return nn.functional.cross_entropy(getattr(self, optimizer_name)(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        one = flow.optim.SGD(self.one.parameters(), 0.1, momentum=0.9)
        two = flow.optim.SGD(self.two.parameters(), 0.1, weight_decay=0.1)
        return {
            "one": {"optimizer": one, "momentum_schedule": FALLING},
            "two": {"optimizer": two, "weight_decay_schedule": rising, "every_n_batches": 2},
        }


def test_several_optimizers_have_their_own_by_their_own_steps(mode: str) -> None:
    task, hand = Pair(), Pair()
    trainer = quiet_trainer(mode=mode, max_epochs=2)
    trainer.fit(task, DATA)
    made = hand.configure_optimizers()
    for index, batch in enumerate(DATA * 2):
        for name in ("one", "two"):
            step, optimizer = index // made[name].get("every_n_batches", 1), made[name]["optimizer"]
            if name == "two" and index % 2:
                continue
            optimizer.param_groups[0]["momentum"] = FALLING[step] if name == "one" else 0.0
            if name == "two":
                optimizer.param_groups[0]["weight_decay"] = rising(step)
            hand.training_step(batch, index, name).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert_same_arrays(weights_of(task), weights_of(hand))
    assert trainer.rates.scheduled(5) == {
        "momentum": [FALLING[5], None],
        "weight_decay": [None, rising(2)],
    }


def test_the_hook_before_a_graph_is_compiled_has_the_graph_of_the_gradients() -> None:
    compiled: List[bool] = []

    class Sees(Callback):
        def on_before_graph_compile(self, trainer: Any, task: Any, graph: Any) -> None:
            compiled.append(bool(graph._is_compiled))

    trainer = quiet_trainer(mode="graph", max_epochs=1, callbacks=Sees())
    trainer.fit(Decays(EXACT["momentum"][0], **BOTH), DATA)
    assert compiled == [False, False]  # one for each of the two shapes of batch


# ---------------------------------------------------------------------- resumed


class Scheduled(Net):
    """Of the runs that are resumed from everywhere, with schedules by step and by epoch."""

    def __init__(self, optimizer: str = "adamw", decay: Any = None) -> None:
        super().__init__(optimizer)
        self.decay = decay or {"scheduler": lambda step: 0.02 * (step + 1)}

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        for group in made["optimizer"].param_groups:
            group["weight_decay"] = 0.1
        momentum = {"scheduler": {"body": [0.8, 0.9]}, "interval": "epoch"}
        return {**made, "weight_decay_schedule": self.decay, "momentum_schedule": momentum}


class SavesEach(Callback):
    """A checkpoint after each batch, named by how many there were."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.batches_seen}.safetensors")


def test_resumed_runs_go_on_to_the_bit(mode: str, tmp_path: Path) -> None:
    momentum = {"scheduler": {"weights": [0.8, 0.9]}, "interval": "epoch"}
    schedules = {**DECAY, "momentum_schedule": momentum}
    whole = Decays(CORRECTED["AdamW"], **schedules)
    quiet_trainer(mode=mode, max_epochs=2, callbacks=SavesEach(tmp_path)).fit(whole, DATA)
    for number, to in ((1, mode), (3, "graph"), (4, mode), (6, "eager")):
        task = Decays(CORRECTED["AdamW"], **schedules)
        path = tmp_path / f"{number}.safetensors"
        quiet_trainer(mode=to, max_epochs=2).fit(task, DATA, ckpt_path=path)
        assert bits(task) == bits(whole), f"{number}, {to}"


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "accumulate"), [("adamw", 1), ("momentum", 2)])
def test_resumed_from_every_point(
    mode: str, optimizer: str, accumulate: int, tmp_path: Path
) -> None:
    task = lambda: Scheduled(optimizer)  # noqa: E731
    check_exact(tmp_path, mode, "", None, task=task, accumulate_grad_batches=accumulate)


def test_another_schedule_is_told_when_a_run_is_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ofengine")
    path = tmp_path / "3.safetensors"

    def trained(task: TaskModule, **options: Any) -> Trainer:
        trainer = quiet_trainer(max_epochs=2)
        trainer.fit(task, DATA, **options)
        return trainer

    make = EXACT["momentum"][0]
    saving = quiet_trainer(max_epochs=2, callbacks=SavesEach(tmp_path))
    saving.fit(Decays(make, **BOTH), DATA)
    for schedules, said in (
        (
            {**BOTH, "weight_decay_schedule": lambda step: 0.5},
            "weight_decay_schedule gave group 'weights' 0.1077.* at step 2 .* gives 0.5 now",
        ),
        (DECAY, "the checkpoint has a momentum_schedule, and .* returns none"),
    ):
        with pytest.raises(RateError) as error:
            trained(Decays(make, **schedules), ckpt_path=path)
        sentence(error, said, "rates_on_resume='config'")
        caplog.clear()
        trained(Decays(make, **schedules), ckpt_path=path, rates_on_resume="config")
        assert re.search(f"{said}; the code's counts", caplog.text)
    assert "momentum of group 'weights' was 'scheduled' in the checkpoint" in caplog.text


# ---------------------------------------------------------------------- mistakes


def sgd(task: nn.Module) -> Any:
    return flow.optim.SGD(task.parameters(), lr=0.1, weight_decay=0.1)


def returning(make: Callable[[Any], Any], **schedules: Any) -> TaskModule:
    class Wrong(Line):
        def configure_optimizers(self) -> Any:
            return {"optimizer": make(self), **schedules}

    return Wrong()


def adagrad(task: nn.Module) -> Any:
    return flow.optim.Adagrad(task.parameters())


def adam(task: nn.Module) -> Any:
    return flow.optim.Adam(task.parameters())


def cosine_of_another(step: int) -> Any:
    return flow.tensor(0.1)


MISTAKES: Dict[str, Any] = {
    "a number": (sgd, {"weight_decay_schedule": 0.1}, ConfigurationError, "float.*function"),
    "a class": (sgd, {"momentum_schedule": Line}, ConfigurationError, "function of the step"),
    "no values": (sgd, {"weight_decay_schedule": []}, RateError, "finite numbers"),
    "a table with nan": (sgd, {"momentum_schedule": [math.nan]}, RateError, "finite numbers"),
    "a table of tables": (sgd, {"momentum_schedule": np.ones((2, 2))}, RateError, "finite"),
    "no group": (sgd, {"momentum_schedule": {}}, ConfigurationError, "empty dict"),
    "another group": (sgd, {"momentum_schedule": {"a": [0.9]}}, RateError, r"\['a'\].*'group_0'"),
    "another key": (
        sgd,
        {"momentum_schedule": {"scheduler": [0.9], "monitor": "x"}},
        ConfigurationError,
        "'monitor'.*'frequency'",
    ),
    "another interval": (
        sgd,
        {"momentum_schedule": {"scheduler": [0.9], "interval": "batch"}},
        RateError,
        "interval='batch'",
    ),
    "another frequency": (
        sgd,
        {"momentum_schedule": {"scheduler": [0.9], "frequency": 0}},
        RateError,
        "frequency=0",
    ),
    "below zero": (sgd, {"weight_decay_schedule": lambda s: 1.0 - s}, RateError, "-1.0 at step 2"),
    "too much": (sgd, {"momentum_schedule": [0.9, 1.0]}, RateError, "1.0 at step 1: .*below 1"),
    "no memory": (sgd, {"momentum_schedule": [0.0]}, RateError, "at 0 OneFlow's SGD"),
    "a beta of one": (adam, {"momentum_schedule": [1.0]}, RateError, "beta.*below 1"),
    "a tensor": (sgd, {"weight_decay_schedule": cosine_of_another}, RateError, "tensor"),
    "none that decays": (adam, {"weight_decay_schedule": [0.1]}, RateError, "weight_decay=0.*name"),
    "no such option": (adagrad, {"momentum_schedule": [0.9]}, ConfigurationError, "Adagrad has no"),
    "a misspelt key": (sgd, {"momentum_schedul": [0.9]}, ConfigurationError, "momentum_schedule"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_training(name: str) -> None:
    make, schedules, kind, said = MISTAKES[name]
    refused(returning(make, **schedules), kind, said, train=batches(4))


def test_a_scheduler_of_rates_moves_nothing_else() -> None:
    class Wrong(Line):
        def configure_optimizers(self) -> Any:
            optimizer = sgd(self)
            cosine = flow.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
            return {"optimizer": optimizer, "weight_decay_schedule": cosine}

    refused(Wrong(), ConfigurationError, "CosineAnnealingLR.*function of the step")


def test_a_short_table_is_told() -> None:
    with pytest.warns(UserWarning, match="table of 2 values in momentum_schedule is over after"):
        quiet_trainer(max_epochs=1).preview(returning(sgd, momentum_schedule=[0.9, 0.8]), DATA)


def test_a_graph_of_one_s_own_is_refused() -> None:
    class Own(Line):
        def configure_optimizers(self) -> Any:
            return {"optimizer": sgd(self), "momentum_schedule": [0.9]}

        def build_graph(self) -> Any:
            raise AssertionError("it is not asked for")

    refused(Own(), ConfigurationError, r"momentum_schedule .*build_graph\(\)", mode="graph")


def test_a_value_written_by_hand_is_an_error(mode: str) -> None:
    class Writes(Callback):
        def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, i: int) -> None:
            if i == 1:
                trainer.param_groups[0]["weight_decay"] = 0.7

    task = returning(sgd, weight_decay_schedule=lambda step: 0.1)
    with pytest.raises(RateError) as error:
        quiet_trainer(mode=mode, max_epochs=1, callbacks=Writes()).fit(task, batches(4))
    sentence(error, "weight_decay of group 'group_0' was changed by hand from 0.1 to 0.7")


def test_a_forged_schedule_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(Decays(EXACT["momentum"][0], **BOTH), DATA)
    trainer.save_checkpoint(tmp_path / "end.safetensors")
    state: Any = read(tmp_path / "end.safetensors").state
    check_state(state, "as it is")
    for forged in (
        {"lr": {}},
        {"momentum": {"x": [0.9, 0.9]}},
        {"momentum": {"3": ["a", "b"]}},
        {"momentum": {"3": [0.9]}},
        {"momentum": {"99999999": [0.9, 0.9]}},
    ):
        state["rates"]["options"] = forged
        with pytest.raises(CheckpointError, match="rates/options"):
            check_state(state, "forged")
