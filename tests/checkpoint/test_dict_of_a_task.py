"""The dict that ``on_save_checkpoint`` and ``on_load_checkpoint`` of a task are handed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import oneflow as flow
import pytest
from helpers import Line, quiet_trainer

from ofengine import CheckpointError, ConfigurationError
from ofengine.checkpoint import read
from ofengine.run.lightning_methods import CHECKPOINT_KEYS

WAYS = {
    "read": lambda checkpoint, key: checkpoint[key],
    "get": lambda checkpoint, key: checkpoint.get(key),
    "pop": lambda checkpoint, key: checkpoint.pop(key, None),
    "delete": lambda checkpoint, key: checkpoint.__delitem__(key),
}


class Keeping(Line):
    """Does something with the dict when it is saved, and when it is handed back."""

    def __init__(self, save: Callable[[Any], Any], load: Callable[[Any], Any] = len) -> None:
        super().__init__()
        self.save, self.load = save, load

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        self.save(checkpoint)

    def on_load_checkpoint(self, checkpoint: Any) -> None:
        self.load(checkpoint)


def saved(task: Keeping, mode: str, folder: Path) -> Path:
    trainer = quiet_trainer(mode=mode, max_epochs=1)
    trainer.fit(task, [flow.ones(2, 2)])
    return trainer.save_checkpoint(folder / "saved.safetensors")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("key", CHECKPOINT_KEYS)
def test_a_key_of_lightning_s_is_one_sentence(key: str, way: str, tmp_path: Path) -> None:
    said = rf'checkpoint\["{key}"\] is Lightning\'s.*: .* (itself|themselves): (ask|leave it out)'
    with pytest.raises(ConfigurationError, match=said):
        saved(Keeping(lambda checkpoint: WAYS[way](checkpoint, key)), "eager", tmp_path)
    path = saved(Keeping(len), "eager", tmp_path)
    resuming = Keeping(len, lambda checkpoint: WAYS[way](checkpoint, key))
    with pytest.raises(ConfigurationError, match=said):
        quiet_trainer().validate(resuming, [flow.ones(2, 2)], ckpt_path=path)
    with pytest.raises(CheckpointError, match=said):
        quiet_trainer(max_epochs=2).fit(resuming, [flow.ones(2, 2)], ckpt_path=path)


def test_it_is_a_plain_dict_for_everything_else(mode: str, tmp_path: Path) -> None:
    def save(checkpoint: Any) -> None:
        with pytest.raises(KeyError, match="mine"):
            checkpoint["mine"]
        assert checkpoint.get("mine", 3) == checkpoint.pop("mine", 3) == 3
        checkpoint["epoch"] = 7
        checkpoint["mine"] = {"a": [checkpoint["epoch"], checkpoint.pop("epoch")]}

    back = []
    task = Keeping(save, back.append)
    path = saved(task, mode, tmp_path)
    state = read(path).state
    assert state is not None
    assert state["task"] == {"mine": {"a": [7, 7]}}
    quiet_trainer(mode=mode, max_epochs=2).fit(task, [flow.ones(2, 2)], ckpt_path=path)
    assert back == [{"mine": {"a": [7, 7]}}]
