"""``ckpt_path="last"`` goes by what files say, never by their dates; "best" is the callback's."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

import oneflow as flow
import pytest
from helpers import MODES, Line, Scored, quiet_trainer, run_python, weights_of
from oneflow import nn
from safetensors.numpy import save_file

from ofengine import Callback, CheckpointError, ConfigurationError, OFEngineError, Trainer
from ofengine.callbacks import ModelCheckpoint, TerminateOnNaN
from ofengine.checkpoint import metadata_of, read, save_weights, write
from ofengine.checkpoint.find import newest_first
from ofengine.errors import NonFiniteError, OFEngineWarning

BATCHES = [flow.ones(3, 2)] * 2


class Begins(Callback):
    """Notes at which step a fit begins."""

    def __init__(self) -> None:
        self.step: Optional[int] = None

    def on_train_start(self, trainer: Any, task: Any) -> None:
        self.step = trainer.global_step


def fit(callbacks: Any, epochs: int = 3, path: Any = None, **arguments: Any) -> Optional[int]:
    """Fit; return the step that it began at."""
    begins = Begins()
    listed = [begins, *(callbacks if isinstance(callbacks, list) else [callbacks])]
    trainer = quiet_trainer(max_epochs=epochs, callbacks=listed, **arguments)
    trainer.fit(Scored(), BATCHES, ckpt_path=path)
    return begins.step


def every(folder: Path, **arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_top_k=-1, **arguments)


DATES: Dict[str, Any] = {
    "all the same": lambda paths: [1e9] * len(paths),
    "the other way round": lambda paths: [1e9 - number for number in range(len(paths))],
    "the oldest was touched": lambda paths: [2e9, *[1e9] * (len(paths) - 1)],
    "in the future": lambda paths: [4e9 - number for number in range(len(paths))],
    "any": lambda paths: random.Random(3).sample(range(10**9, 2 * 10**9), len(paths)),
}


@pytest.mark.parametrize("dates", DATES)
@pytest.mark.parametrize("when", [{}, {"every_n_train_steps": 1}])
def test_dates_do_not_count(tmp_path: Path, dates: str, when: Dict[str, Any]) -> None:
    fit(every(tmp_path / "a", **when))
    (tmp_path / "b").mkdir()
    paths = sorted((tmp_path / "a").iterdir())
    for path, date in zip(paths, DATES[dates](paths)):
        copy = tmp_path / "b" / path.name
        shutil.copyfile(path, copy)
        os.utime(copy, (date, date))
    assert fit(every(tmp_path / "b", **when), 4, "last") == 6


def test_names_do_not_count(tmp_path: Path) -> None:
    fit(every(tmp_path))
    for number, path in enumerate(sorted(tmp_path.iterdir(), reverse=True)):
        path.rename(tmp_path / f"{number}.safetensors")
    assert fit(every(tmp_path), 4, "last") == 6


def test_a_clock_that_is_set_back_does_not_count_within_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [2e9]

    def clock() -> float:
        now[0] -= 1_000
        return now[0]

    monkeypatch.setattr(time, "time", clock)
    fit(every(tmp_path))
    assert fit(every(tmp_path), 4, "last") == 6
    assert fit(every(tmp_path), 5, "last") == 8


def test_of_several_runs_the_one_that_saved_last_goes_on(tmp_path: Path) -> None:
    fit(every(tmp_path), 5)
    fit(every(tmp_path), 2)  # later, and less far
    for path in tmp_path.iterdir():
        os.utime(path, (1e9, 1e9))
    assert fit(every(tmp_path), 6, "last") == 4


def test_what_was_resumed_from_an_earlier_moment_is_later(tmp_path: Path) -> None:
    fit(every(tmp_path), 5)  # to step 10
    begin = tmp_path / "epoch=1-step=4.safetensors"
    assert fit(every(tmp_path, filename="again-{step}"), 3, begin) == 4
    for path in tmp_path.iterdir():
        os.utime(path, (1e9, 1e9))
    assert metadata_of(tmp_path / "again-step=6.safetensors")["sitting"] == "1"
    assert fit(every(tmp_path, filename="again-{step}"), 4, "last") == 6
    assert metadata_of(tmp_path / "again-step=8.safetensors")["sitting"] == "2"
    # From the beginning again: that is later than both.
    first = tmp_path / "epoch=0-step=2.safetensors"
    assert fit(every(tmp_path, filename="once more-{step}"), 2, first) == 2
    assert metadata_of(tmp_path / "once more-step=4.safetensors")["sitting"] == "3"
    assert fit(every(tmp_path), 3, "last") == 4


def test_moments_of_one_step_are_told_apart(tmp_path: Path) -> None:
    """The end of an epoch is later than its last batch, and the end of training than that."""

    class Saves(Callback):
        fires_last = True

        def save(self, trainer: Trainer, name: str) -> None:
            trainer.save_checkpoint(tmp_path / f"{name}.safetensors")

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.save(trainer, f"d batch {trainer.global_step}")

        def on_validation_end(self, trainer: Any, task: Any) -> None:
            self.save(trainer, f"c validated {trainer.global_step}")

        def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
            self.save(trainer, f"e epoch {trainer.current_epoch}")

        def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
            self.save(trainer, f"b epoch end {trainer.current_epoch}")

        def on_train_end(self, trainer: Any, task: Any) -> None:
            self.save(trainer, "a train end")

    class Validated(Scored):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("x", batch.mean())

    trainer = quiet_trainer(max_epochs=2, callbacks=Saves(), num_sanity_val_steps=0)
    trainer.fit(Validated(), BATCHES, BATCHES)
    expected = [
        "e epoch 0", "d batch 1", "d batch 2", "c validated 2", "b epoch end 0", "e epoch 1",
        "d batch 3", "d batch 4", "c validated 4", "b epoch end 1", "a train end",
    ]  # fmt: skip
    paths = list(tmp_path.iterdir())
    random.Random(0).shuffle(paths)
    assert [Path(path).stem for path in newest_first(paths)] == expected[::-1]


def test_a_damaged_file_is_passed_over_and_named(tmp_path: Path) -> None:
    fit(every(tmp_path))
    newest = tmp_path / "epoch=2-step=6.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(OFEngineWarning, match="passes over a checkpoint: .*epoch=2-step=6"):
        assert fit(every(tmp_path), 4, "last") == 4


@pytest.mark.parametrize("content", [b"", b"junk" * 10, b"\xff" * 100])
def test_what_is_no_checkpoint_is_passed_over_and_named(tmp_path: Path, content: bytes) -> None:
    fit(every(tmp_path))
    (tmp_path / "odd.safetensors").write_bytes(content)
    with pytest.warns(OFEngineWarning, match="passes over a checkpoint: .*odd") as warned:
        assert fit(every(tmp_path), 4, "last") == 6
    assert len([each for each in warned if "odd" in str(each.message)]) == 1


def test_what_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    fit(every(tmp_path))
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "gone.safetensors").symlink_to("not there")
    with pytest.warns(OFEngineWarning, match="fifo.safetensors cannot be read: it is no regular"):
        assert fit(every(tmp_path), 4, "last") == 6


def test_weights_are_no_run_and_pass_without_a_word(tmp_path: Path) -> None:
    fit(every(tmp_path))
    save_weights(nn.Linear(1, 1), tmp_path / "weights.safetensors")
    save_file({"w": weights_of(nn.Linear(1, 1))["bias"]}, str(tmp_path / "other.safetensors"))
    assert fit(every(tmp_path), 4, "last") == 6


def with_state(path: Path, to: Path, part: str, **changes: Any) -> Path:
    checkpoint = read(path)
    assert checkpoint.state is not None
    checkpoint.state[part].update(changes)
    metadata = {key: checkpoint.metadata[key] for key in ("run", "sitting")}
    return write(to, checkpoint.weights, checkpoint.state, metadata)


@pytest.mark.parametrize(
    ("part", "entry", "value"),
    [
        ("run", "saved_at", "late"), ("run", "saved_at", float("nan")), ("run", "id", 5),
        ("run", "saved_at", True), ("run", "id", None), ("loop", "batches_seen", "many"),
        ("loop", "batches_seen", 1e300), ("loop", "epoch", None), ("loop", "epoch", True),
        ("loop", "point", "nowhere"), ("loop", "point", 3), ("run", "id", []),
    ],
)  # fmt: skip
def test_a_forged_moment_is_passed_over(tmp_path: Path, part: str, entry: str, value: Any) -> None:
    fit(every(tmp_path))
    path = tmp_path / "epoch=0-step=2.safetensors"
    with_state(path, path, part, **{entry: value})
    with pytest.warns(OFEngineWarning, match="epoch=0-step=2.* its state is of no run"):
        assert fit(every(tmp_path), 4, "last") == 6
    with pytest.raises(OFEngineError) as error:
        fit(every(tmp_path), 4, path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("sitting", ["-1", "x", "9" * 5_000, "1.5", "²"])
def test_a_forged_sitting_is_passed_over(tmp_path: Path, sitting: str) -> None:
    fit(every(tmp_path))
    path = tmp_path / "epoch=0-step=2.safetensors"
    checkpoint = read(path)
    write(path, checkpoint.weights, checkpoint.state, {"sitting": sitting})
    with pytest.warns(OFEngineWarning, match="epoch=0-step=2.* its state is of no run"):
        assert fit(every(tmp_path), 4, "last") == 6


def test_a_sitting_that_is_the_highest_stays_one_that_can_be_read(tmp_path: Path) -> None:
    fit(every(tmp_path))
    path = tmp_path / "epoch=2-step=6.safetensors"
    checkpoint = read(path)
    metadata = {"sitting": "9" * 9, "run": checkpoint.metadata["run"]}
    write(path, checkpoint.weights, checkpoint.state, metadata)
    assert fit(every(tmp_path), 4, "last") == 6
    assert fit(every(tmp_path), 5, "last") == 8


def test_files_of_earlier_versions_say_no_sitting_and_count_all_the_same(tmp_path: Path) -> None:
    fit(every(tmp_path))
    for path in tmp_path.iterdir():
        checkpoint = read(path)
        write(path, checkpoint.weights, checkpoint.state, {"run": checkpoint.metadata["run"]})
    assert fit(every(tmp_path), 4, "last") == 6
    assert fit(every(tmp_path), 5, "last") == 8


def test_a_file_called_last_or_best_is_a_path_as_a_path(tmp_path: Path) -> None:
    fit(ModelCheckpoint(tmp_path / "ck"), 2)
    for name in ("last", "best"):
        shutil.copy(tmp_path / "ck" / "epoch=1-step=4.safetensors", name)
        assert fit(ModelCheckpoint(tmp_path / "other", save_top_k=0), 3, Path(name)) == 4


# ---------------------------------------------------------------------- best


class Rates(Callback):
    """Logs a score an epoch, which is best in epoch 0."""

    def on_validation_epoch_end(self, trainer: Any, task: Any) -> None:
        if trainer.num_training_batches is not None and not trainer.sanity_checking:
            trainer.log_metrics({"val": float(trainer.current_epoch)})


class Weighs(Scored):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("weight", self.layer.weight.sum())

    test_step = validation_step

    def forward(self, batch: Any) -> Any:
        return self.layer(batch)


@pytest.fixture
def trained(mode: str, tmp_path: Path) -> Any:
    """A trainer after three epochs, and its callback, whose best is epoch 0."""
    keep = ModelCheckpoint(tmp_path / "ck", monitor="val", save_last=True)
    trainer = quiet_trainer(
        mode=mode, max_epochs=3, callbacks=[Rates(), keep], num_sanity_val_steps=0
    )
    trainer.fit(Weighs(), BATCHES, BATCHES)
    assert "epoch=0-" in keep.best_model_path
    return trainer, keep


@pytest.mark.parametrize("which", ["best", "last"])
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_best_and_last_are_loaded_by_each_verb(trained: Any, verb: str, which: str) -> None:
    trainer, keep = trained
    path = keep.best_model_path if which == "best" else keep.last_model_path
    weights = read(path).weights
    task = Weighs()
    result = getattr(trainer, verb)(task, BATCHES[:1], ckpt_path=which)
    for name, array in weights_of(task).items():
        assert array.tobytes() == weights[name].tobytes()
    if verb == "predict":
        expected = BATCHES[0].numpy() @ weights["layer.weight"].T + weights["layer.bias"]
        assert abs(result[0].numpy() - expected).max() < 1e-6
    else:
        assert result[0]["weight"] == pytest.approx(float(weights["layer.weight"].sum()), abs=1e-6)


def test_fit_goes_on_from_the_best(trained: Any, tmp_path: Path) -> None:
    trainer, keep = trained
    weights = read(keep.best_model_path).weights
    steps: List[int] = []

    class Looks(Callback):
        def on_train_start(self, trainer: Any, task: Any) -> None:
            steps.append(trainer.global_step)
            for name, array in weights_of(task).items():
                assert array.tobytes() == weights[name].tobytes()

    trainer.callbacks.append(Looks())
    trainer.fit(Weighs(), BATCHES, BATCHES, ckpt_path="best")
    assert steps == [2]
    assert trainer.global_step == 6


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_without_a_best_there_is_a_sentence(tmp_path: Path, verb: str) -> None:
    none = quiet_trainer(max_epochs=1)
    with pytest.raises(ConfigurationError, match="'best' is the best_model_path of a ModelCheck"):
        getattr(none, verb)(Weighs(), BATCHES, ckpt_path="best")
    unfit = quiet_trainer(max_epochs=1, callbacks=ModelCheckpoint(tmp_path, monitor="val"))
    with pytest.raises(ConfigurationError, match="no fit of this Trainer has saved a best file"):
        getattr(unfit, verb)(Weighs(), BATCHES, ckpt_path="best")
    if verb != "fit":
        with pytest.raises(ConfigurationError, match="'last': there is no checkpoint yet in "):
            getattr(unfit, verb)(Weighs(), BATCHES, ckpt_path="last")


def test_a_best_file_that_was_removed_is_a_sentence(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path)
    trainer = quiet_trainer(max_epochs=1, callbacks=keep)
    trainer.fit(Weighs(), BATCHES)
    os.remove(keep.best_model_path)
    for verb in ("fit", "validate"):
        with pytest.raises(CheckpointError, match=r"epoch=0-step=2.* is not there"):
            getattr(trainer, verb)(Weighs(), BATCHES, ckpt_path="best")


# ---------------------------------------------------------------------- others that look for files


def test_terminate_on_nan_restores_the_latest_by_what_files_say(tmp_path: Path) -> None:
    class Breaks(Scored):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.global_step == 5 else loss

        def on_train_epoch_start(self) -> None:
            for path in tmp_path.glob("*.safetensors"):  # as if they had been copied
                epoch = int(metadata_of(path)["epoch"])
                os.utime(path, (1e9 - epoch, 1e9 - epoch))

        def on_train_epoch_end(self) -> None:
            self.trainer.log_metrics({"score": -float(self.current_epoch)})

    keep = ModelCheckpoint(tmp_path, monitor="score", save_top_k=3)
    trainer = quiet_trainer(max_epochs=3, callbacks=[TerminateOnNaN(restore=True), keep])
    task = Breaks()
    with pytest.raises(NonFiniteError, match="epoch=1-step=4"):
        trainer.fit(task, BATCHES)
    saved = read(tmp_path / "epoch=1-step=4.safetensors").weights
    assert all(array.tobytes() == saved[name].tobytes() for name, array in weights_of(task).items())


CRASHES = """
import json, os, signal, sys, time
import oneflow as flow
from ofengine import Callback, Trainer
from ofengine.callbacks import ModelCheckpoint
from helpers import Scored

root, mode = sys.argv[1:]
tries = os.environ.get("OFENGINE_SUPERVISED", "").split(":")[0]
if tries == "2":  # the clock was set back, and dates were lost
    now = time.time
    time.time = lambda: now() - 1e6
if tries:
    for path in os.listdir(root + "/ck"):
        os.utime(root + "/ck/" + path, (1e9, 1e9))

class Crashes(Callback):
    def on_train_start(self, trainer, task):
        print("begins", trainer.global_step, flush=True)

    def on_train_epoch_start(self, trainer, task):
        if int(tries) <= 2 and trainer.current_epoch == 2 * int(tries):
            os.kill(os.getpid(), signal.SIGSEGV)

keep = ModelCheckpoint(root + "/ck", save_top_k=-1)
trainer = Trainer(mode=mode, max_epochs=6, callbacks=[Crashes(), keep], logger=False, device="cpu",
                  enable_progress_bar=False, enable_model_summary=False, restart_on_crash=2)
trainer.fit(Scored(), [flow.ones(3, 2)] * 2)
"""


@pytest.mark.parametrize("mode", MODES)
def test_a_crash_goes_on_from_its_own_last_checkpoint_whatever_the_dates(
    tmp_path: Path, mode: str
) -> None:
    # Another run had been further, in the same folder.
    fit(ModelCheckpoint(tmp_path / "ck", "other-{epoch}", save_top_k=-1), 9)
    script = tmp_path / "script.py"
    script.write_text(CRASHES)
    tests = str(Path(__file__).resolve().parent.parent)
    ended = run_python(script, tmp_path, mode, env={**os.environ, "PYTHONPATH": tests})
    assert ended.returncode == 0, ended.stderr
    begins = [line.split()[1] for line in ended.stdout.splitlines() if line.startswith("begins")]
    assert begins == ["0", "4", "8"]
    epochs = sorted(path.name for path in (tmp_path / "ck").iterdir() if path.name[0] == "e")
    assert epochs == [f"epoch={n}-step={2 * n + 2}.safetensors" for n in range(6)]


def test_of_several_callbacks_the_first_that_has_a_best_counts(tmp_path: Path) -> None:
    kept = [
        ModelCheckpoint(tmp_path / "none", save_top_k=0),
        ModelCheckpoint(tmp_path / "best", monitor="val"),
        ModelCheckpoint(tmp_path / "newest"),
    ]
    trainer = quiet_trainer(max_epochs=3, callbacks=[Rates(), *kept], num_sanity_val_steps=0)
    trainer.fit(Weighs(), BATCHES, BATCHES)
    task = Weighs()
    trainer.validate(task, BATCHES[:1], ckpt_path="best")
    saved = read(tmp_path / "best" / "epoch=0-step=2.safetensors").weights
    assert all(array.tobytes() == saved[name].tobytes() for name, array in weights_of(task).items())


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_fast_dev_run_is_named_where_it_has_saved_nothing(which: str, tmp_path: Path) -> None:
    trainer = quiet_trainer(
        fast_dev_run=True, callbacks=ModelCheckpoint(monitor="loss"), default_root_dir=tmp_path
    )
    trainer.fit(Line(), [flow.ones(2, 2)])
    with pytest.raises(ConfigurationError, match=f"'{which}': with fast_dev_run no checkpoint is"):
        trainer.validate(Line(), [flow.ones(2, 2)], ckpt_path=which)
