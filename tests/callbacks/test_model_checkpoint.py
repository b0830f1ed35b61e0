"""ModelCheckpoint: the right weights are kept, and no file is lost on the way."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import oneflow as flow
import pytest
from helpers import Scored, quiet_trainer, weights_of
from safetensors.numpy import load_file

from ofengine import Callback, CheckpointError, ConfigurationError, Trainer
from ofengine.callbacks import ModelCheckpoint
from ofengine.errors import OFEngineWarning

NAN = float("nan")


class Task(Scored):
    """Logs ``scores[epoch]`` as ``val_acc`` at each validation (without, it has none)."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.scores is not None:
            self.log("val_acc", self.scores[self.current_epoch])


BATCHES = [flow.ones(3, 2)] * 2
"""An epoch of two steps."""


def fit(
    checkpoint: ModelCheckpoint, scores: Optional[Sequence[float]] = None, **arguments: Any
) -> Trainer:
    """A fit of one epoch for each score, validated after each; of three where there are none."""
    arguments = {"max_epochs": len(scores or "123"), "num_sanity_val_steps": 0, **arguments}
    callbacks = [*arguments.pop("also", []), checkpoint]
    trainer = quiet_trainer(callbacks=callbacks, **arguments)
    trainer.fit(Task(scores), BATCHES, None if scores is None else BATCHES)
    return trainer


def files(folder: Path) -> List[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


def epochs_in(folder: Path) -> List[int]:
    return [int(name.split("-")[0][len("epoch=") :]) for name in files(folder)]


# ---------------------------------------------------------------------- what is kept


@pytest.mark.parametrize(
    ("mode", "k", "scores", "kept", "best"),
    [
        ("max", 1, [0.3, 0.5, 0.4, 0.6, 0.1], [3], 3),
        ("max", 2, [0.3, 0.5, 0.4, 0.6, 0.1], [1, 3], 3),
        ("min", 2, [0.3, 0.5, 0.4, 0.6, 0.1], [0, 4], 4),
        ("min", -1, [0.3, 0.5, 0.4], [0, 1, 2], 0),
        ("min", 3, [0.3, 0.5], [0, 1], 0),
        ("min", 0, [0.3, 0.5], [], None),
        ("max", 1, [0.5, 0.5, 0.5], [0], 0),  # as good is not better
        ("min", 1, [NAN, 0.7, NAN, 0.2, NAN], [3], 3),
        ("max", 2, [NAN, 0.7, NAN], [1], 1),
        ("min", 1, [NAN, NAN], [], None),
        ("min", -1, [NAN, 0.7], [0, 1], 1),
        ("min", 1, [float("inf"), 2.0], [1], 1),
    ],
)
def test_the_best_k_are_kept(
    tmp_path: Path,
    mode: str,
    k: int,
    scores: List[float],
    kept: List[int],
    best: Optional[int],
) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "ck", monitor="val_acc", mode=mode, save_top_k=k)
    fit(checkpoint, scores)
    assert epochs_in(tmp_path / "ck") == kept
    assert sorted(checkpoint.best_k_models) == [
        str(tmp_path / "ck" / n) for n in files(tmp_path / "ck")
    ]
    if best is None:
        assert (checkpoint.best_model_path, checkpoint.best_model_score) == ("", None)
    else:
        assert f"epoch={best}-" in checkpoint.best_model_path
        assert checkpoint.best_model_score == pytest.approx(scores[best], rel=1e-6)


def test_without_a_metric_the_newest_is_kept(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path)
    fit(checkpoint)
    assert files(tmp_path) == ["epoch=2-step=6.safetensors"]
    assert checkpoint.best_model_path == str(tmp_path / "epoch=2-step=6.safetensors")
    assert checkpoint.best_model_score is None


def test_without_a_metric_all_or_none_can_be_kept(tmp_path: Path) -> None:
    fit(ModelCheckpoint(tmp_path / "all", save_top_k=-1))
    assert epochs_in(tmp_path / "all") == [0, 1, 2]
    fit(ModelCheckpoint(tmp_path / "none", save_top_k=0))
    assert files(tmp_path / "none") == []


def test_the_file_holds_the_weights_of_its_moment(mode: str, tmp_path: Path) -> None:
    seen: Dict[int, Dict[str, np.ndarray]] = {}

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
            seen[trainer.current_epoch] = weights_of(task)

    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1)
    fit(checkpoint, also=[Watch()], mode=mode)
    assert len(files(tmp_path)) == 3
    for epoch, name in enumerate(files(tmp_path)):
        saved = {n: a for n, a in load_file(str(tmp_path / name)).items() if n[0] != "@"}
        assert saved.keys() == seen[epoch].keys()
        for key, array in seen[epoch].items():
            assert saved[key].tobytes() == array.tobytes()
    assert seen[0]["layer.weight"].tobytes() != seen[2]["layer.weight"].tobytes()


def test_save_last_holds_the_latest_weights_good_or_bad(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max", save_last=True)
    trainer = fit(checkpoint, [0.9, 0.5, 0.1])
    assert files(tmp_path) == ["epoch=0-step=2.safetensors", "last.safetensors"]
    assert checkpoint.last_model_path == str(tmp_path / "last.safetensors")
    saved = load_file(checkpoint.last_model_path)
    assert saved["layer.weight"].tobytes() == weights_of(trainer.task)["layer.weight"].tobytes()


def test_save_last_holds_the_end_of_training_whatever_the_interval(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, every_n_epochs=2, save_last=True)
    trainer = fit(checkpoint, max_epochs=3)
    assert files(tmp_path) == ["epoch=1-step=4.safetensors", "last.safetensors"]
    saved = load_file(checkpoint.last_model_path)
    assert saved["layer.weight"].tobytes() == weights_of(trainer.task)["layer.weight"].tobytes()


# ---------------------------------------------------------------------- when


def test_every_n_epochs(tmp_path: Path) -> None:
    fit(ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=2), max_epochs=5)
    assert epochs_in(tmp_path) == [1, 3]


@pytest.mark.parametrize(("accumulate", "steps"), [(1, [2, 4, 6]), (2, [2])])
def test_every_n_train_steps_counts_optimizer_steps(
    tmp_path: Path, accumulate: int, steps: List[int]
) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
    fit(checkpoint, accumulate_grad_batches=accumulate)
    assert files(tmp_path) == [f"step={step}.safetensors" for step in steps]


def test_a_subclass_s_own_hook_is_called_whatever_the_moments(tmp_path: Path) -> None:
    class Counting(ModelCheckpoint):
        batches = 0

        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            self.batches += 1

    counting = Counting(dirpath=tmp_path)
    assert counting.idle_hooks == ()
    assert ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2).idle_hooks == ()
    assert ModelCheckpoint(dirpath=tmp_path).idle_hooks == ("on_train_batch_end",)
    fit(counting, max_epochs=2)
    assert counting.batches == 2 * len(BATCHES)


def test_a_hook_put_on_the_object_is_called_whatever_the_moments(tmp_path: Path) -> None:
    batches: List[int] = []
    checkpoint = ModelCheckpoint(dirpath=tmp_path)
    checkpoint.on_train_batch_end = lambda *args: batches.append(args[-1])  # type: ignore
    fit(checkpoint, max_epochs=1)
    assert batches == list(range(len(BATCHES)))


def test_moments_may_be_set_until_training_starts(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)

    class Sets(Callback):
        def on_train_start(self, trainer: Any, task: Any) -> None:
            checkpoint.every_n_train_steps = 2

    fit(checkpoint, also=[Sets()])
    assert {f"step={step}.safetensors" for step in (2, 4, 6)} <= set(files(tmp_path))


def test_with_a_metric_every_validation_counts(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_acc", save_top_k=-1)
    fit(checkpoint, [0.5, 0.25], val_check_interval=1)
    assert files(tmp_path) == [
        "epoch=0-step=1.safetensors",
        "epoch=0-step=2.safetensors",
        "epoch=1-step=3.safetensors",
        "epoch=1-step=4.safetensors",
    ]


@pytest.mark.parametrize("sanity", [0, 1])
def test_epochs_without_validation_have_no_score(tmp_path: Path, sanity: int) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_acc", save_top_k=-1)
    fit(checkpoint, [0.5] * 4, check_val_every_n_epoch=2, num_sanity_val_steps=sanity)
    assert epochs_in(tmp_path) == [1, 3]


def test_without_validation_a_metric_of_training_is_looked_at_after_each_epoch(
    tmp_path: Path,
) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="loss", save_top_k=-1)
    fit(checkpoint)
    assert epochs_in(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("validated", [0, 1, 2])
def test_an_epochs_mean_of_training_is_that_epochs(tmp_path: Path, validated: int) -> None:
    class Means(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            # The means over two batches are 2.5, 0.5 and 1.5.
            value = [2.0, 3.0, 0.0, 1.0, 1.0, 2.0][self.global_step]
            self.log("train_x", value, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    checkpoint = ModelCheckpoint(tmp_path, "{epoch}-{train_x}", monitor="train_x", save_top_k=-1)
    trainer = quiet_trainer(
        max_epochs=3, callbacks=checkpoint, check_val_every_n_epoch=validated or 1
    )
    trainer.fit(Means([0.0] * 3), BATCHES, BATCHES if validated else None)
    assert files(tmp_path) == [
        "epoch=0-train_x=2.5.safetensors",
        "epoch=1-train_x=0.5.safetensors",
        "epoch=2-train_x=1.5.safetensors",
    ]
    assert "epoch=1" in checkpoint.best_model_path


def test_the_sanity_check_saves_nothing(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_start(self, trainer: Any, task: Any) -> None:
            raise KeyError("far enough")

    checkpoint = ModelCheckpoint(tmp_path, monitor="val_acc", save_last=True)
    with pytest.raises(KeyError, match="far enough"):
        fit(checkpoint, [0.5], num_sanity_val_steps=2, also=[Stop()])
    assert files(tmp_path) == []


def test_fast_dev_run_saves_nothing(tmp_path: Path) -> None:
    fit(ModelCheckpoint(tmp_path, save_last=True), [0.5], fast_dev_run=True)
    assert files(tmp_path) == []


def test_each_fit_starts_anew_and_leaves_the_files_of_the_one_before(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max", save_last=True)
    trainer = quiet_trainer(max_epochs=1, num_sanity_val_steps=0, callbacks=checkpoint)
    trainer.fit(Task([0.9]), BATCHES, BATCHES)
    first = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    trainer.fit(Task([0.1]), BATCHES, BATCHES)
    assert files(tmp_path) == [
        "epoch=0-step=2-v1.safetensors",
        "epoch=0-step=2.safetensors",
        "last-v1.safetensors",
        "last.safetensors",
    ]
    assert checkpoint.best_model_score == pytest.approx(0.1)
    for name, content in first.items():
        assert (tmp_path / name).read_bytes() == content


# ---------------------------------------------------------------------- names and places


@pytest.mark.parametrize(
    ("filename", "insert", "name"),
    [
        (None, True, "epoch=0-step=2.safetensors"),
        ("{epoch}-{step}-{val_acc:.3f}", True, "epoch=0-step=2-val_acc=0.500.safetensors"),
        ("{epoch:02d}-{val_acc:.3f}", False, "00-0.500.safetensors"),
        ("best", True, "best.safetensors"),
        ("best.safetensors", True, "best.safetensors"),
        ("a{{b}}-{step:04}", True, "a{b}-step=0002.safetensors"),
        ("{val_acc}", True, "val_acc=0.5.safetensors"),
    ],
)
def test_names_follow_the_template(
    tmp_path: Path, filename: Optional[str], insert: bool, name: str
) -> None:
    checkpoint = ModelCheckpoint(
        tmp_path, filename, monitor="val_acc", auto_insert_metric_name=insert
    )
    fit(checkpoint, [0.5])
    assert files(tmp_path) == [name]


def test_a_slash_in_a_metrics_name_makes_no_folder(tmp_path: Path) -> None:
    class Slash(Task):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/acc", 0.5)

    checkpoint = ModelCheckpoint(tmp_path, "{epoch}-{val/acc:.2f}", monitor="val/acc")
    quiet_trainer(max_epochs=1, callbacks=checkpoint).fit(Slash(), BATCHES, BATCHES)
    assert files(tmp_path) == ["epoch=0-val_acc=0.50.safetensors"]


def test_the_default_folder_is_beside_the_logs(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint()
    trainer = fit(checkpoint, logger=True, default_root_dir=tmp_path)
    assert trainer.log_dir is not None
    assert Path(checkpoint.best_model_path).parent == Path(trainer.log_dir) / "checkpoints"


def test_without_a_logger_the_default_folder_is_the_root(tmp_path: Path) -> None:
    fit(ModelCheckpoint(), default_root_dir=tmp_path)
    assert files(tmp_path) == ["checkpoints"]
    assert files(tmp_path / "checkpoints") == ["epoch=2-step=6.safetensors"]


def test_a_file_of_its_own_is_replaced_under_the_same_name(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "best", monitor="val_acc", mode="max")
    trainer = fit(checkpoint, [0.1, 0.2, 0.3])
    assert files(tmp_path) == ["best.safetensors"]
    saved = load_file(checkpoint.best_model_path)
    assert saved["layer.weight"].tobytes() == weights_of(trainer.task)["layer.weight"].tobytes()


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    theirs = ["best.safetensors", "best-v1.safetensors", "last.safetensors"]
    for name in theirs:
        (tmp_path / name).write_text("mine")
    checkpoint = ModelCheckpoint(tmp_path, "best", save_last=True)
    fit(checkpoint)
    assert files(tmp_path) == sorted([*theirs, "best-v2.safetensors", "last-v1.safetensors"])
    assert all((tmp_path / name).read_text() == "mine" for name in theirs)


def test_an_old_file_goes_only_when_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max")
    fsync = os.fsync

    def full_disk(descriptor: int) -> None:
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if is_file and "epoch=0-step=2.safetensors" in files(tmp_path):
            raise OSError(errno.ENOSPC, "no space left")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match="no space left"):
        fit(checkpoint, [0.1, 0.2])
    assert epochs_in(tmp_path) == [0]
    assert "epoch=0-" in checkpoint.best_model_path


def test_a_file_that_was_taken_away_does_not_end_the_training(tmp_path: Path) -> None:
    class Takes(Callback):
        def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
            for name in files(tmp_path):
                os.remove(tmp_path / name)

    fit(ModelCheckpoint(tmp_path), also=[Takes()])
    assert epochs_in(tmp_path) == [2]


# ---------------------------------------------------------------------- errors


def test_a_metric_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_ac", mode="max")
    with pytest.raises(ConfigurationError) as caught:
        fit(checkpoint, [0.5, 0.5])
    text = str(caught.value)
    assert "monitor='val_ac'" in text
    assert "Did you mean 'val_acc'?" in text
    assert "['loss', 'val_acc']" in text


def test_a_misspelt_metric_is_warned_of_before_training(tmp_path: Path) -> None:
    steps: List[int] = []

    class Stop(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            steps.append(1)

    checkpoint = ModelCheckpoint(tmp_path, monitor="val_ac", mode="max")
    with pytest.warns(OFEngineWarning, match="did you mean 'val_acc'") as warned:  # noqa: SIM117
        with pytest.raises(ConfigurationError):
            fit(checkpoint, [0.5], num_sanity_val_steps=1, also=[Stop()])
    assert len(warned) == 1
    assert len(steps) == 2


def test_an_unknown_metric_in_the_name_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"\{val_ac\}.*Did you mean 'val_acc'"):
        fit(ModelCheckpoint(tmp_path, "{epoch}-{val_ac}"), [0.5])


def test_a_run_too_short_for_its_metric_says_so(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_acc")
    with pytest.warns(OFEngineWarning, match="kept no best weights"):
        fit(checkpoint, [0.5, 0.5], check_val_every_n_epoch=5)
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_one_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    steps: List[int] = []

    class Count(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            steps.append(1)

    with pytest.raises(ConfigurationError, match=r"cannot write to .*file/ck: .*is a file"):
        fit(ModelCheckpoint(tmp_path / "file" / "ck"), also=[Count()])
    assert steps == []


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"mode": "best"}, "mode='best'"),
        ({"save_top_k": -2}, "save_top_k=-2"),
        ({"restore_best": True}, "needs a metric"),
        ({"save_top_k": True}, "save_top_k=True"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"every_n_train_steps": 0.5}, "every_n_train_steps=0.5"),
        ({"every_n_epochs": 1, "every_n_train_steps": 5}, "give one of them"),
        ({"filename": "{}"}, "without a name"),
        ({"filename": "{epoch"}, "expected '}'"),
        ({"filename": "{val_acc:d}"}, "format code 'd'"),
        ({"filename": "{epoch!r}"}, "without a name"),
    ],
)
def test_wrong_arguments_are_errors_at_once(wrong: Dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        ModelCheckpoint(**wrong)
