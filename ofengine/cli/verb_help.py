"""The help of fit, validate, test and predict, in the form of that of the other commands."""

from __future__ import annotations

import argparse
import re
from typing import Any, Dict, List, Mapping

import jsonargparse

from ofengine.cli.checked import Owner, arguments_of
from ofengine.cli.given import OWN, SHORT
from ofengine.cli.hints import hint_of, in_a_word

_EPILOG = """\
Each option may be in a config file, as what --print_config prints; so may callbacks and loggers,
each with its class_path and init_args. Options win over files, and a later file over an earlier
one."""
_OWN = {
    "rates_on_resume": "whose rates count where those of the checkpoint and of the code differ: "
    "checkpoint or config (default: checkpoint)",
}
_CKPT_PATH = {
    True: "a checkpoint of a run, which goes on as if it had never stopped, or last for the newest",
    False: "the checkpoint whose weights are used, last for the newest, none for those that the "
    "task is made with",
}


class _Formatter(argparse.HelpFormatter):
    """Says a value's placeholder once, and puts texts below their options, whose names are long."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=8)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {action.metavar}"


def help_of(
    verb: str, text: str, parser: jsonargparse.ArgumentParser, owners: Mapping[str, Owner]
) -> str:
    """The help text; without a task it shows what any task can be given."""
    shown = argparse.ArgumentParser(
        prog=f"ofengine {verb}",
        usage=f"ofengine {verb} FILE.py:TASK [--config FILE] [--NAME VALUE] ...",
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=_EPILOG,
        add_help=False,
        formatter_class=_Formatter,
    )
    add = shown.add_argument_group("the run").add_argument
    add("task", metavar="FILE.py:TASK", help="the TaskModule and its file, or package.module:TASK")
    add("--data", metavar="FILE.py:MODULE", help="the DataModule, where the task has no loaders")
    add("--config", metavar="FILE", help="a config file; may be given several times")
    add("--print_config", action="store_true", help="print the config of this run, and run nothing")
    for name in OWN[verb]:
        add(f"--{name}", metavar="TEXT", help=_OWN.get(name) or _CKPT_PATH[verb == "fit"])
    add(
        "-h", "--help", action="store_true", help="show this help; after a task, with its arguments"
    )
    for section in ("task", "data", "trainer"):
        if section in owners:
            _add_arguments(shown, section, parser, owners[section])
    return shown.format_help().rstrip()


def _add_arguments(
    shown: argparse.ArgumentParser, section: str, parser: jsonargparse.ArgumentParser, owner: Owner
) -> None:
    group = shown.add_argument_group(f"arguments of {owner.cls.__name__}")
    described = {each.dest: each for each in arguments_of(parser, section)}
    for dest, action in described.items():
        name = dest.partition(".")[2]
        short = [f"--{name}"] if section == "trainer" and name in SHORT else []
        group.add_argument(
            *short,
            f"--{dest}",
            metavar=in_a_word(hint_of(owner.cls, name)),
            help=_described(name, action, described).replace("%", "%%"),
        )


def _described(name: str, action: Any, others: Dict[str, Any]) -> str:
    """What the docstring says of the argument, and its default."""
    text = _plain(action.help)
    if not text:
        mention = re.compile(rf"\b{re.escape(name)}\b")
        named: List[str] = [d for d, each in others.items() if mention.search(_plain(each.help))]
        text = f"see {named[0].partition('.')[2]}" if named else ""
    if re.search(r"\bDefault: ", text) or action.default is argparse.SUPPRESS:
        return text
    default = action.default
    if default is None or isinstance(default, bool):
        default = {True: "true", False: "false", None: "null"}[default]
    return f"{text} (default: {default})".strip()


def _plain(text: Any) -> str:
    """A docstring's text without marks."""
    plain = re.sub(r":\w+:`[~.\w]*?(\w+)`", r"\1", text if isinstance(text, str) else "")
    return " ".join(plain.replace("``", "").split()).rstrip(".")
