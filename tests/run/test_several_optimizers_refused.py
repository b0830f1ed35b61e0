"""Several optimizers: each mistake is told before training, in a sentence."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Tuple

import attrs
import oneflow as flow
import pytest
from helpers import bits, quiet_trainer, random_rows, refused, sentence
from oneflow import nn
from oneflow.optim.lr_scheduler import ReduceLROnPlateau

from ofengine import Callback, ConfigurationError, RateError, TaskModule
from ofengine.rates.planning import plan_run

EPOCHS, BATCHES = 2, 5
ROWS = random_rows([6] * BATCHES, 4)


class Small(TaskModule):
    """Two layers; what is made of them is given."""

    def __init__(self, make: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 2), nn.Linear(2, 1)
        self.make = make

    def training_step(self, batch: Any, batch_idx: int, optimizer_name: str) -> Any:
        return self.b(self.a(batch)).mean()

    def configure_optimizers(self) -> Any:
        return self.make(self.a.parameters(), self.b.parameters())


class Untold(Small):
    """Its step does not take the name."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        return self.b(self.a(batch)).mean()


def sgd(parameters: Any, **options: Any) -> Dict[str, Any]:
    return {"optimizer": flow.optim.SGD(parameters, lr=0.1), **options}


def share(a: List[Any], b: List[Any]) -> Dict[str, Any]:
    return {"a": sgd(a), "b": sgd([*b, a[0]])}


def with_plateau(parameters: Any) -> Dict[str, Any]:
    made = sgd(parameters)
    return {**made, "lr_scheduler": ReduceLROnPlateau(made["optimizer"])}


MISTAKES: Dict[str, Tuple[Callable[[Any, Any], Any], str]] = {
    "a name": (
        lambda a, b: {"a/b": sgd(a), "b": sgd(b)},
        "calls an optimizer 'a/b': a name is a word of letters",
    ),
    "the name of the loss": (
        lambda a, b: {"loss": sgd(a), "b": sgd(b)},
        "calls an optimizer 'loss'",
    ),
    "Lightning's frequency": (
        lambda a, b: {"a": sgd(a), "b": sgd(b, frequency=5)},
        "\\['b'\\] has a 'frequency', .*write 'every_n_batches': n for a step in every n-th",
    ),
    "an unknown key": (
        lambda a, b: {"a": sgd(a), "b": sgd(b, clip=5)},
        "configure_optimizers\\(\\)\\['b'\\] has the unknown keys \\['clip'\\]",
    ),
    "never": (
        lambda a, b: {"a": sgd(a), "b": sgd(b, every_n_batches=0)},
        "every_n_batches of .*\\['b'\\]=0: give a whole number from 1 on",
    ),
    "nothing in some batches": (
        lambda a, b: {"a": sgd(a, every_n_batches=2), "b": sgd(b, every_n_batches=3)},
        "no optimizer steps in every batch: 'a' and 'b' have an every_n_batches above 1",
    ),
    "no optimizer": (
        lambda a, b: {"a": sgd(a), "b": 3},
        "configure_optimizers\\(\\)\\['b'\\] returned 3 .*for the optimizer|\\['b'\\] returned",
    ),
    "clipping": (
        lambda a, b: {"a": sgd(a), "b": sgd(b, gradient_clip_val="much")},
        "gradient_clip_val='much': give a positive number",
    ),
    "how to clip": (
        lambda a, b: {"a": sgd(a), "b": sgd(b, gradient_clip_algorithm="much")},
        "gradient_clip_algorithm of .*\\['b'\\]='much': use one of",
    ),
    "both own one": (
        lambda a, b: share([*a], [*b]),
        "parameter 'a.weight' is twice in groups 'a/group_0' and 'b/group_0'",
    ),
    "nobody owns one": (
        lambda a, b: {"a": sgd(a), "b": sgd([*b][:1])},
        "1 trainable parameter\\(s\\) are in no group and would never train: 'b.bias'",
    ),
    "a list": (
        lambda a, b: [sgd(a)["optimizer"], sgd(b)["optimizer"]],
        "or several by name, as {'generator': ..., 'discriminator': ...}",
    ),
    "a schedule for another group": (
        lambda a, b: {"a": sgd(a), "b": sgd(b, lr_scheduler={"head": [1.0]})},
        "optimizer 'b': schedulers were given for the groups \\['head'\\]",
    ),
    "a plateau of nothing": (
        lambda a, b: {"a": with_plateau(a), "b": sgd(b)},
        "\\['a'\\] returned ReduceLROnPlateau without a metric",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_training(mistake: str) -> None:
    make, text = MISTAKES[mistake]
    kind: Any = (ConfigurationError, RateError)
    refused(Small(make), kind, text, train=ROWS)


def both(a: Any, b: Any) -> Any:
    return {"a": sgd(a), "b": sgd(b)}


def test_a_step_that_is_not_told_which() -> None:
    text = refused(Untold(both), ConfigurationError, "'a' and 'b', and training_step", train=ROWS)
    assert "def training_step(self, batch, batch_idx, optimizer_name)" in text
    # A misspelt key of a single one comes to the same.
    misspelt = Untold(lambda a, b: {"optimiser": flow.optim.SGD([*a, *b], lr=0.1)})
    refused(misspelt, ConfigurationError, "'optimiser', .*or return one optimizer", train=ROWS)


THIRD = {
    "optimizer_idx": "has the argument optimizer_idx, .*write optimizer_name as the third argument",
    "hiddens": "has the argument hiddens, .*split long sequences",
    "optimizer_closure": "has the argument optimizer_closure, .*leave it out",
    "dataloader_idx": "has the argument dataloader_idx, .*leave it out",
    "opt_idx": "takes opt_idx as its third argument, and is given the name of the optimizer",
    "which: int": "takes which: ?'?int'? as its third argument, and is given the name",
    "*, optimizer_idx=0": "has the argument optimizer_idx, .*write optimizer_name",
    "optimizer_name, hiddens=None": "has the argument hiddens, ",
}


def with_arguments(arguments: str) -> Any:
    scope: Dict[str, Any] = {"Small": Small}
    exec(
        "class Own(Small):\n"
        f"    def training_step(self, {arguments}):\n"
        "        return self.b(self.a(batch)).mean()\n",
        scope,
    )
    return scope["Own"]


@pytest.mark.parametrize("third", THIRD)
def test_a_step_that_would_be_given_a_text_for_a_number(mode: str, third: str) -> None:
    task = with_arguments(f"batch, batch_idx, {third}")(both)
    refused(task, ConfigurationError, f"Own.training_step {THIRD[third]}", train=ROWS, mode=mode)


@pytest.mark.parametrize("third", ["optimizer_name", "which", "name: str", "*rest"])
def test_a_third_argument_of_another_name_is_told_the_name(mode: str, third: str) -> None:
    task = with_arguments(f"batch, batch_idx, {third}")(both)
    quiet_trainer(mode=mode, max_epochs=1).fit(task, ROWS)


@pytest.mark.parametrize(
    "arguments",
    ["batch, batch_idx, optimizer_idx", "batch, batch_idx, hiddens", "batch, dataloader_idx"],
)
def test_of_a_single_optimizer_lightning_s_arguments_are_told_too(
    mode: str, arguments: str
) -> None:
    def one(a: Any, b: Any) -> Any:
        return flow.optim.SGD([*a, *b], lr=0.1)

    name = arguments.rpartition(" ")[2]
    text = f"Own.training_step has the argument {name}, which is Lightning's: "
    refused(with_arguments(arguments)(one), ConfigurationError, text, train=ROWS, mode=mode)
    task = with_arguments("batch, batch_idx, hiddens=None")(one)  # is given to nobody
    quiet_trainer(mode=mode, max_epochs=1).fit(task, ROWS)


def test_what_is_not_done_with_several() -> None:
    text = "returned 2 optimizers by name, and accumulate_grad_batches=2 averages for one"
    refused(Small(both), ConfigurationError, text, train=ROWS, accumulate_grad_batches=2)

    class Own(Small):
        def build_graph(self) -> Any:
            return None

    text = "Own.build_graph\\(\\) makes one graph, and there are the optimizers 'a' and 'b'"
    refused(Own(both), ConfigurationError, text, train=ROWS, mode="graph")
    with pytest.raises(ConfigurationError) as error:
        quiet_trainer(max_epochs=1).lr_find(Small(both), ROWS)
    sentence(error, "lr_find raises the rates of one optimizer")
    ranks = attrs.evolve(quiet_trainer(max_epochs=1).settings, devices=2)
    with pytest.raises(ConfigurationError) as error:
        plan_run(ranks, Small(both), 5)
    sentence(error, "are trained in one process, and there are 2 ranks: use Trainer\\(devices=1\\)")


def test_which_optimizer_is_asked_for() -> None:
    trainer = quiet_trainer(max_epochs=1)
    task = Small(both)
    trainer.fit(task, ROWS)
    for ask in (lambda: trainer.optimizer, lambda: task.optimizer, lambda: trainer.lr_scheduler):
        with pytest.raises(ConfigurationError) as error:
            ask()
        sentence(error, "there are 2 optimizers, 'a' and 'b': write trainer.optimizers\\['a'\\]")
    assert list(trainer.optimizers) == ["a", "b"]
    with pytest.raises(RateError) as raised:
        trainer.set_lr("group_0", 1.0)
    sentence(raised, "there is no group 'group_0': the groups are \\['a/group_0', 'b/group_0'\\]")


class Apart(Small):
    """The step of b has nothing of b in it."""

    def training_step(self, batch: Any, batch_idx: int, optimizer_name: str) -> Any:
        return self.a(batch).mean()


def test_a_step_that_has_nothing_to_train(mode: str) -> None:
    text = "in the step of optimizer 'b': the loss of Apart.training_step depends on no trainable"
    refused(Apart(both), ConfigurationError, text, mode=mode, train=ROWS)


class ByHand(Callback):
    """Writes a rate into a group."""

    def on_train_batch_start(self, trainer: Any, task: Any, *_: Any) -> None:
        trainer.optimizers["b"].param_groups[0]["lr"] = 0.5


def test_a_rate_written_by_hand_is_refused(mode: str) -> None:
    text = "optimizer 'b': the lr of group 'group_0' was changed by hand from 0.1 to 0.5"
    refused(Small(both), RateError, text, mode=mode, train=ROWS, callbacks=[ByHand()])


class Sees(Callback):
    """The bits of one weight after each batch."""

    def __init__(self) -> None:
        self.rows: List[bytes] = []

    def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
        trainer.settle()
        self.rows.append(bits(task)["a.weight"])


def test_one_alone_may_have_a_name(mode: str) -> None:
    sees = Sees()
    task = Small(lambda a, b: {"both": sgd([*a, *b])})
    quiet_trainer(mode=mode, max_epochs=EPOCHS, callbacks=[sees]).fit(task, ROWS)
    assert len(set(sees.rows)) == 10
