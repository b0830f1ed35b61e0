"""The launcher as a program of its own: what :func:`~ofengine.launch.launch_self` executes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import List


def main(arguments: List[str]) -> int:
    """Start the ranks that the arguments say: options as JSON, a folder, the command."""
    from ofengine.errors import OFEngineError
    from ofengine.launch import start_ranks

    options, folder, *command = arguments
    os.chdir(folder)
    try:
        return start_ranks(command, **json.loads(options))
    except OFEngineError as error:
        print(f"ofengine: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    # Not this folder, whose modules would be found under wrong names, but that of the package.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.exit(main(sys.argv[1:]))
