"""What ``ofengine rates`` and ``ofengine prove`` work on: by their own options, or those of a run.

Their own are read by argparse alone. Where options of a run are given, or a config file, all are
read as ``ofengine fit`` reads them, which needs the extra ``cli``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any, Callable, Collection, Dict, List, NamedTuple, Optional, Tuple

from ofengine.cli.given import FLAGS, OWN, SECTIONS, Given, how_to_name, read_given
from ofengine.cli.tasks import instance_of, key_and_value, load_task, report_errors
from ofengine.cli.verbs import lacks_extra
from ofengine.data_module import DataModule
from ofengine.errors import ConfigurationError
from ofengine.task import TaskModule
from ofengine.trainer import Trainer

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Arguments of a Trainer that keeps nothing and shows nothing."""


class Asked(NamedTuple):
    """What a command works on."""

    path: Path
    """The file of the task."""
    task: TaskModule
    trainer: Trainer
    data: Optional[DataModule]
    own: Dict[str, Any]
    """What the command itself takes, such as ``steps``."""


class Command:
    """A command about a task and the run that it would be."""

    name = ""
    of_trainer: Tuple[str, ...] = ()
    """Those of its own options that are arguments of the Trainer."""

    def assumed(self, named: Collection[str]) -> Dict[str, Any]:
        """Arguments of the Trainer where neither a config file nor those ``named`` tell them."""
        return {}

    def settle(self, trainer: Dict[str, Any], own: Dict[str, Any]) -> None:
        """Set what the command needs among the Trainer's arguments."""

    def show(self, asked: Asked) -> int:
        """Do it; return the exit status."""
        raise NotImplementedError

    # ------------------------------------------------------------------ its own options alone

    def carry_out(self, arguments: argparse.Namespace) -> int:
        """Do what ``arguments`` ask for.

        The exit status is that of :meth:`show`, 2 where an option cannot be read, else 1 after an
        error.
        """
        if arguments.task is not None and not arguments.of_run:
            return report_errors(self.name, lambda: self.show(self._by_own(arguments)))
        ready: List[Callable[[], Asked]] = []
        if self._needs_extra(arguments):
            return 2
        status = report_errors(self.name, lambda: self._read(arguments, ready), failed=2)
        if status != 0 or not ready:
            return status
        return report_errors(self.name, lambda: self.show(ready[0]()))

    def _by_own(self, arguments: argparse.Namespace) -> Asked:
        given = _given(arguments)
        own = {
            name.partition(".")[2]: given.get(name.partition(".")[2], default)
            for name, (_, default) in OWN[self.name].items()
        }
        told = {name: given[name] for name in self.of_trainer if name in given}
        path, cls = load_task(arguments.task)
        task = instance_of(path, cls, arguments.arg)
        return self._asked(path, task, None, {**self.assumed(list(told)), **told}, own)

    def _asked(
        self,
        path: Path,
        task: TaskModule,
        data: Optional[DataModule],
        trainer: Dict[str, Any],
        own: Dict[str, Any],
    ) -> Asked:
        self.settle(trainer, own)
        return Asked(path, task, Trainer(**{**trainer, **QUIET}), data, own)

    # ------------------------------------------------------------------ and those of a run

    def _needs_extra(self, arguments: argparse.Namespace) -> bool:
        """True, and a sentence, where something of a run is given and jsonargparse is not there."""
        if not arguments.of_run:
            return False
        option = _first(arguments)
        section = option.lstrip("-").replace("-", "_").partition(".")[0]
        of_run = section in (*SECTIONS, "trainer", "config", *FLAGS)
        return of_run and lacks_extra(f"{self.name} {option}")

    def _read(self, arguments: argparse.Namespace, ready: List[Callable[[], Asked]]) -> int:
        """Put into ``ready`` what makes the task and the rest, where a config is not all."""
        no_task = f"there is no task: {how_to_name('task', self.name)}."
        if not arguments.of_run:
            raise ConfigurationError(no_task)
        if importlib.util.find_spec("jsonargparse") is None:
            raise ConfigurationError(f"there is no option {_first(arguments)}: see --help.")
        from ofengine.cli import checked, kept

        given = self._all_given(arguments)
        owners = checked.find_owners(given)
        if "task" not in owners:
            raise ConfigurationError(no_task)
        run = checked.check(self.name, given, owners)
        if "print_config" in given.flags:
            print(kept.config_of(self.name, given, run), end="")
            return 0
        ready.append(lambda: self._by_run(run))
        return 0

    def _all_given(self, arguments: argparse.Namespace) -> Given:
        """The options of both kinds, of which those of the run come last, and win."""
        words = [arguments.task] if arguments.task is not None else []
        given = read_given([*words, *arguments.of_run])
        own = _given(arguments)
        options = {f"trainer.{name}": own[name] for name in self.of_trainer if name in own}
        for name in OWN[self.name]:
            if name.partition(".")[2] in own:
                options[name] = own[name.partition(".")[2]]
        options.update((f"task.{key}", each) for key, each in map(key_and_value, arguments.arg))
        if not any(word.partition("=")[0] == "--config" for word in arguments.of_run):
            named = [*options, *(name for name, _ in given.options)]
            assumed = self.assumed([name.partition(".")[2] for name in named])
            options = {**{f"trainer.{name}": each for name, each in assumed.items()}, **options}
        given.options[:0] = [(name, _text(name, value)) for name, value in options.items()]
        return given

    def _by_run(self, run: Any) -> Asked:
        """The task, its data and the Trainer, made as ``fit`` makes them."""
        run.arguments["trainer.logger"] = False  # some begin to log as soon as they are made
        made = run.seeded()
        task, data = (run.make(section, made) for section in SECTIONS)
        own = vars(run.arguments[self.name])
        return self._asked(run.owners["task"].path, task, data, made["trainer"], own)


def _given(arguments: argparse.Namespace) -> Dict[str, Any]:
    """The options of the command itself that were given."""
    return {name: value for name, value in vars(arguments).items() if value not in (None, [])}


def _first(arguments: argparse.Namespace) -> str:
    """The first option of a run."""
    option: str = arguments.of_run[0].partition("=")[0]
    return option


def _text(name: str, value: Any) -> str:
    """A value as jsonargparse reads it."""
    import yaml

    if isinstance(value, str):
        return value
    try:
        json.dumps(value)
    except TypeError:
        raise ConfigurationError(
            f"--arg: {name} is {value!r}, which cannot be given beside options of a run: give a "
            "number, a text, a list or a dict."
        ) from None
    text: str = yaml.safe_dump(value, default_flow_style=True)
    return text.partition("\n...")[0].strip()
