"""``load_from_checkpoint``: how it is called, and what it says where that is not so."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn

from ofengine import CheckpointError, ConfigurationError, TaskModule
from ofengine.checkpoint import save_weights
from ofengine.errors import UnknownArgumentError
from ofengine.run.lightning_methods import METHOD_ARGUMENTS


class Wide(TaskModule):
    """A layer of ``width`` inputs."""

    def __init__(self, width: int = 2, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 1)

    def forward(self, batch: Any) -> Any:
        return self.layer(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch).mean()

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=self.hparams.lr)


def saved(task: TaskModule, folder: Path, width: int = 2) -> Path:
    """A checkpoint of ``task``, which has trained for a step."""
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(task, [flow.ones(3, width)])
    return trainer.save_checkpoint(folder / "saved.safetensors")


def test_on_an_object_it_is_refused_and_the_object_stays(tmp_path: Path) -> None:
    task = Wide(width=3)
    path = saved(task, tmp_path, width=3)
    before = task.layer.weight.numpy().copy()
    with pytest.raises(ConfigurationError, match=r"on the class.*Wide.load_from_checkpoint\(path"):
        task.load_from_checkpoint(path)
    assert (task.layer.weight.numpy() == before).all()


def test_a_subclass_may_write_its_own_and_call_that_of_its_base(tmp_path: Path) -> None:
    class Narrow(Wide):
        @classmethod
        def load_from_checkpoint(cls, path: Any, **arguments: Any) -> Any:
            return super().load_from_checkpoint(path, lr=0.5, **arguments)

    task = Narrow.load_from_checkpoint(saved(Narrow(width=3), tmp_path, width=3))
    assert (type(task), task.hparams) == (Narrow, {"width": 3, "lr": 0.5})


# ---------------------------------------------------------------------- bases that keep arguments


def again(task: TaskModule, folder: Path, width: int = 2) -> Any:
    return type(task).load_from_checkpoint(saved(task, folder, width))


def test_what_a_subclass_adds_is_kept_where_its_base_keeps_the_arguments(tmp_path: Path) -> None:
    class Deep(Wide):
        def __init__(self, depth: int = 3, **options: Any) -> None:
            super().__init__(**options)
            self.depth = depth

    task = again(Deep(depth=7, lr=0.5), tmp_path)
    assert (task.depth, task.hparams) == (7, {"width": 2, "lr": 0.5, "depth": 7})


def test_a_subclass_may_compute_what_its_base_is_given_and_drop_it(tmp_path: Path) -> None:
    class Square(Wide):
        def __init__(self, side: int, lr: float = 0.1) -> None:
            super().__init__(width=side * side, lr=lr * 2)
            self.side = side

    task = again(Square(3, lr=0.5), tmp_path, width=9)
    assert tuple(task.layer.weight.shape) == (1, 9)
    assert task.hparams == {"width": 9, "lr": 0.5, "side": 3}

    class Fixed(Wide):
        def __init__(self, **options: Any) -> None:
            super().__init__(width=4, **options)

    assert again(Fixed(lr=0.5), tmp_path, width=4).hparams == {"width": 4, "lr": 0.5}


def test_arguments_that_a_subclass_passes_on_without_a_name_are_kept(tmp_path: Path) -> None:
    class Deep(Wide):
        def __init__(self, *arguments: Any, depth: int = 3, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.depth = depth

    task = again(Deep(5, depth=7), tmp_path, width=5)
    assert (task.depth, task.hparams.width) == (7, 5)

    class Lost(Wide):
        def __init__(self, *sides: int) -> None:
            super().__init__(sides[0] * sides[1])

    with pytest.raises(ConfigurationError, match=r"cannot keep \*sides: take one argument"):
        Lost(30, 40)


def test_base_and_subclass_may_both_keep_them_and_leave_some_out(tmp_path: Path) -> None:
    class Base(TaskModule):
        def __init__(self, part: Any, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters(ignore="part")
            self.layer = part

        forward, training_step = Wide.forward, Wide.training_step
        configure_optimizers = Wide.configure_optimizers

    class Own(Base):
        def __init__(self, width: int, note: str = "") -> None:
            super().__init__(nn.Linear(width, 1), lr=0.25)
            self.save_hyperparameters("width")

    task = again(Own(3, note="x"), tmp_path, width=3)
    assert task.hparams == {"lr": 0.25, "width": 3, "note": "x"}


def test_bases_side_by_side_are_each_given_their_own(tmp_path: Path) -> None:
    class Mixed(TaskModule):
        def __init__(self, scale: float = 1.0, **options: Any) -> None:
            super().__init__(**options)
            self.scale = scale

    class Both(Mixed, Wide):
        """No ``__init__`` of its own."""

    task = again(Both(scale=4.0, width=3), tmp_path, width=3)
    assert (task.scale, task.hparams) == (4.0, {"width": 3, "lr": 0.1, "scale": 4.0})


def test_what_a_base_was_given_and_is_another_value_now_is_kept(tmp_path: Path) -> None:
    class Deep(Wide):
        def __init__(self, depth: int = 3, **options: Any) -> None:
            super().__init__(**options)

    task = Deep()
    task.hparams.lr = 0.75
    assert again(task, tmp_path).hparams.lr == 0.75


def test_a_task_within_a_task_has_arguments_of_its_own(tmp_path: Path) -> None:
    class Student(Wide):
        def __init__(self, teachers_width: int) -> None:
            super().__init__(width=2)
            self.teacher = Wide(teachers_width)

    student = Student(5)
    assert student.teacher.hparams == {"width": 5, "lr": 0.1}
    assert again(student, tmp_path).hparams.teachers_width == 5


# ---------------------------------------------------------------------- on_load_checkpoint


class Noting(Wide):
    """Keeps a note in its checkpoints, and how its weights were when it is handed back."""

    note = "none"

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("seen", self.layer(batch).mean())

    validation_step = test_step

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        checkpoint["note"] = "kept"

    def on_load_checkpoint(self, checkpoint: Any) -> None:
        self.note, self.before = checkpoint["note"], self.layer.weight.numpy().copy()


def test_the_hook_is_called_before_the_weights_are_loaded(tmp_path: Path) -> None:
    trained = Noting()
    task = Noting.load_from_checkpoint(saved(trained, tmp_path))
    assert task.note == "kept"
    assert (task.before != trained.layer.weight.numpy()).any()
    assert (task.layer.weight.numpy() == trained.layer.weight.numpy()).all()


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_the_hook_is_called_by_verbs_that_load_weights(
    verb: str, mode: str, tmp_path: Path
) -> None:
    trained, task = Noting(), Noting()
    path = saved(trained, tmp_path)
    getattr(quiet_trainer(mode=mode), verb)(task, [flow.ones(3, 2)], ckpt_path=path)
    assert task.note == "kept"
    assert (task.before != trained.layer.weight.numpy()).any()
    assert (task.layer.weight.numpy() == trained.layer.weight.numpy()).all()


def test_the_hook_may_make_the_layers_that_the_weights_are_for(tmp_path: Path) -> None:
    class Growing(Wide):
        def grow(self, heads: int) -> None:
            self.heads = nn.ModuleList([nn.Linear(1, 1) for _ in range(heads)])

        def on_save_checkpoint(self, checkpoint: Any) -> None:
            checkpoint["heads"] = len(self.heads)

        def on_load_checkpoint(self, checkpoint: Any) -> None:
            self.grow(checkpoint["heads"])

    task = Growing()
    task.grow(3)
    assert len(again(task, tmp_path).heads) == 3


def test_what_the_hook_raises_is_one_sentence(tmp_path: Path) -> None:
    path = saved(Wide(), tmp_path)
    with pytest.raises(CheckpointError, match=r"Noting.on_load_checkpoint raised KeyError: 'note'"):
        Noting.load_from_checkpoint(path)


def test_a_file_of_weights_alone_has_nothing_for_the_hook(tmp_path: Path) -> None:
    task = Noting()
    for name in ("weights.safetensors", "weights.pth"):
        path = save_weights(Noting(), tmp_path / name)
        quiet_trainer().test(task, [flow.ones(3, 2)], ckpt_path=path)
    assert task.note == "none"


# ---------------------------------------------------------------------- what it is not given


class Open(Wide):
    """Takes any argument."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize("name", METHOD_ARGUMENTS["load_from_checkpoint"])
@pytest.mark.parametrize("cls", [Wide, Open])
def test_arguments_of_lightning_s_are_no_hyper_parameters(
    cls: Any, name: str, tmp_path: Path
) -> None:
    path = saved(cls(), tmp_path)
    with pytest.raises(UnknownArgumentError, match=f"no argument '{name}': .*(give|leave|write)"):
        cls.load_from_checkpoint(path, **{name: "cpu"})
    with pytest.raises(UnknownArgumentError, match=f"no argument '{name}': .*(give|leave|write)"):
        cls.load_from_checkpoint(**{name: path})


def test_they_are_where_init_says_so(tmp_path: Path) -> None:
    class Base(Wide):
        def __init__(self, strict: bool = True) -> None:
            super().__init__()
            self.strict = strict

    class Strict(Base):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)

    path = saved(Strict(), tmp_path)
    assert Strict.load_from_checkpoint(path, strict=False).strict is False


def test_an_argument_that_init_does_not_take_is_named(tmp_path: Path) -> None:
    path = saved(Wide(), tmp_path)
    with pytest.raises(UnknownArgumentError, match=r"'rate', which.*it takes 'lr' and 'width'"):
        Wide.load_from_checkpoint(path, rate=0.5)
    with pytest.raises(ConfigurationError, match=r"has no file: give its path first"):
        Wide.load_from_checkpoint()


def test_a_task_that_kept_nothing_is_told_what_it_needs(tmp_path: Path) -> None:
    class Silent(Wide):
        def __init__(self, width: int, *, rate: float, note: str = "") -> None:
            TaskModule.__init__(self)
            self.layer, self.rate = nn.Linear(width, 1), rate

        def configure_optimizers(self) -> Any:
            return flow.optim.SGD(self.param_groups(), lr=self.rate)

    path = saved(Silent(3, rate=0.5), tmp_path, width=3)
    call = r"them, as in Silent.load_from_checkpoint\(path, width=..., rate=...\)"
    with pytest.raises(CheckpointError, match=f"'width' and 'rate', which.* needs: .*{call}"):
        Silent.load_from_checkpoint(path)
    assert Silent.load_from_checkpoint(path, width=3, rate=1.0).layer.weight.shape[1] == 3


@pytest.mark.parametrize("method", ["lr_find", "scale_batch_size", "save_checkpoint"])
def test_other_methods_name_an_argument_of_lightning_s_too(method: str) -> None:
    for name in METHOD_ARGUMENTS[method]:
        with pytest.raises(UnknownArgumentError, match=f"{method} has no argument '{name}'"):
            getattr(quiet_trainer(), method)(Wide(), **{name: None})
    with pytest.raises(UnknownArgumentError, match=f"{method} has no argument 'moed'"):
        getattr(quiet_trainer(), method)(Wide(), moed=None)


def test_save_hyperparameters_names_it_too() -> None:
    class Quiet(Wide):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.save_hyperparameters(**options)

    for name in METHOD_ARGUMENTS["save_hyperparameters"]:
        with pytest.raises(UnknownArgumentError, match=f"has no argument '{name}': .* leave it"):
            Quiet(**{name: False})


@pytest.mark.parametrize(
    ("arguments", "call"),
    [(Namespace(lr=0.5), r"Old\(\*\*vars\(arguments\)\)"), ({"lr": 0.5}, r"Old\(\*\*arguments\)")],
)
def test_values_in_the_place_of_names_are_refused(arguments: Any, call: str) -> None:
    class Old(Wide):
        def __init__(self, hparams: Any) -> None:
            TaskModule.__init__(self)
            self.save_hyperparameters(hparams)

    kind = type(arguments).__name__
    with pytest.raises(ConfigurationError, match=f"given a {kind}, .* alone, .*{call}"):
        Old(arguments)
