"""An epoch that was cut short ends once in a run that is resumed, as in one that was never cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import attrs
import numpy as np
import oneflow as flow
import pytest
from helpers import bits, quiet_trainer
from helpers.mutations import mutated
from helpers.resuming import plain
from oneflow import nn
from oneflow.optim.lr_scheduler import ReduceLROnPlateau

from ofengine import Callback, CheckpointError, TaskModule
from ofengine.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from ofengine.checkpoint import read, write

pytestmark = pytest.mark.filterwarnings("ignore:save_checkpoint.* saves the weights that training")

BATCHES, EPOCHS = 4, 4
ROWS = np.random.RandomState(0).standard_normal((BATCHES, 3, 2)).astype("float32")


class Uphill(TaskModule):
    """Its loss grows in every epoch; it counts the epochs that have ended."""

    def __init__(self, plateau: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        with flow.no_grad():
            self.layer.weight.fill_(0.5)
            self.layer.bias.fill_(0.25)
        self.plateau, self.ends = plateau, 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch).square().mean()
        self.log("seen", loss, on_epoch=True)
        return -0.1 * loss

    def configure_optimizers(self) -> Any:
        made = flow.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)
        if not self.plateau:
            return made
        scheduler = ReduceLROnPlateau(made, patience=1, factor=0.5)
        return {
            "optimizer": made,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "seen", "interval": "epoch"},
        }

    def on_train_epoch_end(self) -> None:
        self.ends += 1

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        checkpoint["ends"] = self.ends

    def on_load_checkpoint(self, checkpoint: Any) -> None:
        self.ends = int(checkpoint["ends"])


class Counts(Callback):
    """Counts the epochs that have ended, and keeps the last steps of them."""

    def __init__(self) -> None:
        self.ends, self.steps = 0, np.zeros(2)

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        self.ends += 1
        self.steps = np.array([self.steps[1], trainer.global_step])

    def state_dict(self) -> Dict[str, Any]:
        return {"ends": self.ends, "steps": self.steps}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.ends = int(state["ends"])
        self.steps = np.array(state["steps"], "float64").reshape(2)


class Freezes(Callback):
    """Freezes the bias, and puts the layer in eval mode, where a second epoch ends."""

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        if trainer.current_epoch == 1:
            task.layer.bias.requires_grad_(False)
            task.layer.eval()


def counting() -> List[Callback]:
    return [Counts()]


def averaging() -> List[Callback]:
    return [StochasticWeightAveraging(0), Counts()]


def stopping() -> List[Callback]:
    return [EarlyStopping("seen", patience=2), Counts()]


def stopping_at_once() -> List[Callback]:
    return [EarlyStopping("seen", patience=1), Counts()]


def freezing() -> List[Callback]:
    return [Freezes(), Counts()]


@attrs.frozen
class Sitting:
    """What a fit came to, and the files that it left."""

    task: Uphill
    trainer: Any
    callbacks: List[Callback]
    files: Dict[str, Path]

    def outcome(self) -> Tuple[Any, ...]:
        """All that a run that was cut must have in common with one that was not."""
        rates = [group["lr"] for group in self.trainer.param_groups]
        states = [plain(each.state_dict()) for each in self.callbacks]
        frozen = [not each.requires_grad for each in self.task.parameters()]
        evaluates = [not each.training for each in self.task.modules()]
        steps = self.trainer.global_step, self.trainer.current_epoch
        told = self.task.ends, frozen, evaluates, self.trainer.should_stop
        return bits(self.task), repr(rates), repr(states), steps, told


Make = Callable[[], List[Callback]]


def sit(
    folder: Path,
    mode: str,
    make: Make,
    steps: int = -1,
    path: Optional[Path] = None,
    plateau: bool = False,
    **arguments: Any,
) -> Sitting:
    """A fit to the end, or of so many steps; saved in the last hook of each epoch and after it."""
    task, callbacks = Uphill(plateau), make()
    keep = ModelCheckpoint(folder, save_last=True, save_on_exception=False)
    trainer = quiet_trainer(
        mode=mode, max_epochs=EPOCHS, max_steps=steps, callbacks=[*callbacks, keep], **arguments
    )
    trainer.fit(task, [flow.tensor(each) for each in ROWS], ckpt_path=path)
    after = trainer.save_checkpoint(folder / "after.safetensors")
    return Sitting(task, trainer, callbacks, {"hook": folder / "last.safetensors", "after": after})


SETTINGS: Dict[str, Tuple[Make, bool]] = {
    "averages": (averaging, False),
    "stops": (stopping, False),
    "stops at once": (stopping_at_once, False),
    "plateau": (counting, True),
    "freezes": (freezing, False),
}


@pytest.mark.parametrize("which", ["hook", "after"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_was_cut_goes_on_as_one_that_was_not(
    name: str, which: str, mode: str, tmp_path: Path
) -> None:
    make, plateau = SETTINGS[name]
    whole = sit(tmp_path / "whole", mode, make, plateau=plateau)
    cut = sit(tmp_path / "cut", mode, make, 6, plateau=plateau)
    assert cut.trainer.global_step == 6
    assert cut.task.ends == 2
    resumed = sit(tmp_path / "on", mode, make, path=cut.files[which], plateau=plateau)
    assert resumed.outcome() == whole.outcome()


def everything() -> List[Callback]:
    return [StochasticWeightAveraging(1), EarlyStopping("seen", patience=3), Counts()]


def test_cut_twice_in_one_epoch_and_with_nothing_to_do_in_between(
    mode: str, tmp_path: Path
) -> None:
    whole = sit(tmp_path / "whole", mode, everything, plateau=True)
    path: Optional[Path] = None
    for number, steps in enumerate((5, 5, 5, 7, 7, -1)):
        which = ("hook", "after")[number % 2]
        sitting = sit(tmp_path / str(number), mode, everything, steps, path, plateau=True)
        path = sitting.files[which]
        if not path.exists():  # nothing was done, and no hook told
            path = sitting.files["after"]
        state: Any = read(path).state
        assert ("at_cut" in state) == (steps != -1), number
    assert sitting.outcome() == whole.outcome()


class Asks(Callback):
    """Asks the run to end within its second epoch."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == 6


def asking() -> List[Callback]:
    return [Counts(), Asks()]


@pytest.mark.parametrize("which", ["hook", "after"])
def test_a_stop_that_was_asked_for(which: str, mode: str, tmp_path: Path) -> None:
    """It holds, but for a run that has to make more steps."""
    whole = sit(tmp_path / "whole", mode, asking, min_steps=9)
    cut = sit(tmp_path / "cut", mode, asking)
    assert (cut.trainer.global_step, cut.task.ends) == (6, 2)
    again = sit(tmp_path / "again", mode, asking, path=cut.files[which])
    assert again.outcome() == cut.outcome()
    resumed = sit(tmp_path / "on", mode, asking, path=again.files["after"], min_steps=9)
    assert resumed.outcome() == whole.outcome()


def test_time_that_was_used_up(mode: str, tmp_path: Path) -> None:
    whole = sit(tmp_path / "whole", mode, everything)
    cut = sit(tmp_path / "cut", mode, everything, max_time={"microseconds": 1})
    assert cut.trainer.global_step == 1
    again = sit(
        tmp_path / "again", mode, everything, path=cut.files["hook"],
        max_time={"microseconds": 1},
    )  # fmt: skip
    assert again.outcome() == cut.outcome()
    for file in (cut.files["after"], again.files["after"]):
        assert sit(tmp_path / "on", mode, everything, path=file).outcome() == whole.outcome()


# ---------------------------------------------------------------------- the file


@pytest.fixture(scope="module")
def cut_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sit(tmp_path_factory.mktemp("cut"), "eager", everything, 6).files["after"]


def test_what_is_the_same_is_kept_once(cut_file: Path) -> None:
    class Idle(Callback):
        """Has a state that no hook changes."""

        def state_dict(self) -> Dict[str, Any]:
            return {"table": flow.ones(3), "of": (1, float("nan"))}

    path = sit(cut_file.parent / "idle", "eager", lambda: [Idle(), Counts()], 6).files["after"]
    state: Any = read(path).state
    at_cut = state["at_cut"]
    kept = {
        each["class"].rpartition(".")[2]: before
        for each, before in zip(state["callbacks"], at_cut["callbacks"])
    }
    assert kept.pop("Counts")["ends"] == 1
    assert set(kept.values()) == {None}, kept
    assert at_cut["task"] == {"ends": 1}
    assert at_cut["frozen"] == at_cut["in_eval_mode"] == []
    assert at_cut["should_stop"] is False


def test_a_run_that_was_not_cut_within_an_epoch_keeps_nothing(tmp_path: Path) -> None:
    for number, steps in enumerate((2 * BATCHES, -1)):
        state: Any = read(
            sit(tmp_path / str(number), "eager", counting, steps).files["after"]
        ).state
        assert "at_cut" not in state


def test_a_file_of_an_earlier_version_goes_on_as_it_did(cut_file: Path, tmp_path: Path) -> None:
    checkpoint = read(cut_file)
    state: Any = checkpoint.state
    del state["at_cut"]
    path = write(tmp_path / "older", checkpoint.weights, state, checkpoint.metadata)
    resumed = sit(tmp_path / "on", "eager", everything, 8, path)
    assert (resumed.trainer.global_step, resumed.task.ends) == (8, 3)  # the epoch's end was twice


def _set(*place: Any) -> Callable[[Any], None]:
    *way, last, value = place

    def change(at_cut: Any) -> None:
        for key in way:
            at_cut = at_cut[key]
        at_cut[last] = value

    return change


FORGED: Dict[str, Tuple[Callable[[Any], None], str]] = {
    "another kind": (_set("should_stop", 1), "at_cut/should_stop is 1"),
    "no list": (_set("callbacks", {}), "at_cut/callbacks is a dict of 0"),
    "too few": (_set("callbacks", []), "at_cut/callbacks is a list of 0, where a list of 5"),
    "no state": (_set("callbacks", 0, [1]), "at_cut/callbacks/0 is a list of 1"),
    "a state of another": (
        _set("callbacks", 2, {"ends": 1}), "the state of EarlyStopping is wrong: the state lacks",
    ),
    "a wrong count": (
        _set("callbacks", 1, "count", -1), "StochasticWeightAveraging is wrong: count is -1",
    ),
    "a task": (_set("task", 3), "at_cut/task is 3"),
    "names": (_set("frozen", [7]), "at_cut/frozen/0 is 7"),
    "a parameter": (_set("frozen", ["gone"]), "at_cut/frozen is 'gone'"),
    "layers": (_set("in_eval_mode", None), "at_cut/in_eval_mode is None"),
    "more": (_set("weights", {}), "at_cut has the key 'weights'"),
    "less": (lambda at_cut: at_cut.pop("task"), "at_cut lacks 'task'"),
}  # fmt: skip


def refused(path: Path, folder: Path, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        sit(folder, "eager", everything, path=path)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_part_is_refused(name: str, cut_file: Path, tmp_path: Path) -> None:
    change, words = FORGED[name]
    checkpoint = read(cut_file)
    state: Any = checkpoint.state
    change(state["at_cut"])
    path = write(tmp_path / "forged", checkpoint.weights, state, checkpoint.metadata)
    refused(path, tmp_path / "on", words)


def test_a_change_of_the_part_is_refused_or_taken(cut_file: Path, tmp_path: Path) -> None:
    checkpoint = read(cut_file)
    state: Any = checkpoint.state
    refusals = 0
    for number in range(30):
        other, words = mutated(state["at_cut"], number)
        try:
            path = write(tmp_path / "changed", checkpoint.weights, {**state, "at_cut": other})
        except CheckpointError:
            continue  # no file can hold that
        try:
            sit(tmp_path / "on", "eager", everything, path=path)
        except CheckpointError as error:
            assert "\n" not in str(error), words
            refusals += 1
    assert refusals > 10


@pytest.mark.parametrize("change", [{"cut_short": None}, {"point": "ready"}])
def test_a_part_of_an_epoch_that_was_not_cut_is_refused(
    change: Dict[str, Any], cut_file: Path, tmp_path: Path
) -> None:
    checkpoint = read(cut_file)
    state: Any = checkpoint.state
    state["loop"].update(change)
    path = write(tmp_path / "forged", checkpoint.weights, state, checkpoint.metadata)
    refused(path, tmp_path / "on", "there is an at_cut of an epoch that was not cut short")


class Fails(Callback):
    """Refuses its state of before the end of the epoch."""

    def __init__(self) -> None:
        self.ends = 0

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        self.ends += 1

    def state_dict(self) -> Dict[str, Any]:
        return {"ends": self.ends}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        raise ValueError(f"after {state['ends']}")


def test_where_it_cannot_be_taken_nothing_is_changed(tmp_path: Path) -> None:
    def make() -> List[Callback]:
        return [Counts(), Fails()]

    path = sit(tmp_path / "cut", "eager", make, 6).files["after"]
    callbacks = make()
    task, trainer = Uphill(), quiet_trainer(max_epochs=EPOCHS, callbacks=callbacks)
    before = bits(task)
    with pytest.raises(CheckpointError, match="after 1"):
        trainer.fit(task, [flow.tensor(each) for each in ROWS], ckpt_path=path)
    assert bits(task) == before
    assert (callbacks[0].ends, task.ends) == (0, 0)  # type: ignore[attr-defined]
    assert trainer._run.at_cut is None


def test_a_callback_is_asked_about_both_of_its_states(tmp_path: Path) -> None:
    class Asked(Counts):
        """Notes which states it is asked about."""

        def __init__(self) -> None:
            super().__init__()
            self.about: List[int] = []

        def check_state_dict(self, state: Dict[str, Any], task: TaskModule) -> None:
            self.about.append(state["ends"])

    def make() -> List[Callback]:
        return [Asked()]

    path = sit(tmp_path / "cut", "eager", make, 6).files["after"]
    resumed = sit(tmp_path / "on", "eager", make, path=path)
    assert resumed.callbacks[0].about == [2, 1]  # type: ignore[attr-defined]
