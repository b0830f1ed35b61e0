"""What several tests need. Nothing here computes what a test expects of the engine.

``helpers.resuming`` (runs that are saved everywhere and resumed) and ``helpers.tiny`` (the task of
the checkpoints of older versions) are imported by their own names.
"""

from helpers.callbacks import Diary, Notes, Resume
from helpers.data import (
    OfClaimedLength,
    OfUnknownLength,
    batches,
    image_batches,
    numbered_batches,
    random_rows,
    sized,
)
from helpers.errors import first_line, line_of, refused, sentence
from helpers.processes import run_python
from helpers.tasks import Bare, ByStep, Line, MeanLine, Scored, SquaredLine
from helpers.trainers import MODES, quiet_trainer
from helpers.weights import (
    assert_same_arrays,
    assert_same_weights,
    bits,
    fill_deterministically,
    largest_difference,
    weights_of,
)

__all__ = [
    "MODES",
    "Bare",
    "ByStep",
    "Diary",
    "Line",
    "MeanLine",
    "Notes",
    "OfClaimedLength",
    "OfUnknownLength",
    "Resume",
    "Scored",
    "SquaredLine",
    "assert_same_arrays",
    "assert_same_weights",
    "batches",
    "bits",
    "fill_deterministically",
    "first_line",
    "image_batches",
    "largest_difference",
    "line_of",
    "numbered_batches",
    "quiet_trainer",
    "random_rows",
    "refused",
    "run_python",
    "sentence",
    "sized",
    "weights_of",
]
