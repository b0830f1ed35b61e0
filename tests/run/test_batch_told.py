"""An error tells of the batch that failed, and not of the one before."""

from __future__ import annotations

import logging
import re
from typing import Any, Iterator, Optional

import oneflow as flow
import pytest
from helpers import Line, quiet_trainer
from oneflow.utils.data import DataLoader, Dataset, IterableDataset

from ofengine import DataError

BAD = 6
"""The sample that cannot be had; of two a batch it is in batch 3."""


class Broken(ValueError):
    pass


class Samples(Dataset):
    def __init__(self, error: Any = Broken) -> None:
        self.error = error

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        if index == BAD and self.error is not None:
            raise self.error
        return flow.ones(2) * index


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return (Samples()[index] for index in range(12))


def generator() -> Iterator[Any]:
    for index in range(0, 12, 2):
        yield flow.stack([Samples()[index], Samples()[index + 1]])


class Own:
    """Batches of a class of the user's own, with a length."""

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Any]:
        return generator()


class AllSteps(Line):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch)


KINDS = {
    "map": lambda: DataLoader(Samples(), batch_size=2),
    "map, workers": lambda: DataLoader(Samples(), batch_size=2, num_workers=2),
    "stream": lambda: DataLoader(Stream(), batch_size=2),
    "stream, workers": lambda: DataLoader(Stream(), batch_size=2, num_workers=1),
    "generator": generator,
    "own": Own,
}
GOOD = [flow.ones(2, 2)] * 2


def fails(verb: str, data: Any, error: Any, caplog: Any, task: Any = None, **options: Any) -> str:
    """What is logged of the error that ``verb`` raises over ``data``."""
    trainer = quiet_trainer(max_epochs=1, num_sanity_val_steps=0, **options)
    task = task or AllSteps()
    with caplog.at_level(logging.ERROR, "ofengine"), pytest.raises(error):
        if verb == "fit":
            trainer.fit(task, data)
        elif verb == "validation":
            trainer.fit(task, GOOD, data)
        else:
            getattr(trainer, verb)(task, data)
    return "\n".join(each.getMessage() for each in caplog.records)


def without_line(text: str) -> str:
    """``text`` without the user's line, which is not there where a worker raised."""
    return re.sub(r", at \S*test_batch_told.py:\d+: `raise .*`(?=\.$)", "", text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", ["fit", "validation", "validate", "test", "predict"])
def test_a_batch_that_cannot_be_had_is_told(
    verb: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    loaders = {"fit": "train", "validate": "val", "validation": "val"}
    text = fails(verb, KINDS[kind](), Broken, caplog)
    samples = " (samples 6, 7)" if kind.startswith("map") else ""
    told = f"the dataloader raised Broken in batch 3 of {loaders.get(verb, verb)}_dataloader"
    assert text.startswith(told + samples)
    # Where the length is not known, a batch is read ahead.
    steps = 3 if kind.startswith("map") or kind == "own" else 2
    in_fit = {
        "fit": f", in epoch 0 (after step {steps})",
        "validation": ", in epoch 0 (after step 2)",
    }
    assert without_line(text) == told + samples + in_fit.get(verb, "") + "."


@pytest.mark.parametrize("kind", ["map, workers", "generator"])
def test_so_it_is_within_a_window(kind: str, caplog: pytest.LogCaptureFixture, mode: str) -> None:
    text = fails("fit", KINDS[kind](), Broken, caplog, mode=mode, accumulate_grad_batches=4)
    assert "in batch 3 of train_dataloader" in text


def test_so_it_is_where_a_few_batches_are_held(caplog: pytest.LogCaptureFixture) -> None:
    text = fails("fit", KINDS["map"](), Broken, caplog, overfit_batches=5)
    assert "in batch 3 of train_dataloader (samples 6, 7)" in text


def test_a_pass_that_cannot_be_begun_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Never:
        def __iter__(self) -> Iterator[Any]:
            raise Broken

    text = fails("fit", Never(), Broken, caplog)
    told = "the dataloader raised Broken in batch 0 of train_dataloader, in epoch 0"
    assert without_line(text) == f"{told} (after step 0)."


def test_an_end_by_accident_tells_its_batch(caplog: pytest.LogCaptureFixture) -> None:
    loader = DataLoader(Samples(StopIteration()), batch_size=2)
    with pytest.raises(DataError, match=r"raised StopIteration at .*, in batch 3, which would end"):
        quiet_trainer(max_epochs=1).fit(Line(), loader)


def test_a_step_of_an_evaluation_tells_its_own_batch(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(AllSteps):
        def on_validation_batch_end(
            self, outputs: Any, batch: Any, batch_idx: int, *_: Any
        ) -> None:
            if batch_idx == 4:
                raise Broken

    data = [flow.ones(2, 2)] * 6
    text = fails("validation", data, Broken, caplog, Fails(), mode=mode)
    told = "Fails.on_validation_batch_end raised Broken in batch 4 of val_dataloader"
    assert without_line(text) == f"{told}, in epoch 0 (after step 2)."
    caplog.clear()
    text = fails("validate", data, Broken, caplog, Fails(), mode=mode)
    assert without_line(text) == f"{told}."


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_that_runs_out_while_loading_is_told(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    loader = DataLoader(Samples(MemoryError()), batch_size=2, num_workers=workers)
    text = fails("fit", loader, MemoryError, caplog)
    at = "in batch 3 of train_dataloader (samples 6, 7), in epoch 0 (after step 3). "
    assert text.startswith(f"memory ran out {at}Take smaller batches")


def test_memory_that_runs_out_in_a_step_is_told_with_the_shapes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Fails(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                raise RuntimeError("Error: allocate failed")  # as OneFlow says it
            return super().training_step(batch, batch_idx)

    data = [flow.ones(2, 2), flow.ones(7, 2)]
    text = fails("fit", data, RuntimeError, caplog, Fails())
    at = "memory ran out in epoch 0, batch 1 (after step 1): the batch holds [7, 2] float32. "
    assert text.startswith(at)


# ---------------------------------------------------------------------- no sample


@pytest.mark.parametrize("verb", ["fit", "validation", "test", "predict"])
def test_a_batch_without_samples_is_an_error_that_names_it(
    verb: str, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    empty: Optional[Any] = flow.ones(0, 2)
    data = [flow.ones(2, 2), empty, flow.ones(2, 2)]
    trainer = quiet_trainer(mode=mode, max_epochs=1, num_sanity_val_steps=0)
    loader = {"fit": "train", "validation": "val"}.get(verb, verb)
    at = " in epoch 0" if verb == "fit" else ""
    with pytest.raises(DataError) as error:
        if verb == "fit":
            trainer.fit(AllSteps(), data)
        elif verb == "validation":
            trainer.fit(AllSteps(), GOOD, data)
        else:
            getattr(trainer, verb)(AllSteps(), data)
    told = f"batch 1 of {loader}_dataloader{at} holds no sample ([0, 2] float32): leave it out"
    assert str(error.value).startswith(told)
