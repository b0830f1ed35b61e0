"""What one process and several ranks train, to be compared bit for bit.

Run as a program, one rank goes through all of the cases and writes down what it got.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any, Dict, List

import cases_of_batches  # noqa: F401  each adds its cases
import cases_of_checkpoints  # noqa: F401
import cases_of_decisions  # noqa: F401
import oneflow as flow
from rank_basics import CASES, Place, Result


def run_case(name: str, place: Place) -> Result:
    place.folder.mkdir(parents=True, exist_ok=True)
    flow.manual_seed(0)
    return CASES[name](place)


def main(folder: Path, names: List[str]) -> None:
    from ofengine.launch.environment import read

    world = read()
    assert world is not None
    results: Dict[str, Any] = {}
    for name in names:
        place = Place(world.world_size, False, folder / "ranks" / name, folder)
        results[name] = run_case(name, place)
    (folder / f"results_{world.rank}.pickle").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3:])
