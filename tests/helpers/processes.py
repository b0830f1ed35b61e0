"""Python in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

_WITHOUT_CORE = ["/bin/sh", "-c", 'ulimit -c 0; exec "$@"', "sh"]


def run_python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments to its end, and keep what it writes, as text.

    It has no stdin unless told otherwise, and leaves no core file where a test lets it crash.

    Args:
        arguments: a script and its arguments, or ``-c`` and a program.
        options: those of :func:`subprocess.run`.
    """
    stdin = {} if "input" in options else {"stdin": subprocess.DEVNULL}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    command = [*_WITHOUT_CORE, sys.executable, *map(str, arguments)]
    return subprocess.run(command, **{**stdin, **pipes, **options})
