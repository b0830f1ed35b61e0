"""Hooks fire in the documented order, in both modes, for callbacks and for the task."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any, Callable, Dict, List, Tuple, Type

import oneflow as flow
import pytest
from helpers import Line, batches, line_of, quiet_trainer
from oneflow import nn

from ofengine import Callback, ConfigurationError, TaskModule, callback as hooks
from ofengine.task_hooks import TaskHooks

# Written out by hand: the test must not learn the hooks from the code that it tests.
EAGER_ONLY = [
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
]
OF_A_STAGE = [
    "on_{}_start",
    "on_{}_epoch_start",
    "on_{}_batch_start",
    "on_{}_batch_end",
    "on_{}_epoch_end",
    "on_{}_end",
]
ALL_HOOKS = [
    "setup",
    "teardown",
    "on_exception",
    "on_fit_start",
    "on_fit_end",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_before_graph_compile",
    "on_after_optimizer_step",
    *EAGER_ONLY,
    *(name.format(s) for s in ("train", "validation", "test", "predict") for name in OF_A_STAGE),
]
IN_BOTH_MODES = [name for name in ALL_HOOKS if name not in EAGER_ONLY]


class AllVerbs(Line):
    """Takes part in every verb, and returns what it computes."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch)

    test_step = validation_step

    def forward(self, batch: Any) -> Any:
        return self.layer(batch)


def recording(base: type, log: List[str], prefix: str, names: List[str]) -> type:
    """A subclass of ``base`` that writes down ``prefix`` and the name of each hook it is given."""

    def hook(name: str) -> Callable[..., None]:
        def record(self: Any, *_: Any) -> None:
            log.append(prefix + name)

        return record

    return type("Recording" + base.__name__, (base,), {name: hook(name) for name in names})


def recorded(mode: str, log: List[str], **arguments: Any) -> Callback:
    names = ALL_HOOKS if mode == "eager" else IN_BOTH_MODES
    callback: Callback = recording(Callback, log, "", names)(**arguments)
    return callback


def one_stage(stage: str, count: int) -> List[str]:
    """The hooks of one pass over ``count`` batches of an evaluation stage."""
    start, epoch_start, batch_start, batch_end, epoch_end, end = (
        name.format(stage) for name in OF_A_STAGE
    )
    return [start, epoch_start, *([batch_start, batch_end] * count), epoch_end, end]


def expected_fit(mode: str) -> List[str]:
    """2 epochs of 3 batches in windows of 2 and 1, sanity check and validation on 1 batch."""
    eager = mode == "eager"
    backward = ["on_before_backward", "on_after_backward"] if eager else []
    update = ["on_before_optimizer_step", "on_before_zero_grad"] if eager else []
    compiles = [] if eager else ["on_before_graph_compile"]
    epochs: List[str] = []
    for epoch in range(2):
        epochs += [
            "on_train_epoch_start",
            # batch 0 opens a window
            "on_train_batch_start", *backward, "on_train_batch_end",
            # batch 1 closes it; the graph that updates is compiled at its first use
            "on_train_batch_start", *backward, *update, *(compiles if epoch == 0 else []),
            "on_after_optimizer_step", "on_train_batch_end",
            # batch 2 is a window of its own: the epoch ends
            "on_train_batch_start", *backward, *update, "on_after_optimizer_step",
            "on_train_batch_end",
            *one_stage("validation", 1),
            "on_train_epoch_end",
        ]  # fmt: skip
    return [
        "setup",
        "on_fit_start",
        "on_sanity_check_start", *one_stage("validation", 1), "on_sanity_check_end",
        "on_train_start",
        *epochs,
        "on_train_end",
        "on_fit_end",
        "teardown",
    ]  # fmt: skip


def fit_with_everything(mode: str, task: TaskModule, callbacks: List[Callback]) -> None:
    trainer = quiet_trainer(
        mode=mode,
        max_epochs=2,
        accumulate_grad_batches=2,
        num_sanity_val_steps=1,
        callbacks=callbacks,
    )
    trainer.fit(task, batches(3), batches(1))


# ---------------------------------------------------------------------- the order


def test_fit_fires_the_hooks_of_a_callback_in_this_order(mode: str) -> None:
    log: List[str] = []
    fit_with_everything(mode, AllVerbs(), [recorded(mode, log)])
    assert log == expected_fit(mode)


def test_fit_fires_the_hooks_of_the_task_in_the_same_order(mode: str) -> None:
    log: List[str] = []
    names = ALL_HOOKS if mode == "eager" else IN_BOTH_MODES
    fit_with_everything(mode, recording(AllVerbs, log, "", names)(), [])
    assert log == expected_fit(mode)


def test_without_accumulation_each_batch_is_one_step(mode: str) -> None:
    log: List[str] = []
    quiet_trainer(mode=mode, max_epochs=1, callbacks=[recorded(mode, log)]).fit(
        AllVerbs(), batches(2)
    )
    step = [*EAGER_ONLY] if mode == "eager" else []
    first = step if mode == "eager" else ["on_before_graph_compile"]
    assert log == [
        "setup", "on_fit_start", "on_train_start", "on_train_epoch_start",
        "on_train_batch_start", *first, "on_after_optimizer_step", "on_train_batch_end",
        "on_train_batch_start", *step, "on_after_optimizer_step", "on_train_batch_end",
        "on_train_epoch_end", "on_train_end", "on_fit_end", "teardown",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "stage"), [("validate", "validation"), ("test", "test"), ("predict", "predict")]
)
def test_the_other_verbs_fire_the_hooks_of_their_stage(mode: str, verb: str, stage: str) -> None:
    log: List[str] = []
    trainer = quiet_trainer(mode=mode, callbacks=[recorded(mode, log)])
    getattr(trainer, verb)(AllVerbs(), batches(2))
    assert log == ["setup", *one_stage(stage, 2), "teardown"]


def test_a_second_loader_continues_the_same_stage(mode: str) -> None:
    log: List[str] = []
    loader = flow.utils.data.DataLoader(flow.utils.data.TensorDataset(flow.ones(2, 2)))

    class OfTensors(AllVerbs):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.layer(batch[0])

    quiet_trainer(mode=mode, callbacks=recorded(mode, log)).validate(OfTensors(), [loader, loader])
    assert log == ["setup", *one_stage("validation", 4), "teardown"]


def test_the_order_in_the_documentation_is_the_real_one() -> None:
    text = (hooks.__doc__ or "").split("::\n", 1)[1].split("``validate``, ``test``", 1)[0]
    documented = re.findall(r"\b(?:on_[a-z_]+[a-z]|setup|teardown)\b", text)
    log: List[str] = []
    trainer = quiet_trainer(
        mode="eager", max_epochs=1, num_sanity_val_steps=0, callbacks=recorded("eager", log)
    )
    trainer.fit(AllVerbs(), batches(1), batches(1))
    sanity = ["on_sanity_check_start", "on_sanity_check_end"]
    assert documented[2:4] == sanity
    assert [name for name in documented if name not in sanity] == log


@pytest.mark.parametrize("owner", [Callback, TaskHooks])
def test_every_hook_exists_on_callbacks_and_on_the_task(owner: type) -> None:
    own = [
        name
        for name, value in vars(owner).items()
        if inspect.isfunction(value) and (name.startswith("on_") or name in ("setup", "teardown"))
    ]
    assert sorted(own) == sorted(ALL_HOOKS)


def test_a_task_s_hook_takes_what_a_callback_s_takes_after_trainer_and_task() -> None:
    for name in ALL_HOOKS:
        callback = list(inspect.signature(getattr(Callback, name)).parameters)
        task = list(inspect.signature(getattr(TaskModule, name)).parameters)
        assert callback[:3] == ["self", "trainer", "task"], name
        assert task == ["self", *callback[3:]], name


# ---------------------------------------------------------------------- among several owners


def test_callbacks_fire_as_listed_then_the_task_then_those_that_fire_last(mode: str) -> None:
    log: List[str] = []
    names = ALL_HOOKS if mode == "eager" else IN_BOTH_MODES

    def callback(name: str) -> Callback:
        made: Callback = recording(Callback, log, name, names)()
        return made

    last = callback("last ")
    last.fires_last = True
    task = recording(AllVerbs, log, "task ", names)()
    fit_with_everything(mode, task, [last, callback("first "), callback("second ")])
    owners = ("first ", "second ", "task ", "last ")
    assert log == [owner + name for name in expected_fit(mode) for owner in owners]


def test_two_callbacks_of_one_class_both_fire(mode: str) -> None:
    log: List[str] = []
    kind = recording(Callback, log, "", ["on_train_start"])
    quiet_trainer(mode=mode, max_epochs=1, callbacks=[kind(), kind()]).fit(AllVerbs(), batches(1))
    assert log == ["on_train_start", "on_train_start"]


# ---------------------------------------------------------------------- what hooks are given


class Arguments(Callback):
    """Keeps what the hooks of batches are given."""

    def __init__(self) -> None:
        self.seen: List[Tuple[Any, ...]] = []

    def setup(self, trainer: Any, task: Any, stage: str) -> None:
        self.seen.append(("setup", stage))

    def teardown(self, trainer: Any, task: Any, stage: str) -> None:
        self.seen.append(("teardown", stage))

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(("start", type(batch_idx), batch_idx, float(batch[0, 0])))

    def on_train_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        values = {key: round(float(value), 4) for key, value in outputs.items()}
        self.seen.append(("end", type(batch_idx), batch_idx, float(batch[0, 0]), values))


def test_the_hooks_of_a_batch_are_given_it_its_index_and_the_outputs(mode: str) -> None:
    class WithExtras(AllVerbs):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": self.layer(batch).sum() * 0 + 7.0, "first": batch[0, 0]}

    seen = Arguments()
    quiet_trainer(mode=mode, max_epochs=1, callbacks=seen).fit(WithExtras(), batches(2))
    assert seen.seen == [
        ("setup", "fit"),
        ("start", int, 0, 1.0),
        ("end", int, 0, 1.0, {"loss": 7.0, "first": 1.0}),
        ("start", int, 1, 2.0),
        ("end", int, 1, 2.0, {"loss": 7.0, "first": 2.0}),
        ("teardown", "fit"),
    ]


def test_a_bare_loss_arrives_as_a_dict_with_loss(mode: str) -> None:
    seen = Arguments()
    task = AllVerbs()
    with flow.no_grad():
        task.layer.weight.zero_()
        task.layer.bias.fill_(3.0)
    quiet_trainer(mode=mode, max_epochs=1, callbacks=seen).fit(task, batches(1))
    assert seen.seen[2] == ("end", int, 0, 1.0, {"loss": 3.0})


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_setup_and_teardown_are_told_the_verb(verb: str) -> None:
    seen = Arguments()
    trainer = quiet_trainer(max_epochs=1, callbacks=seen)
    getattr(trainer, verb)(AllVerbs(), batches(1))
    assert (seen.seen[0], seen.seen[-1]) == (("setup", verb), ("teardown", verb))


@pytest.mark.parametrize(
    ("verb", "stage"), [("validate", "validation"), ("test", "test"), ("predict", "predict")]
)
def test_the_end_of_an_evaluation_batch_is_given_what_the_step_returned(
    mode: str, verb: str, stage: str
) -> None:
    seen: List[Tuple[Any, ...]] = []

    class Returns(AllVerbs):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return {"ones": batch / batch, "pair": (batch * 2, None)}

        validation_step = test_step = predict_step

    def batch_end(
        self: Any, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int, loader: int
    ) -> None:
        ones, (double, nothing) = outputs["ones"], outputs["pair"]
        seen.append((float(ones[0, 0]), float(double[0, 0]), nothing, batch_idx, loader))

    callback = type("Sees", (Callback,), {f"on_{stage}_batch_end": batch_end})()
    getattr(quiet_trainer(mode=mode, callbacks=callback), verb)(Returns(), batches(2))
    assert seen == [(1.0, 2.0, None, 0, 0), (1.0, 4.0, None, 1, 0)]


def test_eager_hooks_see_gradients_as_they_say() -> None:
    seen: Dict[str, Any] = {}

    class Sees(Callback):
        def on_before_backward(self, trainer: Any, task: Any, loss: Any) -> None:
            seen["loss"] = round(float(loss), 4)
            seen["before_backward"] = task.layer.bias.grad

        def on_after_backward(self, trainer: Any, task: Any) -> None:
            seen["after_backward"] = float(task.layer.bias.grad)

        def on_before_optimizer_step(self, trainer: Any, task: Any, optimizer: Any) -> None:
            seen["before_step"] = (float(task.layer.bias.grad), float(task.layer.bias))
            assert optimizer is trainer.optimizer

        def on_before_zero_grad(self, trainer: Any, task: Any, optimizer: Any) -> None:
            seen["before_zero"] = float(task.layer.bias.grad), round(float(task.layer.bias), 4)

    task = AllVerbs()
    with flow.no_grad():
        task.layer.weight.zero_()
        task.layer.bias.fill_(3.0)
    trainer = quiet_trainer(max_epochs=1, callbacks=Sees())
    trainer.fit(task, batches(1))
    # d mean(x @ w + b) / d b = 1; lr 0.1
    assert seen == {
        "loss": 3.0,
        "before_backward": None,
        "after_backward": 1.0,
        "before_step": (1.0, 3.0),
        "before_zero": (1.0, 2.9),
    }


def test_a_graph_is_not_compiled_yet_in_on_before_graph_compile() -> None:
    compiled: List[bool] = []

    class Sees(Callback):
        def on_before_graph_compile(self, trainer: Any, task: Any, graph: Any) -> None:
            assert isinstance(graph, nn.Graph)
            compiled.append(bool(graph._is_compiled))

    data = [flow.ones(2, 2), flow.ones(2, 2), flow.ones(1, 2)]
    quiet_trainer(mode="graph", max_epochs=2, callbacks=Sees()).fit(AllVerbs(), data)
    assert compiled == [False, False]  # one for each of the two shapes of batch


def test_setup_comes_before_data_and_optimizer_are_asked_for(mode: str) -> None:
    class BuildsInSetup(AllVerbs):
        def setup(self, stage: str) -> None:
            self.head = nn.Linear(1, 1)
            self.data = batches(2)

        def train_dataloader(self) -> Any:
            return self.data

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.head(self.layer(batch)).mean()

    task = BuildsInSetup()
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(task)  # "first of all", as in Lightning, where setup is the place to build things
    assert trainer.global_step == 2
    assert len(trainer.optimizer.param_groups[0].parameters) == 4


# ---------------------------------------------------------------------- hooks of nobody


def test_a_hook_that_nobody_overrides_is_not_called(mode: str) -> None:
    empty = {
        vars(owner)[name].__code__: f"{owner.__name__}.{name}"
        for owner in (Callback, TaskHooks)
        for name in ALL_HOOKS
    }
    called: List[str] = []

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in empty:
            called.append(empty[frame.f_code])

    class OneHook(Callback):
        def on_train_start(self, trainer: Any, task: Any) -> None:
            called.append("its own")

    trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=[OneHook(), Callback()])
    sys.setprofile(profile)
    try:
        trainer.fit(AllVerbs(), batches(2), batches(1))
    finally:
        sys.setprofile(None)
    assert called == ["its own"]


def test_a_hook_put_on_the_object_itself_is_called(mode: str) -> None:
    called: List[Any] = []
    callback, task = Callback(), AllVerbs()
    callback.on_train_start = lambda trainer, task: called.append((trainer, task))  # type: ignore[method-assign]
    task.on_train_start = lambda: called.append("task")  # type: ignore[method-assign]
    trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=callback)
    trainer.fit(task, batches(1))
    assert called == [(trainer, task), "task"]


# ---------------------------------------------------------------------- what graph mode refuses


class Napping(Callback):
    """Overrides two hooks, and says that it has nothing to do at some."""

    def __init__(self, *idle: str) -> None:
        self.idle = idle
        self.seen: List[str] = []

    @property
    def idle_hooks(self) -> Tuple[str, ...]:
        return self.idle

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append("batch")

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seen.append("epoch")


def test_idle_hooks_are_not_called(mode: str) -> None:
    awake, asleep = Napping(), Napping("on_train_batch_end")
    quiet_trainer(mode=mode, max_epochs=1, callbacks=[awake, asleep]).fit(
        AllVerbs(), [flow.ones(3, 2)] * 2
    )
    assert awake.seen == ["batch", "batch", "epoch"]
    assert asleep.seen == ["epoch"]


@pytest.mark.parametrize("hook", EAGER_ONLY)
def test_graph_mode_refuses_a_callback_s_hook_that_it_cannot_fire(hook: str) -> None:
    log: List[str] = []
    kind: Type[Callback] = recording(Callback, log, "", [hook, "setup", "on_fit_start"])
    trainer = quiet_trainer(mode="graph", max_epochs=1, callbacks=[Callback(), kind()])
    with pytest.raises(ConfigurationError) as error:
        trainer.fit(AllVerbs(), batches(1))
    assert log == []  # before anything was fired
    text = str(error.value)
    assert f"RecordingCallback.{hook}" in text
    assert line_of(getattr(kind, hook)) in text
    assert 'mode="eager"' in text


@pytest.mark.parametrize("hook", EAGER_ONLY)
def test_graph_mode_refuses_a_task_s_hook_that_it_cannot_fire(hook: str) -> None:
    log: List[str] = []
    kind = recording(AllVerbs, log, "", [hook, "setup", "on_fit_start"])
    with pytest.raises(ConfigurationError) as error:
        quiet_trainer(mode="graph", max_epochs=1).fit(kind(), batches(1))
    assert log == []
    assert f"RecordingAllVerbs.{hook}" in str(error.value)
    assert line_of(getattr(kind, hook)) in str(error.value)


def test_an_inherited_hook_is_refused_too() -> None:
    class Parent(Callback):
        def on_after_backward(self, trainer: Any, task: Any) -> None:
            pass

    class Child(Parent):
        pass

    with pytest.raises(ConfigurationError, match=r"Child\.on_after_backward"):
        quiet_trainer(mode="graph", max_epochs=1, callbacks=Child()).fit(AllVerbs(), batches(1))


def test_the_refused_hooks_do_not_stand_in_the_way_of_evaluation_in_graph_mode() -> None:
    log: List[str] = []
    trainer = quiet_trainer(mode="graph", callbacks=recording(Callback, log, "", EAGER_ONLY)())
    trainer.validate(AllVerbs(), batches(1))
    assert log == []


def test_graph_evaluation_beside_eager_training_refuses_nothing() -> None:
    log: List[str] = []
    callback = recording(Callback, log, "", EAGER_ONLY)()
    trainer = quiet_trainer(mode="eager", eval_mode="graph", max_epochs=1, callbacks=callback)
    trainer.fit(AllVerbs(), batches(1), batches(1))
    assert log == EAGER_ONLY
