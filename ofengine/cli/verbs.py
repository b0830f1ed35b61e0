"""`ofengine fit FILE.py:Task`, and validate, test, predict: a run on the command line alone."""

from __future__ import annotations

import contextlib
import importlib.util
import shlex
import sys
import warnings
from typing import Any, Callable, Dict, Iterator, List, Optional

from ofengine.cli.given import SECTIONS
from ofengine.cli.tasks import report_errors
from ofengine.errors import ConfigurationError, DataError
from ofengine.tables import as_text

NEEDED = "jsonargparse[signatures]>=4.40.2,<5"
"""As the extra ``cli`` in setup.cfg has it."""
AS_MADE = "none"
"""The ``ckpt_path`` that leaves the weights as the task makes them."""


def run_verb(verb: str, text: str, argv: List[str]) -> int:
    """Carry out ``ofengine VERB``, which ``text`` describes.

    The exit status is 0, 2 where nothing has begun, else 1.
    """
    if lacks_extra(verb):
        return 2
    ready: List[Callable[[], int]] = []
    status = report_errors(verb, lambda: _prepare(verb, text, argv, ready), failed=2)
    if status != 0 or not ready:
        return status
    try:
        return report_errors(verb, ready[0])
    except KeyboardInterrupt:
        print(f"ofengine {verb}: stopped by Ctrl-C.", file=sys.stderr)
        return 130


def lacks_extra(what: str) -> bool:
    """True, and a sentence, where ``ofengine WHAT`` needs jsonargparse, which is not there."""
    if importlib.util.find_spec("jsonargparse") is not None:
        return False
    print(
        f'ofengine {what} needs jsonargparse: pip install "{NEEDED}", the extra "cli".',
        file=sys.stderr,
    )
    return True


def _prepare(verb: str, text: str, argv: List[str], ready: List[Callable[[], int]]) -> int:
    """Put into ``ready`` what is to be done, where it is more than to print something."""
    from ofengine.cli import checked, given, kept
    from ofengine.cli.verb_help import help_of

    # jsonargparse looks through all subclasses there are, and one whose module is gone is no news.
    warnings.filterwarnings("ignore", r"\s*Hit failing import")
    told = given.read_given(argv)
    owners = checked.find_owners(told)
    if "help" in told.flags:
        print(help_of(verb, text, checked.make_parser(verb, owners), owners))
        return 0
    if "task" not in owners:
        raise ConfigurationError(f"there is no task: {given.how_to_name('task', verb)}.")
    run = checked.check(verb, told, owners)
    config = kept.config_of(verb, told, run)
    if "print_config" in told.flags:
        print(config, end="")
        return 0
    if verb != "fit" and run.arguments.ckpt_path is None:
        raise ConfigurationError(
            "whose weights? Add --ckpt_path FILE, --ckpt_path last for the newest checkpoint, or "
            f"--ckpt_path {AS_MADE} for those that the task is made with."
        )
    keep = kept.KeepConfig(config, shlex.join(["ofengine", verb, *argv]))
    ready.append(_made(verb, run, keep))
    return 0


def _made(verb: str, run: Any, keep: Any) -> Callable[[], int]:
    """The run, made of its parts; what remains is to start it."""
    from ofengine.callbacks import PredictionWriter
    from ofengine.trainer import Trainer

    made = run.seeded()
    arguments: Dict[str, Any] = made["trainer"]
    callbacks = arguments.pop("callbacks") or []
    callbacks = [*callbacks] if isinstance(callbacks, (list, tuple)) else [callbacks]
    if verb == "predict" and not any(isinstance(each, PredictionWriter) for each in callbacks):
        callbacks.append(PredictionWriter())
    if verb != "fit" and arguments["max_epochs"] is None:
        arguments["max_epochs"] = -1  # it is not asked for, so that nothing need be said of it
    trainer = Trainer(callbacks=[*callbacks, keep], **arguments)
    parts = {section: run.make(section, made) for section in SECTIONS}
    ckpt_path: Optional[str] = run.arguments.ckpt_path
    if verb == "fit":
        rates = run.arguments.rates_on_resume
        return lambda: _fit(trainer, parts, keep, ckpt_path, rates)
    return lambda: _evaluate(verb, trainer, parts, ckpt_path)


def _fit(
    trainer: Any, parts: Dict[str, Any], keep: Any, ckpt_path: Optional[str], rates: str
) -> int:
    options: Dict[str, Any] = {"ckpt_path": ckpt_path, "rates_on_resume": rates}
    with data_is_an_option():
        trainer.fit(parts["task"], datamodule=parts["data"], **options)
    if keep.path is not None:
        trainer.print(f"The run is in {keep.path.parent}")
    return 0


@contextlib.contextmanager
def data_is_an_option() -> Iterator[None]:
    """Where there is no data, say what to write here: a verb has no second argument."""
    try:
        yield
    except DataError as error:
        text = str(error).replace(
            "pass a dataloader as its second argument", "add --data FILE.py:Module"
        )
        raise DataError(text) from error


def _evaluate(verb: str, trainer: Any, parts: Dict[str, Any], ckpt_path: Optional[str]) -> int:
    from ofengine.callbacks import PredictionWriter

    options: Dict[str, Any] = {"datamodule": parts["data"]}
    options["ckpt_path"] = None if ckpt_path == AS_MADE else ckpt_path
    if verb == "predict":
        with data_is_an_option():
            trainer.predict(parts["task"], return_predictions=False, **options)
        for each in trainer.callbacks:
            if isinstance(each, PredictionWriter):
                trainer.print(f"The predictions are in {each.folder}")
        return 0
    with data_is_an_option():
        metrics: List[Dict[str, float]] = getattr(trainer, verb)(parts["task"], **options)
    trainer.print(_table(metrics))
    return 0


def _table(metrics: List[Dict[str, float]]) -> str:
    """The metrics of each dataloader, side by side."""
    names = list(dict.fromkeys(name for each in metrics for name in each))
    if not names:
        return "No metric was logged."
    alone = len(metrics) == 1
    header = ["metric", *("value" if alone else f"loader {n}" for n in range(len(metrics)))]
    rows = [
        [name, *(f"{each[name]:.6g}" if name in each else "" for each in metrics)] for name in names
    ]
    return "\n".join(as_text(header, rows))
