"""PredictionWriter: every prediction is in a file, under its name, and no file is written over."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import oneflow as flow
import pytest
from helpers import Line, numbered_batches, quiet_trainer
from oneflow.utils.data import DataLoader

from ofengine import ConfigurationError
from ofengine.callbacks import PredictionWriter


class Predicts(Line):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return {"twice": batch * 2, "parts": [batch[:, 0], (batch + 1)], "a/../b": batch.sum()}


def read(path: Path) -> Dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def predicted(
    mode: str, writer: PredictionWriter, task: Any = None, data: Any = None, **kw: Any
) -> Any:
    trainer = quiet_trainer(mode=mode, callbacks=writer)
    return trainer.predict(task or Predicts(), data or numbered_batches(3), **kw)


def test_one_file_of_each_loader_has_all_batches(mode: str, tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path)
    loaders = [DataLoader(numbered_batches(3)), DataLoader(numbered_batches(2, 10))]

    class Flat(Line):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return {"sums": batch.reshape(-1, 2).sum(dim=1), "first": batch.reshape(-1)[0]}

    predicted(mode, writer, Flat(), loaders)
    assert writer.folder == tmp_path / "version_0"
    first, second = (read(writer.folder / f"loader_{number}.npz") for number in (0, 1))
    assert first["sums"].tolist() == [0.0, 2.0, 4.0]
    assert first["first"].tolist() == [0.0, 1.0, 2.0]
    assert second["sums"].tolist() == [20.0, 22.0]
    assert sorted(each.name for each in writer.folder.iterdir()) == ["loader_0.npz", "loader_1.npz"]


def test_one_file_of_each_batch(mode: str, tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path, write_interval="batch")
    returned = predicted(mode, writer, return_predictions=False)
    assert returned == []
    files = sorted((tmp_path / "version_0" / "loader_0").iterdir())
    assert [each.name for each in files] == [f"batch_00000{number}.npz" for number in range(3)]
    arrays = read(files[2])
    assert set(arrays) == {"twice", "parts.0", "parts.1", "a_.._b"}
    assert arrays["twice"].tolist() == [[4.0, 4.0]]
    assert arrays["parts.0"].tolist() == [2.0]
    assert arrays["a_.._b"].tolist() == 4.0


def test_a_prediction_alone_is_called_predictions(mode: str, tmp_path: Path) -> None:
    class Alone(Line):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch[:, 0]

    returned: List[Any] = predicted(mode, PredictionWriter(tmp_path), Alone())
    assert read(tmp_path / "version_0" / "loader_0.npz")["predictions"].tolist() == [0.0, 1.0, 2.0]
    assert [float(each.numpy()[0]) for each in returned] == [0.0, 1.0, 2.0]


def test_each_predict_has_a_folder_of_its_own(mode: str, tmp_path: Path) -> None:
    (tmp_path / "version_1").mkdir()
    (tmp_path / "version_1" / "loader_0.npz").write_text("another run's")
    writer = PredictionWriter(tmp_path)
    for version in (0, 2):
        predicted(mode, writer, data=numbered_batches(1))
        assert writer.folder == tmp_path / f"version_{version}"
    assert (tmp_path / "version_1" / "loader_0.npz").read_text() == "another run's"


def test_by_default_it_writes_below_the_trainer_s_folder(tmp_path: Path) -> None:
    writer = PredictionWriter()
    trainer = quiet_trainer(callbacks=writer, default_root_dir=tmp_path)
    trainer.predict(Predicts(), numbered_batches(1))
    assert writer.folder == tmp_path / "predictions" / "version_0"


def test_other_verbs_write_nothing(tmp_path: Path) -> None:
    quiet_trainer(callbacks=PredictionWriter(tmp_path), max_epochs=1).fit(
        Line(), numbered_batches(1), numbered_batches(1)
    )
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- mistakes


class Returns(Line):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.make(batch)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda batch: {"x": object()}, "predict_step returned a object, which no file"),
        (lambda batch: {"a/b": batch, "a_b": batch}, "two predictions are called 'a_b'"),
        (
            lambda batch: flow.ones(1, int(batch[0, 0].numpy()) + 1),
            "'predictions' cannot be put one",
        ),
        (lambda batch: {str(int(batch[0, 0].numpy())): batch}, "predictions of other names"),
    ],
)
def test_what_cannot_be_written_is_told(make: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=says):
        predicted("eager", PredictionWriter(tmp_path), Returns(make))


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"PredictionWriter cannot write .*file"):
        predicted("eager", PredictionWriter(tmp_path / "file"))


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ConfigurationError, match="write_interval"):
        PredictionWriter(write_interval="step")
    with pytest.raises(ConfigurationError, match="NUL"):
        PredictionWriter("a\0b")
