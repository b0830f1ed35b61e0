"""The profiler: what is timed, that it adds up, and that it is gone where nobody asks for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
from helpers import Line, batches, bits, quiet_trainer

from ofengine import Callback, ConfigurationError
from ofengine.callbacks import ModelCheckpoint, Throughput
from ofengine.loggers import CSVLogger
from ofengine.run import profile as module
from ofengine.run.profile import Profile


@pytest.fixture(autouse=True)
def _every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short runs have all their rows in the table."""
    monkeypatch.setattr(module, "_LEAST_SHARE", 0.0)


class Clock:
    """A second for each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_what_is_timed_within_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "perf_counter", Clock())
    profile = Profile()  # second 1
    inner = profile.wrap("inner", lambda: None)
    outer = profile.wrap("outer", lambda: [inner(), inner()])
    outer()  # 2 to 7, the inner ones 3 to 4 and 5 to 6
    profile.finish()  # 8
    rows = {name: (row.calls, row.seconds, row.longest) for name, row in profile.rows.items()}
    assert rows == {"inner": (2, 2.0, 1.0), "outer": (1, 3.0, 5.0)}
    assert profile.seconds == 7.0
    assert profile.events == [("inner", 2.0, 1.0), ("inner", 4.0, 1.0), ("outer", 1.0, 5.0)]
    table = [line.split() for line in profile.text("It").splitlines()]
    assert ["outer", "1", "3.000", "42.9%", "3000.000", "5000.000"] in table
    assert ["everything", "else", "1", "2.000", "28.6%", "2000.000", "2000.000"] in table


def test_what_takes_little_shares_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST_SHARE", 0.1)
    profile = Profile()
    seconds = {"long": 8.0, "b": 0.5, "a": 0.75, "tenth": 1.0}
    profile.rows = {name: module.Row(2, each, each / 2) for name, each in seconds.items()}
    profile.seconds = 10.0
    *_, long, tenth, others, rest = [
        each.split() for each in profile.text("It").splitlines() if each
    ]
    assert [long[0], tenth[0]] == ["long", "tenth"]
    assert others == ["2", "others", "4", "1.250", "12.5%", "312.500", "375.000"]
    assert rest[:4] == ["everything", "else", "1", "0.000"]


def test_an_error_is_timed_and_passes_through() -> None:
    profile = Profile()

    def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        profile.wrap("fails", fails)()
    assert list(profile.iterate("three", iter(range(3)))) == [0, 1, 2]
    assert {name: row.calls for name, row in profile.rows.items()} == {"fails": 1, "three": 4}


class Own(Callback):
    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, i: int) -> None:
        pass


def profiled(mode: str, folder: Path, **arguments: Any) -> Any:
    trainer = quiet_trainer(
        mode=mode, max_epochs=2, profiler="simple", logger=CSVLogger(folder), log_every_n_steps=1,
        callbacks=[Own(), ModelCheckpoint()], **arguments,
    )  # fmt: skip
    trainer.fit(Line(), batches(3), batches(1))
    return trainer


def test_a_fit_says_where_its_time_went(mode: str, tmp_path: Path, capsys: Any) -> None:
    trainer = profiled(mode, tmp_path)
    rows = trainer.profile.rows
    calls = {name: row.calls for name, row in rows.items()}
    assert calls["step: training"] == calls["hook: Own.on_train_batch_end"] == 6
    assert calls["step: evaluation"] == 3  # the sanity check's, too
    assert calls["data: train_dataloader"] == 8  # and the end, twice
    assert calls["logging: CSVLogger"] > 6 and calls["waiting: metrics read"] >= 6
    assert calls["checkpoint: taking the content"] >= 2
    assert sum(row.seconds for row in rows.values()) <= trainer.profile.seconds
    printed = capsys.readouterr().out
    assert "Profile of fit:" in printed and "hook: Own.on_train_batch_end" in printed
    trace = json.loads((Path(trainer.log_dir) / "fit-trace.json").read_text())["traceEvents"]
    assert len([each for each in trace if each["name"] == "step: training"]) == 6
    assert all(each["ph"] == "X" and each["dur"] >= 0 for each in trace)


def test_other_verbs_and_no_file_is_written_over(mode: str, tmp_path: Path) -> None:
    trainer = quiet_trainer(mode=mode, profiler="simple", default_root_dir=tmp_path)
    for _ in range(2):
        trainer.validate(Line(), batches(2))
        assert trainer.profile.rows["data: val_dataloader"].calls == 3
    names = sorted(each.name for each in tmp_path.iterdir())
    assert names == ["validate-trace-1.json", "validate-trace.json"]


def test_it_changes_no_bit_and_takes_itself_away(mode: str, tmp_path: Path) -> None:
    plain, watched = Line(), Line()
    watched.load_state_dict(plain.state_dict())
    quiet_trainer(mode=mode, max_epochs=2).fit(plain, batches(3))
    trainer = quiet_trainer(mode=mode, max_epochs=2, profiler="simple", default_root_dir=tmp_path)
    trainer.fit(watched, batches(3))
    assert bits(plain) == bits(watched)
    assert "save_checkpoint" not in vars(trainer)
    assert all("log_metrics" not in vars(each) for each in trainer.loggers)


def test_without_one_nothing_of_it_is_called(mode: str) -> None:
    called: List[str] = []

    def watch(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename == module.__file__:
            called.append(frame.f_code.co_name)

    for profiler in (None, "simple"):
        trainer = quiet_trainer(mode=mode, max_epochs=1, callbacks=Own(), profiler=profiler)
        sys.setprofile(watch)
        try:
            trainer.fit(Line(), batches(3), batches(1))
        finally:
            sys.setprofile(None)
        assert bool(called) is (profiler is not None)
        assert (trainer.profile is None) is (profiler is None)


def test_a_profile_after_an_error_is_told(mode: str, tmp_path: Path, capsys: Any) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("no")

    trainer = quiet_trainer(
        mode=mode, max_epochs=1, profiler="simple", callbacks=Fails(), default_root_dir=tmp_path
    )
    with pytest.raises(RuntimeError, match="no"):
        trainer.fit(Line(), batches(3))
    assert "hook: Fails.on_train_batch_end" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["advanced", True, Profile])
def test_another_profiler_is_told(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"profiler=.*use one of \['simple'\]"):
        quiet_trainer(profiler=wrong)


# ---------------------------------------------------------------------- Throughput


def test_throughput_counts_what_was_done(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ofengine.callbacks import throughput

    monkeypatch.setattr(throughput, "perf_counter", Clock())
    logged: List[Dict[str, float]] = []

    class Sees(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            names = ("samples", "batches", "tokens")
            found = [f"throughput/{each}_per_second" for each in names]
            values = trainer.callback_metrics
            if found[0] in values:
                logged.append({name[11:-11]: values[name] for name in found})

    speed = Throughput(tokens=lambda batch: batch.numel())
    trainer = quiet_trainer(
        mode=mode, max_epochs=1, log_every_n_steps=3, callbacks=[speed, Sees()],
        val_check_interval=4,
    )  # fmt: skip
    trainer.fit(Line(), batches(7), batches(1))
    # The first batch is left out. Second 1: its end. Second 2: after batches 1 and 2. Second 3: a
    # new beginning; 4 and 5: around the validation behind batch 3; 6: after batches 3 to 5.
    assert logged[0] == {"samples": 4.0, "batches": 2.0, "tokens": 8.0}
    assert logged[-1] == {"samples": 3.0, "batches": 1.5, "tokens": 6.0}


def test_what_counts_nothing_is_told() -> None:
    with pytest.raises(ConfigurationError, match=r"Throughput\(tokens=3\): give a function"):
        Throughput(tokens=3)  # type: ignore[arg-type]
