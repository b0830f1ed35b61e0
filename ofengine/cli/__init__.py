"""The command line: `ofengine COMMAND` or `python -m ofengine COMMAND`."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Callable, Dict, List, Optional

import ofengine

VERBS = {
    "fit": "train a task",
    "validate": "run the validation of a task over its data, and print the metrics",
    "test": "run the test of a task over its data, and print the metrics",
    "predict": "write what a task predicts to files",
}
"""The Trainer's verbs."""
OTHERS = {
    "doctor": "say whether training can run on this machine, and how to mend what is missing",
    "rates": "show every parameter group's learning rate over a run, without training",
    "prove": "run a task in both modes, whole and resumed, and say whether every bit is the same",
    "checkpoint": "verify a checkpoint and print what is in it, executing nothing of it",
    "set-lr": "give parameter groups of a run that is training other base rates, from its next "
    "step on",
    "launch": "run a program as several ranks, which all end where one does",
}
_OF_FIT = """\
With the extra cli, the options of a run too, as ofengine fit FILE.py:TASK --help lists them:
--task.NAME, --data.NAME and --trainer.NAME VALUE, --data FILE.py:MODULE, and --config FILE such as
the config.yaml of a run; --print_config prints the config of all that is given."""


def main(argv: Optional[List[str]] = None) -> int:
    """Run one command; return the exit status of the process."""
    words = sys.argv[1:] if argv is None else argv
    command, rest = (words[0], words[1:]) if words else ("", [])
    if command in VERBS:
        from ofengine.cli.verbs import run_verb

        return run_verb(command, VERBS[command], rest)
    if command in OTHERS:
        return _OF_OTHERS[command](rest)
    parser = argparse.ArgumentParser(
        prog="ofengine",
        description="A trainer engine for OneFlow.",
        epilog="ofengine COMMAND --help tells of a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"ofengine {ofengine.__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND [OPTIONS]", dest="command", required=True
    )
    for name, text in {**VERBS, **OTHERS}.items():
        commands.add_parser(name, help=text)
    parser.parse_args(words)  # ends with what --help or --version show, or with an error
    return 2


def _parser(command: str, config: bool = False) -> argparse.ArgumentParser:
    """A parser of a command's own options: jsonargparse's, and Python's without the extra.

    With ``config`` jsonargparse's also has ``--config FILE`` and ``--print_config``.
    """
    arguments: Any = {
        "prog": f"ofengine {command}",
        "description": OTHERS[command],
        "formatter_class": argparse.HelpFormatter,
    }
    try:
        import jsonargparse
    except ImportError:
        return argparse.ArgumentParser(**arguments)
    parser = jsonargparse.ArgumentParser(**arguments)
    if config:
        help_text = "a YAML file of these options; those given here win"
        parser.add_argument("--config", action="config", metavar="FILE", help=help_text)
    return parser


# One function a command, which imports what it needs only when it is called: `ofengine doctor`
# must work where OneFlow cannot be imported.


def _doctor(words: List[str]) -> int:
    _parser("doctor").parse_args(words)
    from ofengine.cli.doctor import doctor

    return doctor()


def _rates(words: List[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ofengine rates", description=OTHERS["rates"], epilog=_OF_FIT
    )
    add = parser.add_argument
    add("task", metavar="FILE.py:TASK", nargs="?", help="the file and the TaskModule in it")
    add("--mode", choices=("eager", "graph"), help="the rates are the same in both")
    add("--steps-per-epoch", type=_count, metavar="N", help="optimizer steps in an epoch; "
        "default: the length of the task's train_dataloader")  # fmt: skip
    add("--max-epochs", type=_count, metavar="N", help="default: 1, or any with --max-steps; that "
        "of the Trainer with --config")  # fmt: skip
    add("--max-steps", type=_count, metavar="N", help="optimizer steps in all")
    add("--at", type=int, nargs="+", default=[], action="extend", metavar="STEP",
        help="show the rates at these steps too, counted from 0")  # fmt: skip
    add("--plot", metavar="FILE", help="write the picture as .png, .svg or .pdf")
    add("--arg", default=[], action="append", metavar="KEY=VALUE",
        help="an argument of the task; the value is read as Python, else as a text")  # fmt: skip
    arguments = _apart(parser, words)
    from ofengine.cli.rates import rates

    return rates(arguments)


def _prove(words: List[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ofengine prove", description=OTHERS["prove"], epilog=_OF_FIT
    )
    add = parser.add_argument
    add("task", metavar="FILE.py:TASK", nargs="?", help="the file and the TaskModule in it, which "
        "gives the data by its train_dataloader")  # fmt: skip
    add("--steps", type=_count, metavar="N", help="optimizer steps of a run; default: 20")
    add("--device", help="auto, cpu, cuda or cuda:N")
    add("--devices", type=_count, metavar="N", help="compare so many ranks with one process that "
        "accumulates, instead of both modes")  # fmt: skip
    add("--accumulate-grad-batches", type=_count, metavar="N", help="default: 1")
    add("--gradient-clip-val", type=float, metavar="X", help="default: no clipping")
    add("--seed", type=int, metavar="N", help="default: 0")
    add("--arg", default=[], action="append", metavar="KEY=VALUE",
        help="an argument of the task; the value is read as Python, else as a text")  # fmt: skip
    arguments = _apart(parser, words)
    from ofengine.cli.prove import prove

    return prove(arguments)


def _apart(parser: argparse.ArgumentParser, words: List[str]) -> argparse.Namespace:
    """A command's own options; those of a run, which jsonargparse reads, as ``of_run``."""
    from ofengine.cli.given import taken_apart

    own = [each for action in parser._actions for each in action.option_strings]
    kept, of_run = taken_apart(words, own)
    arguments = parser.parse_args(kept)
    arguments.of_run = of_run
    return arguments


def _checkpoint(words: List[str]) -> int:
    parser = _parser("checkpoint")
    parser.add_argument("file", metavar="FILE", help="the file that was saved")
    parser.add_argument("--tensors", action="store_true", help="list every weight")
    arguments = parser.parse_args(words)
    from ofengine.cli.checkpoint import checkpoint

    return checkpoint(arguments)


def _set_lr(words: List[str]) -> int:
    parser = _parser("set-lr")
    add = parser.add_argument
    add("folder", metavar="RUN", help="the run's folder, such as ofengine_logs/version_0")
    add("rates", metavar="NAME=RATE", nargs="+", help="a group and its rate; all=RATE for those "
        "that are not named")  # fmt: skip
    add("--wait", type=_seconds, default=10.0, metavar="S", help="seconds to wait for the step; "
        "default: 10")  # fmt: skip
    add("--no-wait", action="store_true", help="leave the request to the run, whose log tells")
    arguments = parser.parse_args(words)
    from ofengine.cli.set_lr import set_lr

    return set_lr(arguments)


def _launch(words: List[str]) -> int:
    parser = _parser("launch", config=True)
    add = parser.add_argument
    add("--nproc", type=_count, required=True, metavar="N", help="ranks on this host")
    add("--nnodes", type=_count, default=1, metavar="M", help="hosts, each with as many ranks; "
        "default: 1")  # fmt: skip
    add("--node-rank", type=int, default=0, metavar="R", help="which of them this is, from 0 on")
    add("--master-addr", default="127.0.0.1", metavar="A", help="the address of node 0, the same "
        "on all nodes")  # fmt: skip
    add("--master-port", type=int, metavar="P", help="a free port of node 0; default: any with "
        "one node, 29500 with several")  # fmt: skip
    add("--hang-timeout", type=_seconds, default=300.0, metavar="S", help="seconds after which a "
        "rank that shows no sign of work hangs, 0 for never; default: 300")  # fmt: skip
    add("--show-all", action="store_true", help="show what ranks other than 0 write, too, with "
        "the rank before each line")  # fmt: skip
    add("-m", dest="module", action="store_true", help="the program is a module, as in python -m")
    add("program", nargs="?", help="a Python file, or a module with -m")
    add("arguments", nargs=argparse.REMAINDER, help="the program's own")
    arguments = parser.parse_args(words)
    from ofengine.cli.launch import launch

    return launch(arguments)


_OF_OTHERS: Dict[str, Callable[[List[str]], int]] = {
    "doctor": _doctor,
    "rates": _rates,
    "prove": _prove,
    "checkpoint": _checkpoint,
    "set-lr": _set_lr,
    "launch": _launch,
}


class NotTaken(argparse.ArgumentTypeError, ValueError):
    """A value that is refused: the one is what argparse shows, the other what jsonargparse does."""


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise NotTaken(f"{text} is no whole number") from None
    if number < 1:
        raise NotTaken(f"{text} is below 1")
    return number


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise NotTaken(f"{text} is no number of seconds") from None
