"""Each mistake on the command line of a run is one sentence, before anything has begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ofengine import Callback
from ofengine.cli import main

OPTIONS = [
    ("", "there is no task: write ofengine fit FILE.py:Task, or name it in a config file."),
    ("absent.py:Net", "there is no file absent.py: write FILE.py:Task or package.module:Task."),
    ("nowhere.at_all:Net", "there is no module nowhere.at_all: write FILE.py:Task or"),
    ("nets.py", "'nets.py' names no task: "),
    ("nets.py:Nut", "nets.py has no class Nut: its tasks are Net, Wide, Raises."),
    ("nets.py:Rows", "Rows of nets.py is a class but no TaskModule: "),
    ("nets.py:Net --data nets.py:Net", "Net of nets.py is a class but no DataModule: "),
    ("nets.py:Net --data nets.py:Row", "has no class Row: its data modules are Rows."),
    ("nets.py:Net more", "'more' is one word too many after 'nets.py:Net'"),
    ("nets.py:Net -x 3", "-x is no option: options begin with two dashes."),
    ("nets.py:Net --seed", "--seed needs a value: write --seed=VALUE."),
    ("nets.py:Net --mode --seed 3", "--mode needs a value: write --mode=VALUE."),
    ("nets.py:Net --print_config=yes", "--print_config takes no value."),
    ("nets.py:Net --width 3", "no option 'width': did you mean task.width?"),
    ("nets.py:Net --max_epoch 3", "no option 'max_epoch': did you mean trainer.max_epochs?"),
    ("nets.py:Net --confg a.yaml", "no option 'confg': did you mean config?"),
    ("nets.py:Net --task.widht 3", "Net has no argument 'widht': did you mean task.width?"),
    ("nets.py:Net --task.x.y 3", "Net has no argument 'x.y': use one of task.width, task.rate"),
    ("nets.py:Net --trainer.max_epoch 3", "no argument 'max_epoch': did you mean trainer.max_epo"),
    ("nets.py:Net --trainer.nothing 3", "Trainer has no argument 'nothing': see --help."),
    ("nets.py:Net --trainer.accelerator gpu", "Trainer has no argument 'accelerator': write dev"),
    ("nets.py:Net --data.batch_size 3", "there is no data module: add --data FILE.py:Module, or"),
    ("nets.py:Wide", "Wide needs width: add --task.width VALUE."),
    ("nets.py:Raises", "Raises() raised ValueError: no such thing."),
    ("nets.py:Net --task.width 3.5", "--task.width 3.5: give a whole number."),
    ("nets.py:Net --task.width many", "--task.width many: give a whole number."),
    ("nets.py:Net --task.rate fast", "--task.rate fast: give a number."),
    ("nets.py:Net --task.sizes [a]", "--task.sizes [a]: give a list of which each is a whole num"),
    ("nets.py:Net --max_epochs three", "--trainer.max_epochs three: give a whole number or null."),
    ("nets.py:Net --trainer.sync_batchnorm 7", "--trainer.sync_batchnorm 7: give true or false."),
    ("nets.py:Net --trainer.max_epochs.x 3", "--trainer.max_epochs"),
    ("nets.py:Net --mode grpah", "mode='grpah': use one of ['eager', 'graph']."),
    ("nets.py:Net --device tpu", "tpu"),
    ("nets.py:Net --rates_on_resume no", "rates_on_resume='no': use one of ['checkpoint', 'confi"),
    ("nets.py:Net --seed -1", "seed=-1: give a whole number from 0 on, or null."),
    ("nets.py:Net --trainer.max_time 5", "max_time='5': write it as"),
    ("nets.py:Net --trainer.callbacks+=Early", "there is no Callback 'Early': "),
    ("nets.py:Net --trainer.callbacks+=EarlyStopping", "EarlyStopping needs monitor in its init_a"),
    (
        "nets.py:Net --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitr=x",
        "EarlyStopping has no argument 'monitr': did you mean monitor?",
    ),
    ("nets.py:Net --trainer.logger CSVLoger", "there is no Logger 'CSVLoger': did you mean CSVLo"),
    ("nets.py:Net --config absent.yaml", "there is no config file absent.yaml."),
    ("nets.py:Net --config nets.py", "nets.py, line "),
]

FILES = [
    ("a: [", "run.yaml, line 2: this is no YAML: "),
    ("- a", "run.yaml: the file is ['a']: write names and values, name: value."),
    ("just a text", "has no option 'just a text': "),
    ("trainer: 3", "run.yaml: trainer is 3: write names and values, name: value."),
    ("trainer: {max_epoch: 3}", "run.yaml: trainer.max_epoch: 3: Trainer has no argument"),
    ("trainer: {max_epochs: three}", "run.yaml: trainer.max_epochs: 'three': give a whole number"),
    ("model: {width: 3}", "run.yaml: model: {'width': 3}: ofengine fit has no option 'model'"),
    ("task: {width: x}", "run.yaml: task.width: 'x': give a whole number."),
    ("task: {init_args: {width: x}}", "run.yaml: task.width: 'x': give a whole number."),
    ("task: {class_path: 3}", "run.yaml: task.class_path is 3: write FILE.py:Name."),
    ("task: {class_path: nets.py:Net, width: 3}", "run.yaml: task has width beside class_path"),
    ("trainer: {callbacks: [{class_path: Early}]}", "run.yaml: there is no Callback 'Early'"),
    ("trainer: {callbacks: [{clas_path: Timer}]}", "describes no Callback: write its class_path"),
    ("trainer: {callbacks: [{class_path: nets.py:Count}]}", "nets.py has no class Count"),
    (
        "trainer: {callbacks: [{class_path: EarlyStopping, monitor: x}]}",
        "run.yaml: EarlyStopping has monitor beside init_args: put it into init_args.",
    ),
    (
        "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: x, patience: y}}]}",
        "run.yaml: EarlyStopping: patience is 'y': give a whole number.",
    ),
    (
        "trainer: {callbacks: {class_path: EarlyStopping, init_args: {monitor: x, mode: up}}}",
        "mode",
    ),
    ("trainer: {logger: [{class_path: Timer}]}", "there is no Logger 'Timer'"),
]


def sentence_of(capsys: Any, *arguments: str) -> str:
    """What a command that is refused says."""
    assert main(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("ofengine fit: ")
    assert said.err.count("\n") == 1
    assert said.err.rstrip()[-1] in ".?"
    assert not Path("ofengine_logs").exists()
    return str(said.err)


@pytest.mark.parametrize(("arguments", "sentence"), OPTIONS)
def test_on_the_command_line(file: Path, capsys: Any, arguments: str, sentence: str) -> None:
    assert sentence in sentence_of(capsys, "fit", *arguments.split())


@pytest.mark.parametrize(("content", "sentence"), FILES)
def test_in_a_config_file(file: Path, capsys: Any, content: str, sentence: str) -> None:
    Path("run.yaml").write_text(content)
    assert sentence in sentence_of(capsys, "fit", "nets.py:Net", "--config", "run.yaml")


def test_what_is_no_text_is_no_config(file: Path, capsys: Any) -> None:
    Path("run.yaml").write_bytes(b"\xff\xfe")
    said = sentence_of(capsys, "fit", "nets.py:Net", "--config", "run.yaml")
    assert "run.yaml is no text in UTF-8" in said
    assert "cannot be read" in sentence_of(capsys, "fit", "nets.py:Net", "--config", ".")


def test_without_data_it_says_how_to_bring_some(file: Path, capsys: Any) -> None:
    assert main(["fit", "nets.py:Net", "--max_epochs=1"]) == 1
    said = capsys.readouterr().err
    assert said == (
        "ofengine fit: fit has no data: add --data FILE.py:Module, or write "
        "Net.train_dataloader().\n"
    )


def test_a_class_whose_module_is_gone_is_no_news(file: Path, capsys: Any) -> None:
    """Every subclass that the process has is looked through by jsonargparse, whoever made it."""
    gone = type("Gone", (Callback,), {"__module__": "a_package.that_is_gone"})
    assert "there is no Callback" in sentence_of(
        capsys, "fit", "nets.py:Net", "--trainer.callbacks+=Early"
    )
    assert gone in Callback.__subclasses__()
