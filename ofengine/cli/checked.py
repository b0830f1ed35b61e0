"""What a run was told, checked by jsonargparse against the type hints of what takes it."""

from __future__ import annotations

import argparse
import inspect
import re
import typing
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Type

import jsonargparse
import yaml

import ofengine.callbacks  # noqa: F401 so that its classes can be named without it
from ofengine.callback import Callback
from ofengine.cli.described import why_not_described
from ofengine.cli.given import OWN, SECTIONS, Given, how_to_name
from ofengine.cli.hints import (
    can_be_written,
    default_of,
    hint_of,
    in_words,
    incomparable_of,
    missing_of,
    nearest,
)
from ofengine.cli.tasks import call, load_class, module_of
from ofengine.data.seeding import seed_everything
from ofengine.data_module import DataModule
from ofengine.errors import ConfigurationError, OFEngineError, said_by
from ofengine.loggers import Logger
from ofengine.rates.resume import POLICIES
from ofengine.run.arguments import check_choice, check_count
from ofengine.run.lightning import TRAINER_ARGUMENTS, mend_for
from ofengine.task import TaskModule
from ofengine.trainer import Trainer

SEED = 0
"""The seed of a run that was told none, so that it can be repeated."""
_KINDS = {"task": (TaskModule, "task", "Task"), "data": (DataModule, "data module", "Module")}


class Owner(NamedTuple):
    """A class whose arguments are given: the Trainer, the task, the data module."""

    cls: Type[Any]
    path: Path
    """The file it is in."""


class Checked(NamedTuple):
    """A run that can begin: every argument is there and has the type that it should have."""

    owners: Dict[str, Owner]
    parser: jsonargparse.ArgumentParser
    arguments: Any
    """jsonargparse's Namespace."""
    files: Dict[str, str]
    """The name of each module that a file was run as, and the file."""
    given: List[str]
    """The names of all that was given."""

    def left_alone(self, section: str) -> List[str]:
        """The arguments that were not given and whose defaults no file can hold, such as functions.

        They stay what the code says.
        """
        cls = self.owners[section].cls
        return [
            name
            for name in {each.dest.split(".")[1] for each in arguments_of(self.parser, section)}
            if not any(f"{each}.".startswith(f"{section}.{name}.") for each in self.given)
            and not can_be_written(default_of(cls, name))
        ]

    def seeded(self) -> Dict[str, Dict[str, Any]]:
        """The arguments of each owner, by name, with the objects that config files describe.

        They are made after the seed is set, as what is made of them is.
        """
        seed = self.arguments.trainer.seed
        if seed is not None:
            seed_everything(
                check_count("seed", seed, 0, "a whole number from 0 on, or null", 2**63 - 1)
            )
        # The older name ends with jsonargparse 5, the newer begins with 4.49.
        make = getattr(self.parser, "instantiate", None) or self.parser.instantiate_classes
        try:
            made = make(self.arguments)
        except OFEngineError:
            raise
        except Exception as error:  # of a class that an argument or a config file names
            raise ConfigurationError(
                f"what was asked for cannot be made: {said_by(error)}."
            ) from error
        arguments = {}
        for section in self.owners:
            arguments[section] = vars(made.get(section) or argparse.Namespace())
            for name in self.left_alone(section):
                arguments[section].pop(name, None)
        return arguments

    def make(self, section: str, made: Dict[str, Dict[str, Any]]) -> Any:
        """The task or the data module of these arguments; None where there is none."""
        if section not in self.owners:
            return None
        cls, path = self.owners[section]
        return call(path, f"{cls.__name__}()", lambda: cls(**made[section]))


def find_owners(given: Given) -> Dict[str, Owner]:
    """The Trainer, and the classes of ``task`` and ``data`` as far as they were named.

    Raises :class:`ConfigurationError` where one is not there.
    """
    owners = {"trainer": Owner(Trainer, Path(inspect.getfile(Trainer)))}
    for section, name in given.classes.items():
        path, cls = load_class(name, *_KINDS[section])
        owners[section] = Owner(cls, path)
    return owners


def make_parser(verb: str, owners: Mapping[str, Owner]) -> jsonargparse.ArgumentParser:
    """The parser of all that the verb, the Trainer, the task and the data take."""
    parser = jsonargparse.ArgumentParser(prog=f"ofengine {verb}", exit_on_error=False)
    parser.add_argument("--config", action="config")
    for name, (hint, default) in OWN[verb].items():
        parser.add_argument(f"--{name}", type=hint, default=default)
    for section, owner in owners.items():
        for name in incomparable_of(owner.cls):
            raise ConfigurationError(
                f"{owner.path}: the default of {owner.cls.__name__}'s argument {name} is a tensor "
                "or an array, which no option can be: let it be None, and make it in __init__."
            )
        try:
            parser.add_class_arguments(owner.cls, section, instantiate=False, fail_untyped=False)
        except Exception as error:  # whatever a default or a hint of the user's makes of it
            raise ConfigurationError(
                f"{owner.path}: the arguments of {owner.cls.__name__} cannot be options: "
                f"{said_by(error)}."
            ) from error
    parser.set_defaults({"trainer.seed": SEED})
    return parser


def check(verb: str, given: Given, owners: Dict[str, Owner]) -> Checked:
    """All arguments of the run.

    Raises:
        ConfigurationError: one is not known, has the wrong type, or is missing.
    """
    parser = make_parser(verb, owners)
    known = [action.dest for action in arguments_of(parser)]
    names = [*(name.rstrip("+") for name, _ in given.options), *given.values]
    for name in names:
        _check_name(name, verb, given, owners, known)
    for section, owner in owners.items():
        _check_complete(section, owner, names)
    files: Dict[str, str] = {}
    config: Dict[str, Any] = {}
    for name, value in given.values.items():
        if name in known:
            _put(config, name.split("."), _with_modules(value.value, files))
    # Quoted and tagged, so that every value is read as what it is.
    text = yaml.safe_dump(config, default_style='"')
    try:
        arguments = parser.parse_args(
            [f"--config={text}", *(f"--{name}={text}" for name, text in given.options)]
        )
    except (argparse.ArgumentError, ValueError) as error:
        raise _mended(error, given, owners) from None
    if "rates_on_resume" in OWN[verb]:
        check_choice("rates_on_resume", arguments.rates_on_resume, POLICIES)
    return Checked(owners, parser, arguments, files, names)


def _put(config: Dict[str, Any], way: List[str], value: Any) -> None:
    for part in way[:-1]:
        config = config.setdefault(part, {})
    config[way[-1]] = value


def _with_modules(value: Any, files: Dict[str, str]) -> Any:
    """``value``, in which each ``class_path: FILE.py:Name`` has become that of a module."""
    if isinstance(value, list):
        return [_with_modules(each, files) for each in value]
    if not isinstance(value, dict):
        return value
    value = {key: _with_modules(each, files) for key, each in value.items()}
    named = value.get("class_path")
    if isinstance(named, str) and re.fullmatch(r".+\.py:\w+", named):
        file, _, cls = named.rpartition(":")
        load_class(named, object, "class", "Name")
        module = module_of(Path(file)).__name__
        files[module] = file
        value["class_path"] = f"{module}.{cls}"
    return value


# ---------------------------------------------------------------------- names


def arguments_of(parser: jsonargparse.ArgumentParser, section: str = "") -> List[Any]:
    """The action of each argument, those of one section or all."""
    everyone = {action.dest: action for action in parser._actions}
    return [
        action
        for name, action in everyone.items()
        if name not in ("help", "config", "trainer", *SECTIONS)
        and not (name.endswith(".help") and name.count(".") > 1)
        and name.startswith(f"{section}." if section else "")
    ]


def _check_name(
    name: str, verb: str, given: Given, owners: Mapping[str, Owner], known: List[str]
) -> None:
    """Raise where nothing is called ``name``."""
    if name in known or any(name.startswith(f"{each}.") for each in known):
        return
    everyone_s = {argument for arguments in OWN.values() for argument in arguments}
    if name in everyone_s and name in given.values:
        return  # a config file may be shared by the verbs
    where = given.where(name)
    section, _, argument = name.partition(".")
    if section in _KINDS and argument and section not in owners:
        called = _KINDS[section][1]
        raise ConfigurationError(f"{where}: there is no {called}: {how_to_name(section, verb)}.")
    if section in owners and argument:
        owner = owners[section].cls.__name__
        lightning_s = mend_for(TRAINER_ARGUMENTS, argument) if section == "trainer" else None
        mend = f"{lightning_s}."
        if lightning_s is None:
            own = [each.partition(".")[2] for each in known if each.startswith(f"{section}.")]
            mend = nearest(argument, own, section)
        raise ConfigurationError(f"{where}: {owner} has no argument {argument!r}: {mend}")
    mend = nearest(name, [*known, "config", "data", "task"])
    raise ConfigurationError(f"{where}: ofengine {verb} has no option {name!r}: {mend}")


def _check_complete(section: str, owner: Owner, names: List[str]) -> None:
    """Raise where an argument that has no default is not given."""
    given = [name.split(".")[1] for name in names if name.startswith(f"{section}.")]
    missing = missing_of(owner.cls, given)
    if missing:
        options = " ".join(f"--{section}.{name} VALUE" for name in missing)
        raise ConfigurationError(f"{owner.cls.__name__} needs {', '.join(missing)}: add {options}.")


# ---------------------------------------------------------------------- types


def _mended(error: Exception, given: Given, owners: Mapping[str, Owner]) -> ConfigurationError:
    """What jsonargparse says over several lines, as one sentence about what the user wrote."""
    text = str(error)
    found = re.search(r'arser key "([\w.]+)"', text)
    unknown = re.search(r"[Uu]nrecognized arguments: --([^\s=]+)", text)
    if unknown is not None:
        return ConfigurationError(f"{given.where(unknown.group(1))}: there is no such argument.")
    if found is None or found.group(1) == "config":
        return ConfigurationError(_one_line(error))
    name = found.group(1)
    section, _, argument = name.partition(".")
    hint = hint_of(owners[section].cls, argument) if section in owners else Optional[str]
    where = given.where(name)
    for base in _described_in(hint):
        why = why_not_described(name, base, given)
        if why is not None:
            where = given.values[name].file if name in given.values else f"--{name}"
            return ConfigurationError(f"{where}: {why}")
    return ConfigurationError(f"{where}: give {in_words(hint)}.")


def _described_in(hint: Any) -> List[Type[Any]]:
    """Callback or Logger, where the hint takes such."""
    classes = [hint, *typing.get_args(hint)]
    return [each for each in classes if each in (Callback, Logger)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") + "."
