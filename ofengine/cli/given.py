"""What a run was told on the command line and in config files, before any of it is checked.

The words of ``ofengine fit TASK --trainer.max_epochs 3 --config run.yaml`` become names and
values; the files become the same names and values; a later file wins over an earlier one, and an
option over all files, wherever it stands.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Collection, Dict, List, Optional, Tuple

import attrs

from ofengine.disk import open_regular
from ofengine.errors import ConfigurationError, said_by

SHORT = ("mode", "device", "devices", "max_epochs", "seed")
"""Arguments of the Trainer that need no ``trainer.`` before them on the command line."""
FLAGS = ("help", "print_config")
SECTIONS = ("task", "data")
"""What has a class of the user's; and ``trainer``."""
_WEIGHTS: Dict[str, Tuple[Any, Any]] = {"ckpt_path": (Optional[str], None)}
OWN: Dict[str, Dict[str, Tuple[Any, Any]]] = {
    "fit": {**_WEIGHTS, "rates_on_resume": (str, "checkpoint")},
    "validate": _WEIGHTS,
    "test": _WEIGHTS,
    "predict": _WEIGHTS,
    "rates": {
        "rates.steps_per_epoch": (Optional[int], None),
        "rates.at": (List[int], []),
        "rates.plot": (Optional[str], None),
    },
    "prove": {"prove.steps": (int, 20)},
}
"""What a command itself takes, besides trainer, task and data: each one's type and default."""
_OF_COMMANDS = {name.partition(".")[0] for own in OWN.values() for name in own if "." in name}


@attrs.frozen
class Value:
    """A value that a config file gives an argument, and which file that is."""

    value: Any
    file: str


@attrs.frozen
class Config:
    """What one config file says."""

    file: str
    classes: Dict[str, str]
    """As :attr:`Given.classes`."""
    values: Dict[str, Any]
    """By name, such as ``trainer.max_epochs``."""


@attrs.define
class Given:
    """All that a run was told; a name is an option's without its dashes."""

    options: List[Tuple[str, str]] = attrs.Factory(list)
    """(name, text) of each option, in their order."""
    flags: List[str] = attrs.Factory(list)
    classes: Dict[str, str] = attrs.Factory(dict)
    """The class of each of ``SECTIONS``, as ``FILE.py:Name``."""
    values: Dict[str, Value] = attrs.Factory(dict)
    """What the config files say, by name."""

    def where(self, name: str) -> str:
        """How ``name`` was given, as the beginning of a sentence."""
        told = [text for option, text in self.options if option.rstrip("+") == name]
        if told:
            return f"--{name} {told[-1]}"
        if name in self.values:
            return f"{self.values[name].file}: {name}: {self.values[name].value!r}"
        return f"--{name}"


def read_given(argv: List[str]) -> Given:
    """What ``argv`` and the config files that it names say.

    Raises:
        ConfigurationError: a word is no option, an option has no value, or a file is no config.
    """
    words, options, flags = _split(argv)
    if len(words) > 1:
        raise ConfigurationError(
            f"{words[1]!r} is one word too many after {words[0]!r}: options begin with --."
        )
    given = Given(flags=flags)
    configs = [read_config(text) for name, text in options if name == "config"]
    given.options = [(name, text) for name, text in options if name not in ("config", "data")]
    named = {"task": words, "data": [text for name, text in options if name == "data"]}
    for section in SECTIONS:
        in_files = [each.classes[section] for each in configs if section in each.classes]
        for name in [*in_files, *named[section]][-1:]:
            given.classes[section] = name
    for config in configs:
        for name, value in config.values.items():
            if not _is_of_another_class(name, config, given):
                given.values[name] = Value(value, config.file)
    return given


def how_to_name(section: str, command: str) -> str:
    """How the task or the data module of a run is named."""
    if section == "task":
        return f"write ofengine {command} FILE.py:Task, or name it in a config file"
    return "add --data FILE.py:Module, or name it in a config file"


def _is_of_another_class(name: str, config: Config, given: Given) -> bool:
    """True for an argument of a class that is not the one that the run has."""
    section = name.partition(".")[0]
    if section not in config.classes:
        return False
    return _plain(config.classes[section]) != _plain(given.classes[section])


def _plain(name: str) -> str:
    file, colon, cls = name.rpartition(":")
    return os.path.normpath(file) + colon + cls


# ---------------------------------------------------------------------- the words


def taken_apart(words: List[str], own: Collection[str]) -> Tuple[List[str], List[str]]:
    """The words that argparse reads, and the options of a run with their values.

    Args:
        words: what follows the command.
        own: the options of the command itself, which may be shortened, and written with ``_``.
    """
    kept: List[str] = []
    of_run: List[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, text = word.partition("=")
        dashed = name.replace("_", "-")
        if not re.match("--?[A-Za-z]", word):
            kept.append(word)
        elif any(each.startswith(dashed) for each in own):
            kept.append(dashed + equals + text)
        else:
            of_run.append(word)
            is_flag = dashed.lstrip("-").replace("-", "_") in FLAGS
            if not equals and not is_flag and left and not left[0].startswith("--"):
                of_run.append(left.pop(0))
    return kept, of_run


def _split(argv: List[str]) -> Tuple[List[str], List[Tuple[str, str]], List[str]]:
    """Words without dashes, options with their values, flags."""
    words: List[str] = []
    options: List[Tuple[str, str]] = []
    flags: List[str] = []
    left = list(argv)
    while left:
        word = left.pop(0)
        if word == "-h":
            word = "--help"
        if not word.startswith("-"):
            words.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or not name:
            raise ConfigurationError(f"{word} is no option: options begin with two dashes.")
        if name in FLAGS:
            if equals:
                raise ConfigurationError(f"--{name} takes no value.")
            flags.append(name)
            continue
        if not equals:
            if not left or left[0].startswith("--"):
                raise ConfigurationError(f"{word} needs a value: write {word}=VALUE.")
            text = left.pop(0)
        options.append((f"trainer.{name}" if name in SHORT else name, text))
    return words, options, flags


# ---------------------------------------------------------------------- the files


def read_config(file: str) -> Config:
    """What a config file says.

    The class of ``task`` and of ``data`` is their ``class_path``; their arguments are in
    ``init_args`` beside it, or directly in them. A ``FILE.py`` is looked for beside the config
    file, else in the current folder.

    Raises:
        ConfigurationError: there is no such file, or it is no YAML of names and values.
    """
    config = Config(file, {}, {})
    for name, value in _located(_load(file), Path(file).parent).items():
        if name in SECTIONS:
            _read_section(config, name, value)
        elif name == "config":
            raise ConfigurationError(
                f"{file}: config: a config file names no other: give --config several times."
            )
        elif name == "trainer" or name in _OF_COMMANDS:
            for argument, each in _names(file, name, value).items():
                config.values[f"{name}.{argument}"] = each
        else:
            config.values[name] = value
    return config


def _load(file: str) -> Dict[str, Any]:
    import yaml
    from jsonargparse import get_loader

    try:
        with open_regular(Path(file)) as opened:
            text = opened.read().decode("utf-8")
    except FileNotFoundError:
        raise ConfigurationError(f"there is no config file {file}.") from None
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise ConfigurationError(f"{file} is no text in UTF-8: {error}.") from None
    try:
        content = get_loader("yaml")(text) if text.strip() else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = file if mark is None else f"{file}, line {mark.line + 1}"
        raise ConfigurationError(
            f"{where}: this is no YAML: {getattr(error, 'problem', None) or said_by(error)}."
        ) from None
    if isinstance(content, str):  # how the loader reads names that have no values
        content = dict.fromkeys([line.rstrip(": ") for line in text.split("\n") if line.strip()])
    return _names(file, "the file", content)


def _located(value: Any, folder: Path) -> Any:
    """``value``, in which each class of a file that is in ``folder`` is named with its way."""
    if isinstance(value, list):
        return [_located(each, folder) for each in value]
    if isinstance(value, dict):
        return {
            key: _way(each, folder)
            if key in ("class_path", *SECTIONS) and isinstance(each, str)
            else _located(each, folder)
            for key, each in value.items()
        }
    return value


def _way(name: str, folder: Path) -> str:
    file, colon, cls = name.rpartition(":")
    beside = folder / file
    return f"{beside}{colon}{cls}" if file.endswith(".py") and beside.is_file() else name


def _names(file: str, what: str, value: Any) -> Dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ConfigurationError(
            f"{file}: {what} is {value!r}: write names and values, name: value."
        )
    return value


def _read_section(config: Config, section: str, value: Any) -> None:
    """``task`` or ``data`` of a config file."""
    content = _names(
        config.file, section, {"class_path": value} if isinstance(value, str) else value
    )
    if "class_path" in content or "init_args" in content:
        beside = sorted(set(content) - {"class_path", "init_args"})
        if beside:
            raise ConfigurationError(
                f"{config.file}: {section} has {', '.join(beside)} beside class_path and "
                "init_args: put it into init_args."
            )
        named = content.get("class_path")
        if not isinstance(named, (str, type(None))):
            raise ConfigurationError(
                f"{config.file}: {section}.class_path is {named!r}: write FILE.py:Name."
            )
        if named is not None:
            config.classes[section] = named
        content = _names(config.file, f"{section}.init_args", content.get("init_args"))
    for argument, each in content.items():
        config.values[f"{section}.{argument}"] = each
