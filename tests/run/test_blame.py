"""An error in the user's code is told with the user's line, not as another's."""

from __future__ import annotations

import functools
import logging
from typing import Any, Optional

import pytest
from helpers import Bare, batches, line_of, quiet_trainer
from oneflow import nn

from ofengine import Callback, OFEngineError
from ofengine.errors import quoted


class Sub(nn.Module):
    @property
    def scale(self) -> Any:
        return self.not_there  # in a layer's property

    def forward(self, batch: Any) -> Any:
        return batch * self.scale


class Wrong(Bare):
    """Asks for what is not there, in the way ``kind``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.sub = kind, Sub()

    @property
    def width(self) -> Any:
        return self.not_there.width  # in a property

    @functools.cached_property
    def height(self) -> Any:
        return self.not_there.height  # in a cached property

    @property
    def logger(self) -> Any:  # Lightning has the name
        return self.not_there.logger  # in a property of a known name

    @property
    def outer(self) -> Any:
        return self.width  # in two properties

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.kind == "attribute":
            return self.layer(batch).mean() * self.not_there  # in the step
        if self.kind == "tensor":
            return self.layer(batch).nothing_like_it()  # of a tensor
        if self.kind == "sub":
            return self.layer(self.sub(batch)).mean()
        return self.layer(batch).mean() * getattr(self, self.kind)


MARKS = {
    "attribute": "# in the step",
    "tensor": "# of a tensor",
    "sub": "# in a layer's property",
    "width": "# in a property",
    "height": "# in a cached property",
    "logger": "# in a property of a known name",
    "outer": "# in a property",
}


def shown(error: BaseException, records: Any) -> str:
    """What a user reads: the sentence, what was logged, the lines of the traceback."""
    import traceback

    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return text + "\n".join(each.getMessage() for each in records)


@pytest.mark.parametrize("kind", MARKS)
def test_an_attribute_error_shows_the_user_s_line(
    mode: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises((AttributeError, OFEngineError)) as error:
        quiet_trainer(mode=mode, max_epochs=1).fit(Wrong(kind), batches())
    text = shown(error.value, caplog.records)
    assert MARKS[kind] in text
    missing = "nothing_like_it" if kind == "tensor" else "not_there"
    assert f"has no attribute '{missing}'" in text
    if kind not in ("sub", "attribute", "tensor"):
        assert missing in str(error.value)
        assert f"no attribute '{kind}'" not in str(error.value)
    assert "Lightning's name" not in str(error.value)


def test_a_property_that_works_is_asked_once(mode: str) -> None:
    asked = []

    class Works(Bare):
        @property
        def factor(self) -> float:
            asked.append(1)
            return 2.0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).mean() * self.factor

    quiet_trainer(mode=mode, max_epochs=1, limit_train_batches=1).fit(Works(), batches())
    assert len(asked) >= 1


@pytest.mark.parametrize("name", ["self", "this", "s"])
def test_the_culprit_is_the_user_s_method_whatever_self_is_called(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    scope: Any = {"Bare": Bare}
    exec(
        "class Own(Bare):\n"
        f"    def training_step({name}, batch, batch_idx):\n"
        f"        return {name}.layer(batch).mean() * {name}.not_there\n",
        scope,
    )
    with caplog.at_level(logging.ERROR), pytest.raises(AttributeError):
        quiet_trainer(max_epochs=1).fit(scope["Own"](), batches())
    assert caplog.records[0].getMessage().startswith("Own.training_step raised AttributeError")


def bare(function: Any) -> Any:
    """A decorator that hands no name on."""

    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def wrapped(function: Any) -> Any:
    return functools.wraps(function)(bare(function))


WHEN = {
    "setup": "before the first batch",
    "configure_optimizers": "before the first batch",
    "train_dataloader": "before the first batch",
    "train": "before the first batch",  # nn.Module's own method, which the engine calls
    "on_train_epoch_start": "in epoch 0 (after step 0)",
    "on_train_batch_end": "in epoch 0, batch 0 (after step 1)",
    "on_validation_epoch_start": "in epoch 0, batch 1 (after step 2)",
    "on_train_epoch_end": "in epoch 0 (after step 2)",
    "on_train_end": "after step 2",
}


@pytest.mark.parametrize("around", ["nothing", "bare", "wrapped", "assigned"])
@pytest.mark.parametrize("method", WHEN)
def test_the_log_names_the_user_s_method_and_line_and_no_batch_where_there_is_none(
    mode: str, method: str, around: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(Bare):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.layer(batch).mean())

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).mean()

    def fails(self: Any, *_: Any) -> Any:
        return 1 // 0  # the user's line

    if around == "nothing":
        fails.__code__ = fails.__code__.replace(co_name=method)
    decorate = {"bare": bare, "wrapped": wrapped}.get(around, lambda function: function)
    setattr(Own, method, decorate(fails))
    data = None if method == "train_dataloader" else batches(2)
    with caplog.at_level(logging.ERROR), pytest.raises(ZeroDivisionError):
        trainer = quiet_trainer(mode=mode, max_epochs=1, num_sanity_val_steps=0)
        trainer.fit(Own(), data, batches(1))
    said = caplog.records[0].getMessage()
    assert said.startswith(f"Own.{method} raised ZeroDivisionError {WHEN[method]}, at {__file__}:")
    assert said.endswith(": `return 1 // 0  # the user's line`.")


@pytest.mark.parametrize(
    ("verb", "hook", "when"),
    [
        ("validate", "setup", "before the first batch"),
        ("validate", "on_validation_epoch_end", "in validation"),
        ("test", "on_test_start", "in testing"),
        ("predict", "on_predict_end", "in prediction"),
    ],
)
def test_so_it_is_in_the_other_verbs(
    mode: str, verb: str, hook: str, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(Callback):
        pass

    def fails(*_: Any) -> None:
        raise KeyError("own")

    class Steps(Bare):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.layer(batch).mean())

        test_step = validation_step

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch)

    setattr(Fails, hook, fails)
    with caplog.at_level(logging.ERROR), pytest.raises(KeyError):
        getattr(quiet_trainer(eval_mode=mode, callbacks=Fails()), verb)(Steps(), batches())
    said = caplog.records[0].getMessage()
    assert said.startswith(f"Fails.{hook} raised KeyError {when}, at {__file__}:")


@pytest.mark.parametrize("decorate", [bare, wrapped])
def test_one_decorator_of_two_methods_hides_neither(
    decorate: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(Bare):
        @decorate
        def on_fit_start(self) -> None:
            pass

        @decorate
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 1 // 0

    with caplog.at_level(logging.ERROR), pytest.raises(ZeroDivisionError):
        quiet_trainer(max_epochs=1).fit(Own(), batches())
    assert caplog.records[0].getMessage().startswith("Own.training_step raised")


def test_a_task_without_the_property_s_owner_still_tells_what_is_missing() -> None:
    task: Optional[Bare] = Bare()
    with pytest.raises(AttributeError, match="'Bare' object has no attribute 'nothing'"):
        _ = task.nothing  # type: ignore[union-attr]
    assert line_of(Wrong.training_step)


def test_an_error_of_oneflow_s_has_no_colours(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    class Reshapes(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).view(7, 11).mean()

    with caplog.at_level(logging.ERROR), pytest.raises(Exception) as error:
        quiet_trainer(mode=mode, max_epochs=1).fit(Reshapes(), batches())
    text = shown(error.value, caplog.records)
    assert "7" in str(error.value)
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], "nothing"),
        (["a"], "'a'"),
        ({"a": 1, "b": 2}, "'a' and 'b'"),
        ("abc", "'a', 'b' and 'c'"),
        ("abcd", "'a', 'b', 'c' and 1 more"),
        (range(2000), "0, 1, 2 and 1,997 more"),
    ],
)
def test_names_in_a_sentence(names: Any, text: str) -> None:
    assert quoted(names) == text
