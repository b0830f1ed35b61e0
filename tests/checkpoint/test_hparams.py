"""Hyper-parameters come back exactly as they were, or the one that does not is named."""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import math
import pickle
import subprocess
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Dict, List, NamedTuple, Optional, Type

import attrs
import numpy as np
import oneflow as flow
import pytest
from helpers import quiet_trainer
from hypothesis import given, strategies as st
from oneflow import nn

from ofengine import CheckpointError, ConfigurationError, TaskModule
from ofengine.checkpoint import read, save_weights, write
from ofengine.errors import OFEngineWarning


class Line(TaskModule):
    """One weight; a subclass keeps hyper-parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(flow.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.weight * batch).sum()


class Color(enum.Enum):
    RED = "red"
    BLUE = 2


class Level(enum.IntEnum):
    LOW = 1


@dataclasses.dataclass
class Inner:
    size: int = 1
    name: str = "x"


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float
    inner: Inner = dataclasses.field(default_factory=Inner)
    total: float = dataclasses.field(init=False, default=0.0)
    sizes: Any = (1, 2)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.rate * 2)


@attrs.frozen
class Frozen:
    _hidden: int
    paths: List[Path] = attrs.Factory(list)


@attrs.define
class Slotted:
    __secret: int = 1
    value: Any = None


class Pair(NamedTuple):
    first: int
    second: int


def a_function() -> None:
    """Not to be kept."""


class Any_(Line):
    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.value = value


def saved(task: TaskModule, folder: Path) -> Path:
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(task, [flow.ones(1)])
    return trainer.save_checkpoint(folder / "saved.safetensors")


def there_and_back(value: Any, folder: Path) -> Any:
    return Any_.load_from_checkpoint(saved(Any_(value), folder)).value


def same(ours: Any, theirs: Any) -> bool:
    """Equal in value, type, and bits; NaN equals NaN."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, float) and math.isnan(ours):
        return math.isnan(theirs)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, dict):
        return all(map(same, ours, theirs)) and all(map(same, ours.values(), theirs.values()))
    if isinstance(ours, (np.ndarray, np.generic)):
        return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and (
            ours.tobytes() == theirs.tobytes()
        )
    if isinstance(ours, flow.Tensor):
        return ours.dtype == theirs.dtype and same(ours.numpy(), theirs.numpy())
    return bool(ours == theirs) and repr(ours) == repr(theirs)


EXACT = [
    None, True, 0, -1, 2**200, 0.1, -0.0, math.inf, math.nan, "", "größer\0\n", "\ud800", "@",
    1 + 2j, complex(-0.0, math.inf), b"", b"\0\xff",
    [], [1, [2.0, None]], (), (1,), (1, (2, [3])), [(1,), [1]],
    {}, {"scale": 2.0}, {"@": 1}, {"tuple": [1]}, {1: "a", (2, None): {"b": (3,)}, None: 4, 2.5: 5},
    {"left out": "x"}, {"b": 1, "a": 2}, set(), {1, 2}, frozenset({("a", 1)}),
    Path("a/b"), Path("/"), Path("."), [Path("x"), {"p": Path("y")}],
    np.float32(0.1), np.float64(0.1), np.float16(0.1), np.int8(-5), np.uint64(2**64 - 1),
    np.bool_(True), np.float32("nan"), np.complex64(1 + 2j), np.complex128(-1j), {"n": np.int64(3)},
    np.arange(6, dtype="int16").reshape(2, 3), np.array(1.5, dtype="float32"),
    np.array([True, False]), np.zeros((0, 2)),
    Color.RED, Color.BLUE, Level.LOW, [Color.RED], {Color.RED: Level.LOW},
    Inner(), Inner(size=5, name="y"), Config(0.5), Config(0.1, Inner(7), sizes=[np.float32(1)]),
    Frozen(3), Frozen(4, [Path("x")]), Slotted(5, {"a": (1,)}), [Inner(2), {"i": Inner(3)}],
]  # fmt: skip


@pytest.mark.parametrize("value", EXACT, ids=lambda value: repr(value)[:40])
def test_what_is_plain_comes_back_exactly(tmp_path: Path, value: Any) -> None:
    before = copy.deepcopy(value)
    back = there_and_back(value, tmp_path)
    assert same(back, before)
    assert same(value, before)


@pytest.mark.parametrize("dtype", ["float32", "int64", "int8", "float16", "float64"])
def test_tensors_come_back_exactly(tmp_path: Path, dtype: str) -> None:
    value = flow.tensor(np.arange(3).astype(dtype))
    back = there_and_back({"weights": value}, tmp_path)
    assert same(back["weights"], value)


PLAIN = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(max_size=5),
        st.complex_numbers(allow_nan=False), st.builds(np.float32, st.floats(width=32)),
        st.sampled_from([*Color, *Level]), st.builds(Inner, st.integers(), st.text()),
    ),
    lambda each: st.one_of(
        st.lists(each, max_size=3), st.lists(each, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.tuples(st.integers())), each, max_size=3),
        st.builds(Slotted, each, each),
    ),
    max_leaves=10,
)  # fmt: skip


@given(value=PLAIN)
def test_any_nesting_of_these_comes_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    from ofengine.checkpoint.hparams import kept_hparams
    from ofengine.checkpoint.hparams_restored import restored_hparams

    path = tmp_path_factory.getbasetemp() / "hparams.safetensors"
    state = read(write(path, {}, kept_hparams({"value": value}, {}))).state or {}
    assert same(restored_hparams(state, Any_, (), "the file")["value"], value)


# ---------------------------------------------------------------------- what is not kept

NOT_KEPT = {
    "a function": (a_function, "the function test_hparams.a_function"),
    "a lambda": (lambda x: x, "the function test_hparams.<lambda>"),
    "a class": (nn.ReLU, "the class oneflow.nn.modules.activation.ReLU"),
    "a module": (nn.Linear(1, 1), "a oneflow.nn.modules.linear.Linear"),
    "in a dict": ({"a": [a_function]}, "the function test_hparams.a_function"),
    "in an object": (Slotted(1, nn.ReLU), "the class oneflow.nn.modules.activation.ReLU"),
    "an object": (object(), "a object"),
    "an OrderedDict": (collections.OrderedDict(a=1), "a collections.OrderedDict"),
    "a named tuple": (Pair(1, 2), "a test_hparams.Pair"),
    "a path of another kind": (PurePosixPath("x"), "a pathlib.PurePosixPath"),
    "a Windows path": (PureWindowsPath("x"), "a pathlib.PureWindowsPath"),
    "a large number": (10**5_000, "a int"),
    "an array of objects": (np.array([None]), "a numpy.ndarray"),
    "an array of another order": (np.ones(1, dtype=">f4"), "a numpy.ndarray"),
    "a longdouble": (np.longdouble(1), "a numpy.longdouble"),
    "a date": (np.datetime64("2020-01-01"), "a numpy.datetime64"),
    "a generator": ((each for each in ()), "a generator"),
    "a range": (range(3), "a range"),
    "a parameter": (nn.Parameter(flow.ones(1)), "a oneflow.nn.Parameter"),
}


@pytest.mark.parametrize("name", NOT_KEPT)
def test_what_cannot_be_kept_is_named_where_it_is_missed(tmp_path: Path, name: str) -> None:
    value, words = NOT_KEPT[name]
    path = saved(Any_(value), tmp_path)
    with pytest.raises(CheckpointError) as error:
        Any_.load_from_checkpoint(path)
    text = str(error.value)
    assert f"{path} does not hold the hyper-parameter 'value': it was {words}" in text
    assert "Any_.load_from_checkpoint(path, value=...)" in text
    assert text.isprintable()
    assert Any_.load_from_checkpoint(path, value=value).value is value


def test_a_value_that_holds_itself_is_named(tmp_path: Path) -> None:
    value: List[Any] = []
    value.append(value)
    path = saved(Any_(value), tmp_path)
    with pytest.raises(CheckpointError, match="'value': it was a list nested deeper than 20"):
        Any_.load_from_checkpoint(path)


def test_what_cannot_be_kept_and_is_the_default_is_no_loss(tmp_path: Path) -> None:
    class Net(Line):
        def __init__(self, act: Any = nn.ReLU, reduce: Any = sum, size: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.act, self.size = act, size

    path = saved(Net(size=2), tmp_path)
    task = Net.load_from_checkpoint(path)
    assert (task.act, task.size) == (nn.ReLU, 2)
    other = saved(Net(act=nn.Sigmoid), tmp_path)
    with pytest.raises(CheckpointError, match=r"'act': it was the class .*Sigmoid"):
        Net.load_from_checkpoint(other)


def test_a_default_that_has_changed_since_is_a_loss(tmp_path: Path) -> None:
    def net(default: Any) -> Type[Line]:
        class Net(Line):
            def __init__(self, act: Any = default) -> None:
                super().__init__()
                self.save_hyperparameters()

        return Net

    path = saved(net(nn.ReLU)(), tmp_path)
    net(nn.ReLU).load_from_checkpoint(path)
    for other in (nn.Sigmoid, None, 1):
        with pytest.raises(CheckpointError, match=r"'act': it was the class .*ReLU"):
            net(other).load_from_checkpoint(path)


def test_an_argument_without_a_name_is_refused_at_once() -> None:
    class Many(Line):
        def __init__(self, *widths: int, depth: int = 1, ignore: Any = ()) -> None:
            super().__init__()
            self.save_hyperparameters(ignore=ignore)

    assert Many(depth=3).hparams["depth"] == 3
    assert Many(1, 2, depth=3, ignore=["widths", "ignore"]).hparams == {"depth": 3}
    with pytest.raises(ConfigurationError, match=r"cannot keep \*widths"):
        Many(1, 2)


def test_weights_without_hyper_parameters_say_so(tmp_path: Path) -> None:
    path = save_weights(Any_(3), tmp_path / "weights")
    with pytest.warns(OFEngineWarning, match="no hyper-parameters: Any_ was made with its defaults "
                      "for value"):  # fmt: skip
        assert Any_.load_from_checkpoint(path).value is None
    assert Any_.load_from_checkpoint(path, value=3).value == 3
    assert Line.load_from_checkpoint(path).weight.numpy() == [0]


# ---------------------------------------------------------------------- classes of objects


def test_a_class_is_found_by_an_annotation_or_a_default_of_another_module(tmp_path: Path) -> None:
    """Local classes are in no module: only ``__init__`` tells of them."""

    @dataclasses.dataclass
    class Deep:
        n: int

    @dataclasses.dataclass
    class Local:
        deep: Optional[Deep] = None
        deeper: Any = ()

    class Annotated(Line):
        def __init__(self, value: Optional[Dict[str, List[Local]]] = None) -> None:
            super().__init__()
            self.save_hyperparameters()
            assert Local
            assert Deep

    class Defaulting(Line):
        def __init__(self, value=Local()) -> None:  # type: ignore[no-untyped-def] # noqa
            super().__init__()
            self.save_hyperparameters()

    class Knows(Annotated):
        pass

    value = {"a": [Local(Deep(2))]}
    for kind in (Annotated, Knows):
        path = saved(kind(value), tmp_path)
        assert kind.load_from_checkpoint(path).hparams.value == value
    path = saved(Defaulting(Local(None, (1,))), tmp_path)
    assert Defaulting.load_from_checkpoint(path).hparams.value == Local(None, (1,))
    path = saved(Any_(Local(None, (1,))), tmp_path)
    with pytest.raises(CheckpointError, match=r"'value': it was a .*Local, and no class has that"):
        Any_.load_from_checkpoint(path)


MARKER = "marker"


@dataclasses.dataclass
class Runs:
    """Leaves a file behind where its code runs."""

    path: str = MARKER

    def __post_init__(self) -> None:
        Path(self.path).touch()

    def __setattr__(self, name: str, value: Any) -> None:
        Path(str(value)).touch()
        object.__setattr__(self, name, value)


def forged(folder: Path, value: Any) -> Path:
    checkpoint = read(saved(Any_(), folder))
    assert checkpoint.state is not None
    checkpoint.state["hparams"] = {"value": value}
    return write(folder / "forged.safetensors", checkpoint.weights, checkpoint.state)


def test_nothing_runs_where_an_object_is_made_again(tmp_path: Path) -> None:
    path = forged(tmp_path, {"object": ["Runs", {"path": str(tmp_path / "x")}]})
    value = Any_.load_from_checkpoint(path).value
    assert type(value) is Runs
    assert value.path == str(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "value",
    [
        {"object": ["subprocess.Popen", {"args": ["touch", "x"]}]},
        {"object": ["Popen", {"args": ["touch", "x"]}]},
        {"object": ["builtins.eval", {}]},
        {"object": ["Line", {}]},
        {"object": ["Any_", {"weight": 1}]},
        {"object": ["TaskModule", {}]},
        {"object": ["Inner", {"size": 1}]},  # a field is missing
        {"object": ["Inner", {"size": 1, "name": "x", "__class__": 1}]},
        {"object": ["Inner", {"size": 1, "name": "x", "__init__": 1}]},
        {"object": ["Inner", {"size": 1, "name": "x", "": 1}], "tuple": []},
        {"object": ["Inner", [1]]},
        {"object": ["Inner", 1]},
        {"object": [["Inner"], {}]},
        {"object": "Inner"},
        {"object": {}},
        {"member": ["Color", "GREEN"]},
        {"member": ["Color", "__class__"]},
        {"member": ["Color", ["RED"]]},
        {"member": ["Inner", "size"]},
        {"numpy": ["object_", 1]},
        {"numpy": ["float32", [1, 2]]},
        {"numpy": ["int8", "x"]},
        {"numpy": ["int8", 1e300]},
        {"numpy": "float32"},
        {"array": 1},
        {"tensor": [1]},
        {"tuple": 1},
        {"tuple": "abc"},
        {"set": [[1]]},
        {"dict": [[[1], 2]]},
        {"dict": [1]},
        {"dict": {"a": 1}},
        {"complex": [1]},
        {"complex": ["x", 1]},
        {"bytes": "zz"},
        {"bytes": 5},
        {"path": 1},
        {"path": None},
        {"exec": "x"},
        {"left out": None},
        {"left out": "\x1b[31m"},
        {},
        {"left out": ["x"] * 100},
        np.ones(1),
    ],
    ids=repr,
)
def test_a_forged_value_is_one_sentence(tmp_path: Path, value: Any) -> None:
    assert subprocess
    path = forged(tmp_path, value)
    with pytest.raises(CheckpointError) as error:
        Any_.load_from_checkpoint(path)
    text = str(error.value)
    assert "the hyper-parameter 'value'" in text
    assert text.isprintable()
    assert len(text) < 700
    Any_.load_from_checkpoint(path, value=1)


def test_a_hyper_parameter_that_the_class_does_not_take_is_named(tmp_path: Path) -> None:
    path = saved(Any_(3), tmp_path)
    with pytest.raises(CheckpointError, match=r"'value', which Line.__init__ does not take"):
        Line.load_from_checkpoint(path)

    class Open(Line):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.save_hyperparameters()

    assert Open.load_from_checkpoint(path).hparams == {"value": 3}


# ---------------------------------------------------------------------- self.hparams


def test_entries_are_attributes_too() -> None:
    class Net(Line):
        def __init__(self, lr: float, items: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters()

    task = Net(0.5)
    assert task.hparams.lr == task.hparams["lr"] == 0.5
    task.hparams.lr = 0.25
    assert task.hparams["lr"] == 0.25
    task.hparams["width"] = 2
    assert task.hparams.width == 2
    del task.hparams.width
    assert task.hparams == {"lr": 0.25, "items": 3}
    assert isinstance(task.hparams, dict)
    assert repr(task.hparams) == "{'lr': 0.25, 'items': 3}"
    assert list(task.hparams.items()) == [("lr", 0.25), ("items", 3)]  # a dict's own name
    with pytest.raises(AttributeError, match="no hyper-parameter 'rate'; there are 'lr', 'items'"):
        _ = task.hparams.rate
    with pytest.raises(AttributeError, match="no hyper-parameter 'rate'"):
        del task.hparams.rate
    for again in (copy.deepcopy(task.hparams), pickle.loads(pickle.dumps(task.hparams))):
        assert again == task.hparams
        assert again.lr == 0.25


def test_tasks_do_not_share_them() -> None:
    first, second = Line(), Line()
    first.hparams.lr = 1
    assert second.hparams == {}
    assert Line().hparams == {}
    with pytest.raises(AttributeError, match="call save_hyperparameters"):
        _ = second.hparams.lr


def test_what_is_changed_afterwards_is_what_a_checkpoint_keeps(tmp_path: Path) -> None:
    task = Any_({"a": 1})
    task.hparams.value["a"] = 2
    task.hparams.value["b"] = (3,)
    assert Any_.load_from_checkpoint(saved(task, tmp_path)).value == {"a": 2, "b": (3,)}


def test_an_argument_that_init_takes_apart_is_kept_whole(tmp_path: Path) -> None:
    class Net(Line):
        def __init__(self, config: Dict[str, Any]) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.lr = config.pop("lr")
            config["layers"].append(3)

    task = Net({"lr": 0.5, "layers": [1, 2]})
    assert task.hparams.config == {"lr": 0.5, "layers": [1, 2]}
    again = Net.load_from_checkpoint(saved(task, tmp_path))
    assert again.lr == 0.5
    assert again.hparams == task.hparams


def test_a_step_reads_them_in_either_mode(mode: str, tmp_path: Path) -> None:
    class Net(Line):
        def __init__(self, scale: float, config: Any) -> None:
            super().__init__()
            self.save_hyperparameters()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.weight * batch).sum() * self.hparams.scale * self.hparams.config["x"]

        def configure_optimizers(self) -> Any:
            return flow.optim.SGD(self.param_groups(), lr=1.0)

        def on_train_epoch_end(self) -> None:
            self.hparams.scale = 4.0
            self.hparams.config["x"] = 8.0

    task = Net(2.0, {"x": 3.0})
    quiet_trainer(mode=mode, max_epochs=2).fit(task, [flow.ones(1)])
    assert task.weight.numpy() == [-(2.0 * 3.0 + 4.0 * 8.0)]
