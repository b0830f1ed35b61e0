"""What workers hand over is what they made, whatever it is, and without a name in /dev/shm."""

from __future__ import annotations

import multiprocessing
from multiprocessing.reduction import ForkingPickler
from typing import Any, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import quiet_trainer
from oneflow import nn
from oneflow.utils.data import DataLoader, Dataset, IterableDataset

from ofengine import TaskModule
from ofengine._oneflow import handover

SIZES = [3000, 40, 9000, 1, 3000, 20_000, 7000, 500, 12_000]


def sample(index: int) -> Dict[str, Any]:
    generator = np.random.RandomState(index)
    size = SIZES[index % len(SIZES)]
    numbers = flow.tensor(generator.rand(size).astype("float32"))
    return {
        "floats": numbers,
        "again": [numbers, (numbers.to(flow.float64), f"text {index}")],
        "wide": flow.tensor(generator.rand(3, size)).transpose(0, 1),
        "ints": flow.arange(size),
        "bools": flow.tensor(generator.rand(size) > 0.5),
        "pixels": flow.tensor(generator.randint(0, 256, (2, size)).astype("uint8")),
        "none": flow.zeros(0, 3),
        "scalar": flow.tensor(generator.rand()),
        "grad": flow.ones(2000, requires_grad=True),
        "plain": (index, None),
    }


class Samples(Dataset):
    def __len__(self) -> int:
        return 2 * len(SIZES)

    def __getitem__(self, index: int) -> Any:
        return sample(index)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return map(sample, range(len(SIZES)))


class Collects(TaskModule):
    """Keeps all that its batches have, as bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: List[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(plain(batch))
        return self.layer(flow.ones(1, 1)).sum()

    def configure_optimizers(self) -> Any:
        return flow.optim.SGD(self.param_groups(), lr=0.1)


def plain(batch: Any) -> Any:
    if isinstance(batch, flow.Tensor):
        return tuple(batch.shape), str(batch.dtype), batch.requires_grad, batch.numpy().tobytes()
    if isinstance(batch, dict):
        return {key: plain(each) for key, each in batch.items()}
    return [plain(each) for each in batch] if isinstance(batch, (list, tuple)) else batch


def as_it_is(samples: Any) -> Any:
    return samples


def seen(loader: Any) -> List[Any]:
    task = Collects()
    quiet_trainer(max_epochs=2).fit(task, loader)
    return task.seen


@pytest.mark.parametrize("workers, most", [(1, 60_000), (2, 2**28)])
def test_batches_arrive_as_they_were_made(
    workers: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "_MOST", most)  # in little room some go OneFlow's way
    options: Dict[str, Any] = {"batch_size": None, "collate_fn": as_it_is}
    persistent = workers == 2
    loader = DataLoader(Samples(), num_workers=workers, persistent_workers=persistent, **options)
    made = [plain(sample(index)) for index in range(len(Samples()))]
    assert seen(loader) == made * 2
    if workers == 1:
        stream = DataLoader(Stream(), num_workers=1, **options)
        assert seen(stream) == made[: len(SIZES)] * 2
    assert loader.collate_fn is as_it_is


class Floats(Dataset):
    """256 KiB a sample."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        return flow.full((2**16,), float(index)), index


def refuse(tensor: Any) -> Any:
    raise AssertionError("a tensor goes OneFlow's way")


def test_no_segment_is_made_and_little_memory_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ForkingPickler._extra_reducers, flow.Tensor, refuse)
    rings: List[Any] = []
    monkeypatch.setattr(
        handover, "_Ring", lambda ahead, made=handover._Ring: rings.append(made(ahead)) or rings[-1]
    )
    task = Collects()
    loader = DataLoader(Floats(), batch_size=2, num_workers=1, timeout=60)
    quiet_trainer(max_epochs=1).fit(task, loader)
    assert [each[1][3] for each in task.seen] == [
        np.array([2 * n, 2 * n + 1]).tobytes() for n in range(20)
    ]
    # As much as four batches, of which two are ready and one is being made.
    assert np.flatnonzero(rings[-1]._bytes[: 2**24]).max() < 4 * 2**19


class Unsendable(Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return lambda: index


def test_what_cannot_be_sent_is_an_error_and_no_run_that_hangs() -> None:
    loader = DataLoader(Unsendable(), batch_size=None, num_workers=1, collate_fn=as_it_is)
    with pytest.raises(Exception, match="pickle"):
        seen(loader)


def test_a_started_python_is_sent_them_oneflow_s_way() -> None:
    context = multiprocessing.get_context("spawn")
    loader = DataLoader(Floats(), batch_size=20, num_workers=1, multiprocessing_context=context)
    assert handover.hands_over(loader) is loader.collate_fn
