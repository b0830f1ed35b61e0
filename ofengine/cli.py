"""The command line: `ofengine COMMAND` or `python -m ofengine COMMAND`."""

from __future__ import annotations

import argparse
from typing import Any, List, Optional

import ofengine


def main(argv: Optional[List[str]] = None) -> int:
    """Run one command; return the exit status of the process."""
    parser = argparse.ArgumentParser(prog="ofengine", description="A trainer engine for OneFlow.")
    parser.add_argument("--version", action="version", version=f"ofengine {ofengine.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    _add_doctor(commands)
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


# One function a command. It sets `run`, which imports what it needs only when it is called:
# `ofengine doctor` must work where OneFlow cannot be imported.


def _add_doctor(commands: Any) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from ofengine.doctor import doctor

        return doctor()

    text = "say whether training can run on this machine, and how to mend what is missing"
    commands.add_parser("doctor", help=text, description=text).set_defaults(run=run)
