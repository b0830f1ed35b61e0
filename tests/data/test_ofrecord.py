"""OneFlow's own reader of OFRecord files as training data."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Iterator, List, Tuple

import numpy as np
import oneflow as flow
import oneflow.core.record.record_pb2 as record
import pytest
from helpers import assert_same_weights, fill_deterministically, quiet_trainer
from oneflow import nn

from ofengine import Callback, OFEngineWarning, TaskModule

SIZE, BATCH = 12, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real file: each record is its length and a message of protobuf's."""
    folder: Path = tmp_path_factory.mktemp("records")
    generator = np.random.RandomState(0)
    with open(folder / "part-0", "wb") as file:
        for label in range(SIZE):
            each = record.OFRecord()
            each.feature["x"].float_list.value.extend(generator.randn(4).astype("f4").tolist())
            each.feature["y"].int32_list.value.append(label % 3)
            file.write(struct.pack("q", each.ByteSize()) + each.SerializeToString())
    return folder


class Records:
    """Batches of the file; a reader of its own for each pass, which begins at the first record."""

    def __init__(self, folder: Path, shuffle: bool = False) -> None:
        self.folder, self.shuffle, self.epoch = str(folder), shuffle, 0
        self.x = nn.OFRecordRawDecoder("x", shape=(4,), dtype=flow.float32)
        self.y = nn.OFRecordRawDecoder("y", shape=(1,), dtype=flow.int32)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return SIZE // BATCH

    def __iter__(self) -> Iterator[Tuple[Any, Any]]:
        reader = nn.OFRecordReader(
            self.folder, BATCH, random_shuffle=self.shuffle, random_seed=self.epoch
        )
        for _ in range(len(self)):
            records = reader()
            yield self.x(records), self.y(records).squeeze(1)


class Classifier(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        fill_deterministically(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.5, momentum=0.9)


def by_hand(data: Records, epochs: int) -> Classifier:
    task = Classifier()
    optimizer = task.configure_optimizers()
    for epoch in range(epochs):
        data.set_epoch(epoch)
        for batch in data:
            task.training_step(batch, 0).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return task


def test_the_file_is_read_as_it_was_written(folder: Path) -> None:
    labels: List[int] = [int(label) for _, y in Records(folder) for label in y.numpy()]
    assert labels == [label % 3 for label in range(SIZE)]


class SavesAtSix(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 6:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("shuffle", [False, True])
def test_it_trains_and_resumes_as_a_loop_by_hand(
    folder: Path, tmp_path: Path, shuffle: bool, mode: str
) -> None:
    """To the bit; saved in the middle of the second of three epochs."""
    hand = by_hand(Records(folder, shuffle), 3)
    path = tmp_path / "x.safetensors"
    whole, rest = Classifier(), Classifier()
    trainer = quiet_trainer(mode=mode, max_epochs=3, callbacks=[SavesAtSix(path)])
    trainer.fit(whole, Records(folder, shuffle))
    resumed = quiet_trainer(mode=mode, max_epochs=3)
    resumed.fit(rest, Records(folder, shuffle), ckpt_path=path)
    assert_same_weights(whole, hand)
    assert_same_weights(rest, hand)


class ReadsOn(Records):
    """One reader over all passes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reader = nn.OFRecordReader(str(folder), BATCH)

    def __iter__(self) -> Iterator[Tuple[Any, Any]]:
        for _ in range(len(self)):
            records = self.reader()
            yield self.x(records), self.y(records).squeeze(1)


class ReadsItself(Classifier):
    """The reader is a layer of the task, and its records are read in the step."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        data = ReadsOn(folder)
        self.reader, self.x, self.y = data.reader, data.x, data.y

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        records = self.reader()
        return super().training_step((self.x(records), self.y(records).squeeze(1)), batch_idx)


@pytest.mark.parametrize("within", ["data", "task"])
def test_a_reader_that_reads_on_is_told_in_a_resumed_run(
    folder: Path, tmp_path: Path, within: str, mode: str
) -> None:
    """The run itself is that of the loop by hand."""
    path = tmp_path / "x.safetensors"

    def made() -> Tuple[Classifier, Any]:
        if within == "task":
            return ReadsItself(folder), [flow.ones(1)] * (SIZE // BATCH)
        return Classifier(), ReadsOn(folder)

    whole, data = made()
    trainer = quiet_trainer(mode=mode, max_epochs=2, callbacks=[SavesAtSix(path)])
    trainer.fit(whole, data)
    assert_same_weights(whole.net, by_hand(Records(folder), 2).net)
    rest, data = made()
    with pytest.warns(OFEngineWarning, match=r"how far .*\.reader had read.* in __iter__"):
        quiet_trainer(mode=mode, max_epochs=2).fit(rest, data, ckpt_path=path)
