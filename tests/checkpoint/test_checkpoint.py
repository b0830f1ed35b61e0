"""Weights go to a file and come back bit for bit, all of them or none."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, Callable, List

import numpy as np
import oneflow as flow
import pytest
from helpers import assert_same_weights, bits, fill_deterministically, quiet_trainer, weights_of
from oneflow import nn
from safetensors.numpy import load_file, save_file

from ofengine import CheckpointError, ConfigurationError, OFEngineError, TaskModule
from ofengine.checkpoint import load_weights, save_weights


class Net(TaskModule):
    """Layers with parameters, running statistics, a counter of no dimension and odd values."""

    def __init__(self, width: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 2)
        self.register_buffer("count", flow.tensor(7 + seed, dtype=flow.int64))
        self.register_buffer("flags", flow.tensor([1, 0, seed % 2], dtype=flow.int8))
        self.register_buffer("halves", flow.ones(2, dtype=flow.float16) * seed)
        self.register_buffer("doubles", flow.tensor([seed / 3, 1e-300], dtype=flow.float64))
        self.register_buffer("none", flow.ones(0, 3))
        fill_deterministically(self, seed)
        with flow.no_grad():
            self.norm.running_mean.fill_(seed + 0.1)

    def forward(self, x: Any) -> Any:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("out", self(batch).mean())

    test_step = validation_step


def images(count: int = 1) -> List[Any]:
    return [flow.ones(2, 2, 5, 5) * (index + 1) for index in range(count)]


# ---------------------------------------------------------------------- there and back


def test_all_parameters_and_buffers_come_back_bit_for_bit(tmp_path: Path) -> None:
    saved, loaded = Net(seed=1), Net(seed=2)
    assert bits(saved) != bits(loaded)
    assert save_weights(saved, tmp_path / "weights") == tmp_path / "weights"
    load_weights(loaded, tmp_path / "weights")
    assert_same_weights(saved, loaded)
    for name, tensor in loaded.state_dict().items():
        own = saved.state_dict()[name]
        assert (tensor.dtype, tensor.shape) == (own.dtype, own.shape), name


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm])
def test_every_kind_of_normalization_comes_back(tmp_path: Path, layer: Any) -> None:
    def make() -> nn.Module:
        made: nn.Module = layer(1, 4) if layer is nn.GroupNorm else layer(4)
        return made

    first, second = make(), make()
    fill_deterministically(first, 5)
    save_weights(first, tmp_path / "weights")
    load_weights(second, tmp_path / "weights")
    assert_same_weights(first, second)


def test_special_values_come_back(tmp_path: Path) -> None:
    task = nn.Linear(5, 1, bias=False)
    special = np.array([[np.inf, -np.inf, np.nan, -0.0, 1e-45]], dtype="float32")
    task.weight.data.copy_(flow.tensor(special))
    save_weights(task, tmp_path / "weights")
    again = nn.Linear(5, 1, bias=False)
    load_weights(again, tmp_path / "weights")
    assert again.weight.numpy().tobytes() == special.tobytes()


def test_a_tensor_that_is_not_contiguous_comes_back(tmp_path: Path) -> None:
    task = nn.Linear(3, 2, bias=False)
    task.weight = nn.Parameter(flow.arange(6).reshape(3, 2).float().transpose(0, 1))
    save_weights(task, tmp_path / "weights")
    again = nn.Linear(3, 2, bias=False)
    load_weights(again, tmp_path / "weights")
    assert again.weight.numpy().tolist() == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]


def test_loading_changes_the_tensors_in_place(tmp_path: Path) -> None:
    # An optimizer, and a compiled graph, hold these very tensors.
    save_weights(Net(seed=1), tmp_path / "weights")
    task = Net(seed=2)
    before = [id(parameter) for parameter in task.parameters()]
    load_weights(task, tmp_path / "weights")
    assert [id(parameter) for parameter in task.parameters()] == before
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in task.parameters())


def test_metadata_comes_back_as_text(tmp_path: Path) -> None:
    save_weights(Net(), tmp_path / "weights", {"epoch": 3, "note": "größer ≥ 0"})
    metadata = load_weights(Net(), tmp_path / "weights")
    assert (metadata["epoch"], metadata["note"]) == ("3", "größer ≥ 0")


def test_others_can_read_the_file(tmp_path: Path) -> None:
    task = Net(seed=3)
    save_weights(task, tmp_path / "weights")
    assert bits(load_file(str(tmp_path / "weights"))) == bits(task)


def test_the_file_can_be_anywhere_and_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "with a space.weights"
    for seed in (1, 2):
        save_weights(Net(seed=seed), str(path))
    task = Net()
    load_weights(task, str(path))
    assert_same_weights(task, Net(seed=2))
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_trained_task_comes_back_in_either_mode(mode: str, tmp_path: Path) -> None:
    task, again = Net(seed=1), Net(seed=2)
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(task, images(3))
    trainer.save_checkpoint(tmp_path / "weights")
    metadata = load_weights(again, tmp_path / "weights")
    assert_same_weights(task, again)
    assert metadata["global_step"] == "3"
    assert task.norm.num_batches_tracked.item() == 3


def test_a_checkpoint_in_the_middle_of_training_holds_that_moment(
    mode: str, tmp_path: Path
) -> None:
    class Saves(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                self.trainer.save_checkpoint(tmp_path / "weights")

    quiet_trainer(mode=mode, max_epochs=1).fit(Saves(seed=1), images(4))
    short, loaded = Net(seed=1), Net(seed=2)
    quiet_trainer(mode=mode, max_epochs=1).fit(short, images(2))
    load_weights(loaded, tmp_path / "weights")
    assert_same_weights(short, loaded)


# ---------------------------------------------------------------------- all or nothing


def refused(task: nn.Module, path: Path, *parts: str) -> None:
    """Loading ``path`` raises one readable sentence and leaves every bit of ``task``."""
    before = bits(task)
    with pytest.raises(CheckpointError) as error:
        load_weights(task, path)
    text = str(error.value)
    for part in (str(path), *parts):
        assert part in text, text
    assert len(text.splitlines()) == 1, text
    assert bits(task) == before


def test_a_missing_file(tmp_path: Path) -> None:
    refused(Net(), tmp_path / "weights", "not")


def test_a_folder(tmp_path: Path) -> None:
    refused(Net(), tmp_path, "file")


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\0" * 8, b"\xff" * 64, b"PK\3\4" + b"\0" * 100, b"{}" * 100]
)
def test_a_file_of_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights").write_bytes(content)
    refused(Net(), tmp_path / "weights", "damaged")


def test_a_file_cut_off_anywhere(tmp_path: Path) -> None:
    small = nn.Linear(2, 2)
    save_weights(small, tmp_path / "weights")
    whole = (tmp_path / "weights").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        refused(small, tmp_path / "cut", "damaged")
    (tmp_path / "longer").write_bytes(whole + b"\0")
    refused(small, tmp_path / "longer", "damaged")


class Wider(Net):
    def __init__(self) -> None:
        super().__init__(width=4)


class Renamed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = self.head
        del self.head


class Larger(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        (Wider, ("Wider", "another model", "'conv.weight'", "(3, 2, 3, 3)", "(4, 2, 3, 3)")),
        (Renamed, ("Renamed", "another model", "classifier.weight", "head.weight")),
        (Larger, ("Larger", "another model", "extra.weight")),
    ],
)
def test_the_weights_of_another_model(
    tmp_path: Path, task: Callable[[], nn.Module], parts: Any
) -> None:
    save_weights(Net(), tmp_path / "weights")
    refused(task(), tmp_path / "weights", *parts)


def test_another_model_is_found_out_before_the_first_tensor_is_changed(tmp_path: Path) -> None:
    # All tensors fit but the last one.
    task = Net(seed=1)
    arrays = dict(weights_of(Net(seed=2)))
    last = sorted(arrays)[-1]
    arrays[last] = np.zeros((9, 9), dtype="float32")
    save_file(arrays, str(tmp_path / "weights"))
    refused(task, tmp_path / "weights", repr(last), "(9, 9)")


def test_another_kind_of_number_is_not_squeezed_in(tmp_path: Path) -> None:
    task = nn.Linear(1, 1)
    weight = np.array([[1.5]], dtype="float32")
    arrays = {"weight": weight, "bias": np.array([1 / 3])}  # no float32 is this third
    save_file(arrays, str(tmp_path / "weights"))
    refused(task, tmp_path / "weights", "bias", "float64", "float32")


# ---------------------------------------------------------------------- writing fails


def nothing_but(folder: Path, *names: str) -> bool:
    return sorted(each.name for each in folder.iterdir()) == sorted(names)


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    # Under a regular file nobody can make one, root neither.
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "weights", tmp_path / "file" / "folder" / "weights"):
        with pytest.raises(CheckpointError) as error:
            save_weights(Net(), path)
        assert str(path) in str(error.value)
        assert "could not be written" in str(error.value)
    assert nothing_but(tmp_path, "file")


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    with pytest.raises(CheckpointError, match="could not be written"):
        save_weights(Net(), tmp_path / "weights")
    assert nothing_but(tmp_path, "weights")


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = tmp_path / "weights"
    save_weights(Net(seed=1), path)
    before = path.read_bytes()
    fail_at(monkeypatch, where, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(CheckpointError) as error:
        save_weights(Net(seed=2), path)
    assert "No space left on device" in str(error.value)
    assert path.read_bytes() == before
    assert nothing_but(tmp_path, "weights")


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_ctrl_c_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = tmp_path / "weights"
    save_weights(Net(seed=1), path)
    before = path.read_bytes()
    fail_at(monkeypatch, where, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        save_weights(Net(seed=2), path)
    assert path.read_bytes() == before
    assert nothing_but(tmp_path, "weights")


def test_the_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: List[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        events.append("fsync")
        fsync(descriptor)

    def note_replace(*arguments: Any, **options: Any) -> None:
        events.append("replace")
        replace(*arguments, **options)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    save_weights(Net(), tmp_path / "weights")
    assert events[:2] == ["fsync", "replace"]


# ---------------------------------------------------------------------- ckpt_path


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_ckpt_path_is_loaded_first(mode: str, tmp_path: Path, verb: str) -> None:
    save_weights(Net(seed=1), tmp_path / "weights")
    loaded, own = Net(seed=2), Net(seed=1)
    trainer = quiet_trainer(mode=mode)
    result = getattr(trainer, verb)(loaded, images(), ckpt_path=tmp_path / "weights")
    assert_same_weights(loaded, own)
    expected = getattr(trainer, verb)(own, images())
    if verb == "predict":
        assert result[0].numpy().tobytes() == expected[0].numpy().tobytes()
    else:
        assert result == expected
        assert set(result[0]) == {"out"}


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_ckpt_path_that_is_not_there_says_so_before_anything_runs(
    tmp_path: Path, verb: str
) -> None:
    events: List[str] = []

    class Notes(Net):
        def forward(self, x: Any) -> Any:
            events.append("ran")
            return Net.forward(self, x)

    with pytest.raises(OFEngineError, match="no-such-file"):
        getattr(quiet_trainer(), verb)(Notes(), images(), ckpt_path=str(tmp_path / "no-such-file"))
    assert events == []


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("path", [True, 3, "", ["last"]])
def test_a_ckpt_path_that_is_no_path_says_what_it_takes(path: Any, verb: str) -> None:
    with pytest.raises(ConfigurationError, match="give the path of a checkpoint") as error:
        getattr(quiet_trainer(max_epochs=1), verb)(Net(), images(), ckpt_path=path)
    assert f"ckpt_path={path!r}" in str(error.value)
