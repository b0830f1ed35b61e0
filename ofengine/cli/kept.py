"""The config of a run: what ``--print_config`` prints, and what each run keeps in its folder."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional

import yaml
from jsonargparse import get_loader, set_dumper

import ofengine
from ofengine.callback import Callback
from ofengine.cli.checked import Checked, arguments_of
from ofengine.cli.given import OWN, Given
from ofengine.disk import claim_version, give_name, temporary_file
from ofengine.errors import ConfigurationError, said_by
from ofengine.run.view import RunView
from ofengine.task import TaskModule


def config_of(verb: str, given: Given, checked: Checked) -> str:
    """Every argument of the run with its value, as a config file that gives the same run."""
    content = _with_files(_plain(checked), checked.files)
    ordered: Dict[str, Any] = {}
    for section, name in given.classes.items():
        ordered[section] = {"class_path": name, "init_args": content.get(section) or {}}
    for name in ("trainer", *OWN[verb]):
        name = name.partition(".")[0]
        ordered[name] = content[name]
    return yaml.dump(ordered, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _plain(checked: Checked) -> Dict[str, Any]:
    """All arguments as texts, numbers, lists and dicts."""
    kept: List[Dict[str, Any]] = []

    def keep(content: Dict[str, Any]) -> str:
        kept.append(content)
        return ""

    set_dumper("ofengine", keep)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of defaults that no file can hold
        try:
            checked.parser.dump(checked.arguments, format="ofengine", skip_unset=False)
        except (TypeError, ValueError):  # before jsonargparse 4.50 it has another name
            checked.parser.dump(checked.arguments, format="ofengine", skip_none=False)
    for section in checked.owners:
        held = vars(checked.arguments.get(section) or argparse.Namespace())
        dumped = kept[0].get(section) or {}
        for name, value in list(dumped.items()):
            dumped[name] = _with_keys(value, held.get(name))
        for name in checked.left_alone(section):
            dumped.pop(name, None)
    _check_same(checked, kept[0])
    return kept[0]


def _check_same(checked: Checked, dumped: Dict[str, Any]) -> None:
    """Raise where an argument would be another one when it is read again."""
    parser, text = checked.parser, yaml.safe_dump(dumped, default_style='"')
    try:
        again = parser.parse_args([f"--config={text}"])
    except argparse.ArgumentError as error:
        raise ConfigurationError(
            "what this run was given would not be read again from its config file: "
            f"{said_by(error)}."
        ) from None
    for name in [action.dest for action in arguments_of(parser)]:
        one, other = (repr(each.get(name)) for each in (checked.arguments, again))
        if one != other:
            raise ConfigurationError(
                f"{name} is {one}, and would be read again as {other} from the run's config file: "
                "give a value that is read as it is written."
            )


def _with_keys(dumped: Any, held: Any) -> Any:
    """A dict that was dumped, whose keys have become texts, with the keys that it had."""
    if not isinstance(dumped, dict) or not isinstance(held, dict):
        return dumped
    same = [str(key) for key in held] == list(dumped)
    return dict(zip(held, dumped.values())) if same else dumped


def _with_files(value: Any, files: Dict[str, str]) -> Any:
    """``value``, in which the class of a module that is a file is ``FILE.py:Name`` again."""
    if isinstance(value, list):
        return [_with_files(each, files) for each in value]
    if not isinstance(value, dict):
        return value
    value = {key: _with_files(each, files) for key, each in value.items()}
    module, _, name = str(value.get("class_path", "")).rpartition(".")
    if module in files:
        value["class_path"] = f"{files[module]}:{name}"
    return value


class _Dumper(yaml.SafeDumper):
    """Writes texts so that jsonargparse reads them as texts: to it, 1e-3 is a number."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        plain = get_loader("yaml")(text) == text
    except yaml.YAMLError:
        plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)


class KeepConfig(Callback):
    """Writes the config into the run's folder before the run begins.

    That is the ``log_dir``, or where the run has no logger, a folder of its own in
    ``default_root_dir``. A file that is there is never written over: a resumed run that was told
    the same leaves it as it is, and one that was told something else writes ``config-v1.yaml``.
    """

    rank_zero_only = True

    def __init__(self, config: str, command: str) -> None:
        self.config = config
        self.header = f"# ofengine {ofengine.__version__}: {command}\n# in {os.getcwd()}\n"
        self.path: Optional[Path] = None
        """Where it was written."""

    def setup(self, trainer: RunView, task: TaskModule, stage: str) -> None:
        """Write it."""
        if trainer.fast_dev_run:
            return
        root = Path(trainer.default_root_dir)
        try:
            folder = Path(trainer.log_dir or claim_version(root / "ofengine_logs"))
            self.path = self._write(folder)
        except OSError as error:
            raise ConfigurationError(
                f"the run's config cannot be written below {root}: {error.strerror or error}. Give "
                "a --trainer.default_root_dir that can be written to."
            ) from error

    def _write(self, folder: Path) -> Path:
        with temporary_file(folder) as (file, temporary):
            file.write((self.header + self.config).encode("utf-8"))
            file.flush()
            for number in itertools.count():
                path = folder / ("config.yaml" if number == 0 else f"config-v{number}.yaml")
                try:
                    give_name(temporary, path)
                except FileExistsError:
                    if self._says_the_same(path):
                        return path
                    continue
                return path
        raise AssertionError("not reached")

    def _says_the_same(self, path: Path) -> bool:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return False
        return re.sub(r"^#.*\n", "", text, flags=re.MULTILINE) == self.config
