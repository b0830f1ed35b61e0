"""The command line: `ofengine COMMAND` or `python -m ofengine COMMAND`."""

from __future__ import annotations

import argparse
import sys
from typing import Any, List, Optional

import ofengine

VERBS = {
    "fit": "train a task",
    "validate": "run the validation of a task over its data, and print the metrics",
    "test": "run the test of a task over its data, and print the metrics",
    "predict": "write what a task predicts to files",
}
"""The Trainer's verbs, whose options are read by jsonargparse."""
_OF_FIT = """\
With the extra cli, the options of a run too, as ofengine fit FILE.py:TASK --help lists them:
--task.NAME, --data.NAME and --trainer.NAME VALUE, --data FILE.py:MODULE, and --config FILE such as
the config.yaml of a run; --print_config prints the config of all that is given."""


def main(argv: Optional[List[str]] = None) -> int:
    """Run one command; return the exit status of the process."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in VERBS:
        from ofengine.cli.verbs import run_verb

        return run_verb(words[0], VERBS[words[0]], words[1:])
    parser = argparse.ArgumentParser(
        prog="ofengine",
        description="A trainer engine for OneFlow.",
        epilog="ofengine COMMAND --help tells of a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"ofengine {ofengine.__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND [OPTIONS]", dest="command", required=True
    )
    for verb, text in VERBS.items():
        commands.add_parser(verb, help=text)
    _add_doctor(commands)
    about_runs = {"rates": _add_rates(commands), "prove": _add_prove(commands)}
    _add_checkpoint(commands)
    _add_set_lr(commands)
    _add_launch(commands)
    of_run: List[str] = []
    if words and words[0] in about_runs:
        from ofengine.cli.given import taken_apart

        own = [each for action in about_runs[words[0]]._actions for each in action.option_strings]
        kept, of_run = taken_apart(words[1:], own)
        words = [words[0], *kept]
    arguments = parser.parse_args(words)
    arguments.of_run = of_run
    return int(arguments.run(arguments))


# One function a command. It sets `run`, which imports what it needs only when it is called:
# `ofengine doctor` must work where OneFlow cannot be imported.


def _add_doctor(commands: Any) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from ofengine.cli.doctor import doctor

        return doctor()

    text = "say whether training can run on this machine, and how to mend what is missing"
    commands.add_parser("doctor", help=text, description=text).set_defaults(run=run)


def _add_rates(commands: Any) -> argparse.ArgumentParser:
    def run(arguments: argparse.Namespace) -> int:
        from ofengine.cli.rates import rates

        return rates(arguments)

    text = "show every parameter group's learning rate over a run, without training"
    parser: argparse.ArgumentParser = commands.add_parser(
        "rates", help=text, description=text, epilog=_OF_FIT
    )
    parser.set_defaults(run=run)
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
    return parser


def _add_prove(commands: Any) -> argparse.ArgumentParser:
    def run(arguments: argparse.Namespace) -> int:
        from ofengine.cli.prove import prove

        return prove(arguments)

    text = "run a task in both modes, whole and resumed, and say whether every bit is the same"
    parser: argparse.ArgumentParser = commands.add_parser(
        "prove", help=text, description=text, epilog=_OF_FIT
    )
    parser.set_defaults(run=run)
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
    return parser


def _add_checkpoint(commands: Any) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from ofengine.cli.checkpoint import checkpoint

        return checkpoint(arguments)

    text = "verify a checkpoint and print what is in it, executing nothing of it"
    parser = commands.add_parser("checkpoint", help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("file", metavar="FILE", help="the file that was saved")
    parser.add_argument("--tensors", action="store_true", help="list every weight")


def _add_set_lr(commands: Any) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from ofengine.cli.set_lr import set_lr

        return set_lr(arguments)

    text = "give parameter groups of a run that is training other base rates, from its next step on"
    parser = commands.add_parser("set-lr", help=text, description=text)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("folder", metavar="RUN", help="the run's folder, such as ofengine_logs/version_0")
    add("rates", metavar="NAME=RATE", nargs="+", help="a group and its rate; all=RATE for those "
        "that are not named")  # fmt: skip
    add("--wait", type=float, default=10.0, metavar="S", help="seconds to wait for the step; "
        "default: 10")  # fmt: skip
    add("--no-wait", action="store_true", help="leave the request to the run, whose log tells")


def _add_launch(commands: Any) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from ofengine.cli.launch import launch

        return launch(arguments)

    text = "run a program as several ranks, which all end where one does"
    parser = commands.add_parser("launch", help=text, description=text)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--nproc", type=_count, required=True, metavar="N", help="ranks on this host")
    add("--nnodes", type=_count, default=1, metavar="M", help="hosts, each with as many ranks; "
        "default: 1")  # fmt: skip
    add("--node-rank", type=int, default=0, metavar="R", help="which of them this is, from 0 on")
    add("--master-addr", default="127.0.0.1", metavar="A", help="the address of node 0, the same "
        "on all nodes")  # fmt: skip
    add("--master-port", type=int, metavar="P", help="a free port of node 0; default: any with "
        "one node, 29500 with several")  # fmt: skip
    add("--hang-timeout", type=float, default=300.0, metavar="S", help="seconds after which a "
        "rank that shows no sign of work hangs, 0 for never; default: 300")  # fmt: skip
    add("--show-all", action="store_true", help="show what ranks other than 0 write, too, with "
        "the rank before each line")  # fmt: skip
    add("-m", dest="module", action="store_true", help="the program is a module, as in python -m")
    add("program", help="a Python file, or a module with -m")
    add("arguments", nargs=argparse.REMAINDER, help="the program's own")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number
