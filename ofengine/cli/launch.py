"""`ofengine launch --nproc N train.py`: the ranks of a program on this host."""

from __future__ import annotations

import argparse
import os
import sys
from typing import List

from ofengine.errors import ConfigurationError, OFEngineError
from ofengine.launch import start_ranks


def launch(arguments: argparse.Namespace) -> int:
    """Start the ranks and wait for their end; return 0, or what the first to fail ended with."""
    try:
        return start_ranks(
            _command(arguments),
            arguments.nproc,
            nodes=arguments.nnodes,
            node_rank=arguments.node_rank,
            master_addr=arguments.master_addr,
            master_port=arguments.master_port,
            hang_timeout=arguments.hang_timeout,
            show_all=arguments.show_all,
        )
    except OFEngineError as error:
        print(f"ofengine launch: {error}", file=sys.stderr)
        return 1


def _command(arguments: argparse.Namespace) -> List[str]:
    """The program, in the interpreter that this one runs in."""
    program, python = arguments.program, [sys.executable]
    if program is None:
        raise ConfigurationError("name the program: a Python file, or a module with -m.")
    if arguments.module:
        return [*python, "-m", program, *arguments.arguments]
    if not os.path.exists(program):
        raise ConfigurationError(f"there is no file {program}; with -m it is a module.")
    return [*python, program, *arguments.arguments]
