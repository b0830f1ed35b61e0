"""The checks of which the schema of a state is made: what they take, and what they say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Dict

import numpy as np
import oneflow as flow
import pytest
from helpers import bits, quiet_trainer
from helpers.stopping import Mean, run_once
from helpers.tiny import Tiny, tiny_batches
from hypothesis import given, strategies as st

from ofengine import Callback, CheckpointError, OFEngineError, TaskModule
from ofengine.checkpoint import read, write
from ofengine.checkpoint.checks import (
    anything,
    array,
    by_name,
    check_fits,
    flag,
    listed,
    maybe,
    number,
    one_of,
    plain,
    record,
    row,
    shown,
    text,
    whole,
)
from ofengine.checkpoint.schema import check_state

FILES = Path(__file__).parent / "files"
NAN, INF = float("nan"), float("inf")
ONES = np.ones((2, 3), dtype="float32")

TAKES: Dict[str, Any] = {
    "anything": (anything, [None, 1, {}, ONES, [[]]], []),
    "flag": (flag, [True, False], [0, 1, None, "True"]),
    "text": (text, ["", "ä", "a/b"], [None, 1, "a\0", "\ud800", ["a"]]),
    "whole": (whole(0, 3), [0, 3], [-1, 4, 1.0, True, None, "1"]),
    "number": (number(), [0, -1.5, NAN, INF, 10**300], [True, None, "1", 10**400]),
    "number, finite": (number(0.0, 2.0), [0, 2, 1.5], [-0.1, 2.1, NAN, INF, True]),
    "one of": (one_of("a", "b"), ["a", "b"], ["c", None, 1, ["a"]]),
    "plain": (plain, [None, True, 1, "x", [1, ["y", None]]], [{}, ONES, [{}], ["\0"]]),
    "array": (array("f"), [ONES, ONES[0]], [ONES.astype("int32"), [1.0], 1.0, None]),
    "array, exact": (
        array("f", (2, 3), "float32"), [ONES], [ONES.astype("float64"), ONES.T, ONES[0]],
    ),
    "maybe": (maybe(flag), [None, True], [0, "x"]),
    "listed": (listed(flag, 2), [[True, False]], [[True], [True, False, True], [1, 2], "ab", {}]),
    "row": (row(flag, text), [[True, "a"]], [[True], ["a", True], [True, "a", 1], None]),
    "by name": (by_name(flag, {"a", "b"}), [{}, {"a": True}], [{"c": True}, {"a": 1}, [], None]),
    "record": (
        record({"a": flag}, {"b": text}),
        [{"a": True}, {"a": False, "b": "x"}],
        [{}, {"b": "x"}, {"a": 1}, {"a": True, "c": 1}, [], None],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKES)
def test_what_a_check_takes_and_what_not(name: str) -> None:
    check, good, bad = TAKES[name]
    for value in good:
        check_fits(value, check, "the file")
    for value in bad:
        with pytest.raises(CheckpointError) as error:
            check_fits(value, check, "the file")
        said = str(error.value)
        assert said.startswith("the file: ")
        assert said.endswith(".")
        assert "\n" not in said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"b": []}, "the file: the state lacks 'a'."),
        ({"a": [1, -1], "b": []}, "a/1 is -1, where a whole number from 0 on is expected."),
        ({"a": [], "b": "x"}, "b is 'x', where a list is expected."),
        ({"a": [], "b": [], "c": 1}, "the state has the key 'c', which is not known."),
        ({"a": ONES, "b": []}, "a is an array of float32 with the shape (2, 3), where a list"),
        ({"a": [10**100], "b": []}, "a/0 is a number of many digits, where"),
        ({"a": ["x" * 500], "b": []}, f"a/0 is '{'x' * 40}...', where"),
    ],
)
def test_it_says_where_what_is_and_what_is_expected(value: Any, said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        check_fits(value, record({"a": listed(whole())}, {"b": listed(text)}), "the file")
    assert said in str(error.value)


def test_a_state_that_is_nested_too_deep_is_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(CheckpointError, match="nested too deep"):
        check_fits(deep, plain, "the file")


ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters())),
    lambda each: st.one_of(st.lists(each, max_size=3), st.dictionaries(st.text(), each)),
    max_leaves=8,
)


@given(value=ANY)
def test_any_value_can_be_shown_in_a_few_words(value: Any) -> None:
    assert len(shown(value)) < 250


@given(state=ANY)
def test_what_is_no_state_of_a_run_is_refused_in_a_sentence(state: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^x: "):
        check_state(state, "x")


def test_the_files_of_earlier_versions_are_states_of_a_run() -> None:
    check_state(read(FILES / "checkpoint_v2.safetensors").state, "x")


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("loop/epoch", 2**31, "loop/epoch is 2147483648, where a whole number from -1 to"),
        ("loop/epoch", 6, "loop/epoch is 6, where no more than loop/batches_seen, 5, is"),
        ("loop/epoch", -1, "loop/epoch is -1, where a whole number from 0 on is"),
        ("loop/batches_done", 4, "loop/batches_done is 4, where no more than loop/epoch_length, 3"),
        ("loop/point", "step", "loop/point is 'step', where one of 'begin'"),
        ("loop/global_step", 4, "rates/step is 5, where loop/global_step, 4, is expected"),
        ("loop/frozen", ["head.bias", 1], "loop/frozen/1 is 1, where a text is expected"),
        ("metrics/last", [[{}, 1.0]], "metrics/last/0/0 lacks 'name', 'prog_bar'"),
        ("rates/rates", {"0": [0.1]}, "rates/rates/0 is a list of 1, where a list of 2"),
        ("rates/rates", {"-1": [0.1, 0.1]}, "a key of rates/rates is '-1', where a whole number"),
        ("rates/rates", {"10001": [0.1, 0.1]}, "a key of rates/rates is 10001, where"),
        ("rates/positions", {"999999999": [0.1, 0.1]}, "a key of rates/positions is 999999999"),
        ("rates/changes", [[1, "nobody", 0.1]], "a change of 'nobody' at step 1, which is none"),
        ("rates/changes", [[9, "head", 0.1]], "a change of 'head' at step 9, which is none"),
        ("rates/groups", [], "optimizer/options is a list of 2, where a list of 0"),
        ("run/seed", -1, "run/seed is -1, where"),
        ("run/id", "a\ud800", "run/id is"),
        ("optimizer/states", {"a": {"m": [1.0]}}, "optimizer/states/a/m is a list of 1, where an"),
        ("random/global", None, "random/global is None, where a dict is expected"),
        ("nonsense", 1, "the state has the key 'nonsense', which is not known"),
    ],
)  # fmt: skip
def test_parts_that_do_not_go_together_are_named(place: str, value: Any, said: str) -> None:
    state: Any = copy.deepcopy(read(FILES / "checkpoint_v2.safetensors").state)
    holder, (*way, key) = state, place.split("/")
    for each in way:
        holder = holder[each]
    holder[key] = value
    with pytest.raises(CheckpointError) as error:
        check_state(state, "the file")
    assert said in str(error.value)


# ---------------------------------------------------------------------- all or nothing


class RefusesAtLast(Callback):
    """The last one listed: those before it have loaded their states."""

    def state_dict(self) -> Dict[str, Any]:
        return {"x": 1}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        raise RuntimeError("no\nspace")


class Loads(Callback):
    def __init__(self) -> None:
        self.nested: Dict[str, Any] = {"a": [1, 2]}
        self.other = 0

    def state_dict(self) -> Dict[str, Any]:
        return {"x": 1}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.nested["a"].append(3)
        self.nested["b"] = 1
        self.other = 7
        self.made = 1
        np.random.rand()


def saved(folder: Path, callbacks: Any, task: Any = Tiny) -> Path:
    trainer = quiet_trainer(max_epochs=1, callbacks=callbacks)
    trainer.fit(task(), tiny_batches())
    return trainer.save_checkpoint(folder / "saved.safetensors")


def test_where_the_last_callback_fails_all_is_as_before(mode: str, tmp_path: Path) -> None:
    path = saved(tmp_path, [Loads(), RefusesAtLast()])
    task, loads = Tiny(), Loads()
    before = bits(task)
    np.random.seed(5)
    expected = np.random.RandomState(5).rand()
    trainer = quiet_trainer(mode=mode, max_epochs=2, callbacks=[loads, RefusesAtLast()])
    with pytest.raises(CheckpointError) as error:
        trainer.fit(task, tiny_batches(), ckpt_path=path)
    said = str(error.value)
    assert "RefusesAtLast.load_state_dict raised RuntimeError: no space." in said
    assert isinstance(error.value.__cause__, RuntimeError)
    assert bits(task) == before
    assert loads.nested == {"a": [1, 2]}
    assert loads.other == 0
    assert not hasattr(loads, "made")
    assert np.random.rand() == expected


def test_where_the_task_fails_all_is_as_before(mode: str, tmp_path: Path) -> None:
    class Refuses(Tiny):
        def on_load_checkpoint(self, checkpoint: Any) -> None:
            with flow.no_grad():
                self.head.weight.fill_(9.0)
            self.seen.append(9)
            raise KeyError("seen")

    path = saved(tmp_path, [Loads()])
    task, loads = Refuses(), Loads()
    before = bits(task)
    with pytest.raises(CheckpointError, match=r"Refuses\.on_load_checkpoint raised KeyError"):
        quiet_trainer(mode=mode, max_epochs=2, callbacks=[loads]).fit(
            task, tiny_batches(), ckpt_path=path
        )
    assert bits(task) == before
    assert task.seen == []
    assert loads.other == 0


def test_a_callback_can_refuse_before_anything_changes(mode: str, tmp_path: Path) -> None:
    class Careful(Loads):
        def check_state_dict(self, state: Dict[str, Any], task: TaskModule) -> None:
            assert isinstance(task, Tiny)
            raise CheckpointError("not this one.")

    path = saved(tmp_path, [Loads(), Careful()])
    task, loads = Tiny(), Loads()
    before = bits(task)
    with pytest.raises(CheckpointError, match=r"^not this one\.$"):
        quiet_trainer(mode=mode, max_epochs=2, callbacks=[loads, Careful()]).fit(
            task, tiny_batches(), ckpt_path=path
        )
    assert bits(task) == before
    assert loads.other == 0


def test_the_trainer_can_go_on_after_a_refusal(mode: str, tmp_path: Path) -> None:
    path = saved(tmp_path, [])
    found = read(path)
    assert found.state is not None
    found.state["optimizer"]["states"]["head.weight"]["momentum_buf"] = np.ones(2, "float32")
    bad = write(tmp_path / "bad.safetensors", found.weights, found.state)
    expected, task = Tiny(), Tiny()
    quiet_trainer(mode=mode, max_epochs=1).fit(expected, tiny_batches())
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    with pytest.raises(CheckpointError, match=r"optimizer/states/head\.weight/momentum_buf is an"):
        trainer.fit(task, tiny_batches(), ckpt_path=bad)
    trainer.fit(task, tiny_batches())
    assert bits(task) == bits(expected)


@pytest.mark.parametrize("seed", [None, 1])
def test_a_refusal_leaves_random_numbers_as_if_there_had_been_no_call(
    seed: Any, tmp_path: Path
) -> None:
    class Other(Mean):
        def configure_optimizers(self) -> Any:
            flow.rand(3)
            return flow.optim.Adam(self.parameters())

        def setup(self, stage: str) -> None:
            np.random.rand(5)

    _, files = run_once("eager", lambda: [flow.ones(1)], save_to=tmp_path)
    np.random.seed(4)
    flow.manual_seed(4)
    expected = np.random.RandomState(4).rand(), flow.rand(1).item()
    np.random.seed(4)
    flow.manual_seed(4)
    with pytest.raises(OFEngineError, match="was trained with SGD"):
        quiet_trainer(max_epochs=2, seed=seed).fit(Other(), [flow.ones(1)], ckpt_path=files[-1][0])
    assert (np.random.rand(), flow.rand(1).item()) == expected
