"""Arguments of many types come from options and files as what they are, and are kept so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Dict

import pytest
import yaml

from ofengine.cli import main

FILE = """
from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Literal, Optional, Tuple, Union

import numpy as np
import oneflow as flow
from jsonargparse.typing import register_type
from oneflow import nn

from ofengine import TaskModule

if TYPE_CHECKING:
    from nowhere import Nothing


class Color(enum.Enum):
    red = 1
    blue = 2


@dataclass
class Options:
    lr: float = 0.5
    steps: int = 2


class Base(TaskModule):
    made: List[Any] = []

    def __init__(self, base: int = 1) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()

    def train_dataloader(self) -> Any:
        return [flow.ones(1, 2)]


class Many(Base):
    def __init__(
        self,
        color: Color = Color.red,
        path: Path = Path("x"),
        pair: Tuple[int, float] = (1, 2.0),
        table: Optional[Dict[str, float]] = None,
        kind: Literal["a", "b"] = "a",
        anything: Any = None,
        options: Options = Options(),
        layer: Optional[nn.Module] = None,
        either: Union[int, str] = 3,
        untyped=4,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self.made.append((color, path, pair, table, kind, anything, options, either, untyped, more))
        self.layers = layer


class Objects(Base):
    def __init__(
        self,
        act: nn.Module = nn.Tanh(),
        call: Callable[[Any], Any] = lambda x: x,
        scale: Any = np.float32(0.1),
        width: int = 2,
        nothing: Optional[Nothing] = None,
    ) -> None:
        super().__init__()
        self.made.append((type(act), call(3), scale, width))


class Tensors(Base):
    def __init__(self, tensor: Any = flow.ones(2)) -> None:
        super().__init__()


class Rounded:
    def __init__(self, text: str) -> None:
        self.value = float(text)

    def __repr__(self) -> str:
        return f"Rounded({self.value})"


register_type(Rounded, serializer=lambda rounded: f"{rounded.value:.1f}")


class Rounds(Base):
    def __init__(self, value: Optional[Rounded] = None) -> None:
        super().__init__()
"""

QUIET = [f"--trainer.enable_{name}=false" for name in ("progress_bar", "model_summary")]


@pytest.fixture
def types(file: Path) -> Any:
    """The classes of a file ``typed.py``."""
    Path("typed.py").write_text(FILE)
    return lambda: sys.modules["ofengine_file_typed"]


def config(capsys: Any, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["fit", *arguments, "--print_config"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return str(said.out)


def test_each_value_is_what_its_hint_says_by_options_and_by_their_file(
    types: Any, capsys: Any
) -> None:
    options: Dict[str, str] = {
        "color": "blue", "path": "/a/b", "pair": "[3, 4]", "table": "{a: 1e-3}", "kind": "b",
        "anything": "{0: 1e-3, b: [no]}", "options.lr": "0.25", "layer": "oneflow.nn.ReLU",
        "either": "7", "untyped": "abc", "base": "5",
    }  # fmt: skip
    arguments = ["typed.py:Many", *(f"--task.{name}={text}" for name, text in options.items())]
    text = config(capsys, *arguments)
    Path("many.yaml").write_text(text)
    assert config(capsys, "--config", "many.yaml") == text
    for given in (arguments, ["--config", "many.yaml"]):
        assert main(["fit", *given, *QUIET, "--trainer.fast_dev_run=1"]) == 0
    module = types()
    one, other = module.Base.made
    assert one == other
    assert one == (
        module.Color.blue, Path("/a/b"), (3, 4.0), {"a": 0.001}, "b", {0: 0.001, "b": [False]},
        module.Options(0.25, 2), 7, "abc", {"base": 5},
    )  # fmt: skip
    assert type(one[2][1]) is float


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("color green", "give 'red' or 'blue'."),
        ("kind c", "give 'a' or 'b'."),
        ("pair [3]", "give a list of 2: a whole number, a number."),
        ("table {a: x}", "give a dict such as {a: 1} of which each value is a number or null."),
        ("options.lr x", "give a number."),
        ("options.rl 1", "there is no such argument."),
        ("layer Relu", "give class_path and init_args of a Module or null."),
        ("base [1]", "give a whole number."),
    ],
)
def test_a_value_of_another_type_is_told_what_to_be(
    types: Any, capsys: Any, given: str, sentence: str
) -> None:
    assert main(["fit", "typed.py:Many", "--print_config", *f"--task.{given}".split(" ", 1)]) == 2
    assert capsys.readouterr().err == f"ofengine fit: --task.{given}: {sentence}\n"


def test_defaults_that_no_file_can_hold_stay_what_they_are(types: Any, capsys: Any) -> None:
    text = config(capsys, "typed.py:Objects", "--task.width=3")
    init_args = yaml.safe_load(text)["task"]["init_args"]
    assert init_args["width"] == 3
    assert not {"call", "scale"} & set(init_args)
    Path("objects.yaml").write_text(text)
    assert main(["fit", "--config", "objects.yaml", *QUIET, "--trainer.fast_dev_run=1"]) == 0
    (made,) = types().Base.made
    tanh, *rest = made
    assert tanh.__name__ == "Tanh"
    assert rest[0] == 3
    assert type(rest[1]).__name__ == "float32"
    assert rest[2] == 3


def test_a_tensor_is_no_default_of_an_option(types: Any, capsys: Any) -> None:
    assert main(["fit", "typed.py:Tensors", "--help"]) == 2
    said = capsys.readouterr().err
    assert said.endswith(
        "typed.py: the default of Tensors's argument tensor is a tensor or an array, which no "
        "option can be: let it be None, and make it in __init__.\n"
    )


def test_a_value_that_the_file_would_change_is_refused(types: Any, capsys: Any) -> None:
    rounds = ["typed.py:Rounds", "--print_config"]
    assert main(["fit", *rounds, "--task.value=0.25"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "task.value is Rounded(0.25), and would be read again as Rounded(0.2)" in said.err
    assert main(["fit", *rounds, "--task.value=0.5"]) == 0


def test_max_time_is_a_text_or_a_dict(types: Any, capsys: Any) -> None:
    given = ("00:02:00:00", "{hours: 2}")
    for text, kept in zip(given, ("00:02:00:00", {"hours": 2})):
        content = yaml.safe_load(config(capsys, "typed.py:Base", f"--trainer.max_time={text}"))
        assert content["trainer"]["max_time"] == kept
