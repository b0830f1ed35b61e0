"""What the state of a run in a checkpoint looks like, all of it, said once.

A file that an enemy wrote has its checksum right. So nothing of its state is used before
:func:`check_state` found every part to be of its kind, and to go with the others.
"""

from __future__ import annotations

from typing import Any, Dict, Mapping

from ofengine.checkpoint.checks import (
    MOST,
    Check,
    Misfit,
    anything,
    array,
    by_name,
    check_fits,
    flag,
    listed,
    maybe,
    misfit,
    number,
    one_of,
    plain,
    record,
    row,
    text,
    whole,
)
from ofengine.run.precision import FULL, LOSS_SCALES
from ofengine.run.progress import Point
from ofengine.run.windows import Windows

_NEAR = 10_000
"""No noted rate is of a step or position that is further away than this (``rates.resume``)."""
_EPOCHS = 10**7
"""A calendar has an entry for each epoch: a forged number of them must not fill the memory."""
_SEED = 2**64 - 1
_ENDS = (Point.EPOCH_END.value, Point.OVER.value)
_YEAR_9999 = 253_000_000_000
"""In seconds since 1970."""


def _numbered(check: Check) -> Check:
    """A dict of such values by whole numbers, which JSON has as texts."""
    by_text = by_name(check)

    def check_all(value: Any, place: str) -> None:
        by_text(value, place)
        for key in value:
            if not (key.isascii() and key.isdigit() and len(key) < len(str(MOST))):
                raise misfit(f"a key of {place}", key, "a whole number as a text")

    return check_all


def _schedule(value: Any, place: str) -> None:
    """What ``rates.schedule.describe_schedule`` gives, which holds others of its kind."""
    record(
        {"class": text},
        {
            "by_group": listed(maybe(_schedule)),
            "table": listed(number(0)),
            "values": by_name(plain),
            "parts": by_name(listed(_schedule)),
        },
    )(value, place)
    if ("values" in value) != ("parts" in value):
        raise Misfit(f"{place} has 'values' or 'parts' without the other")


_SPEC = record(
    {
        "name": text, "prog_bar": flag, "logger": flag, "on_step": flag, "on_epoch": flag,
        "batch_size": maybe(number(0)), "suffix": text,
    }
)  # fmt: skip
_SUMS = by_name(array("biuf"))
METRICS = record(
    {"known": by_name(number()), "progress_bar": listed(text)},
    {
        "last": listed(row(_SPEC, number())),
        "sums": listed(row(_SPEC, number(), number())),
        "logged": by_name(number()),
        "counted": listed(row(_SPEC, text)),
        "held": by_name(record({"class": text, "training": _SUMS}, {"evaluation": _SUMS})),
    },
)
"""What ``Metrics.state`` gives."""

HISTORY = record(
    {
        "epochs": array("i"), "steps": array("i"),
        "metrics": by_name(record({"rows": array("i"), "values": array("f")})),
    }
)  # fmt: skip
"""What ``History.state`` gives."""

_LOOP = record(
    {
        "point": one_of(*(point.value for point in Point if point is not Point.STEP)),
        "epoch": whole(-1, _EPOCHS),
        "batches_done": whole(),
        "global_step": whole(),
        "batches_seen": whole(),
        "should_stop": flag,
        "cut_short": maybe(METRICS),
        "epoch_length": maybe(whole()),
        "frozen": listed(text),
        "in_eval_mode": listed(text),
    },
    {"half_made": flag, "untold": listed(whole(-1))},
)
GENERATORS = by_name(by_name(anything))
"""The states of generators by their place; each is compared with the generator at that place."""
_PASS = maybe(record({"global": GENERATORS, "data": GENERATORS}))

_GROUP = record(
    {
        "name": text, "lr": number(0), "lr_scale": number(0), "lr_decay_scale": number(0),
        "tensors": whole(), "numbers": whole(), "declares_scale": flag,
    },
    {"parameters": listed(text)},
)  # fmt: skip
_OPTION = _numbered(listed(maybe(number(0))))
_RATES = record(
    {
        "step": whole(),
        "groups": listed(_GROUP),
        "decay": record(
            {
                "every_n_batches": whole(1),
                "per_epoch": flag,
                "key": one_of("lr_decay_scale", "lr_scale"),
            }
        ),
        "schedule": maybe(_schedule),
        "interval": one_of("step", "epoch"),
        "frequency": whole(1),
        "changes": listed(row(whole(), text, number(0))),
        "plateau": maybe(record({"memory": by_name(plain), "lrs": listed(number(0))})),
        "calendar": record({"batches_per_epoch": maybe(whole(1)), "lengths": listed(whole())}),
        "rates": _numbered(listed(number())),
    },
    {
        "last": listed(number()),
        "positions": _numbered(listed(number())),
        "options": record({}, {"weight_decay": _OPTION, "momentum": _OPTION}),
    },
)
STATES = by_name(by_name(array("biuf")))
"""What an optimizer keeps of each parameter."""
_OPTIMIZER = record(
    {"class": text, "steps": whole(), "options": listed(by_name(plain)), "states": STATES}
)
_AT_CUT = record(
    {
        "should_stop": flag,
        "callbacks": listed(maybe(by_name(anything))),
        "task": maybe(by_name(anything)),
        "frozen": listed(text),
        "in_eval_mode": listed(text),
    }
)
"""What ``cut_short.noted_at_cut`` gives; None is what the state itself has."""
_OWNER = {"class": text, "key": text, "arguments": by_name(plain)}
_ANY = by_name(anything)

_STATE = record(
    {
        "loop": _LOOP,
        "metrics": METRICS,
        "random": record(
            {"global": GENERATORS, "data": GENERATORS, "task": GENERATORS},
            {"validation": listed(GENERATORS), "callbacks": listed(GENERATORS)},
        ),
        "random_at_pass": _PASS,
        "gradients": by_name(array("f")),
        "callbacks": listed(
            record({"class": text, "state": _ANY}, {k: _OWNER[k] for k in ("key", "arguments")})
        ),
        "loggers": listed(_ANY),
        "task": _ANY,
        "hparams": _ANY,
        "run": record(
            {
                "id": text,
                "mode": one_of("eager", "graph"),
                "seed": maybe(whole(0, _SEED)),
                "run_seed": whole(0, _SEED),
                "accumulate_grad_batches": whole(1),
                "seconds": number(0),
                "saved_at": number(0, _YEAR_9999),
            },
            {
                "precision": one_of(FULL, *LOSS_SCALES),
                "ranks": whole(1),
                "windows": listed(row(whole(0, _EPOCHS), whole(1))),
            },
        ),
        "versions": by_name(text),
    },
    {
        "at_cut": _AT_CUT,
        "random_at_validation": listed(_PASS),
        "order": maybe(text),
        "data": listed(_ANY),
        "logger_keys": listed(record(_OWNER)),
        "tensors": by_name(array("biuf")),
        "optimizers": by_name(_OPTIMIZER),
        "seen": by_name(text),
        "weights": maybe(record({"batches": whole(1), "total": number(0)})),
        "history": HISTORY,
        "optimizer": _OPTIMIZER,
        "rates": _RATES,
        "several": by_name(
            record({"optimizer": _OPTIMIZER, "rates": _RATES, "every_n_batches": whole(1)})
        ),
    },
)
"""The second dict holds what earlier versions did not keep, and, of a run with one optimizer or
with several, what only one of both has."""


def of_each(state: Mapping[str, Any]) -> Dict[str, Any]:
    """What ``state`` keeps of each optimizer, by name; that of a single one under ""."""
    several: Dict[str, Any] = state.get("several", {"": state})
    return several


def check_state(state: Any, where: str) -> None:
    """Raise :class:`CheckpointError`, which begins with ``where``, unless ``state`` is of a run.

    What depends on the task, its optimizer and its data is not looked at here.
    """
    check_fits(state, _of_a_run, where)


def _of_a_run(state: Any, place: str) -> None:
    _STATE(state, place)
    loop = state["loop"]
    single = {"optimizer", "rates"} & set(state)
    one, more = len(single) == 2 and "several" not in state, not single and state.get("several")
    if not one and not more:
        raise Misfit("the state has neither just 'optimizer' and 'rates', nor just 'several'")
    if loop["epoch"] < 0 and loop["point"] != Point.OVER.value:
        raise misfit("loop/epoch", loop["epoch"], "a whole number from 0 on")
    if loop["epoch_length"] is not None and loop["batches_done"] > loop["epoch_length"]:
        most = f"no more than loop/epoch_length, {loop['epoch_length']},"
        if loop["point"] != Point.BEGIN.value:
            raise misfit("loop/batches_done", loop["batches_done"], most)
    for key, least in (("epoch", 0), ("batches_done", 1), ("global_step", 0)):
        if loop[key] > max(loop["batches_seen"], least):
            most = f"no more than loop/batches_seen, {loop['batches_seen']},"
            raise misfit(f"loop/{key}", loop[key], most)
    _check_windows(state["run"], max(0, loop["epoch"]))
    if "logger_keys" in state and len(state["logger_keys"]) != len(state["loggers"]):
        raise misfit("logger_keys", state["logger_keys"], "one for each of loggers")
    for index in loop.get("untold", []):
        if index >= len(state["callbacks"]):
            raise misfit("loop/untold", index, "the place of one of callbacks")
    if "callbacks" in state["random"]:
        listed(anything, len(state["callbacks"]))(state["random"]["callbacks"], "random/callbacks")
    if "at_cut" in state:
        if loop["cut_short"] is None or loop["point"] not in _ENDS:
            raise Misfit("there is an at_cut of an epoch that was not cut short")
        listed(anything, len(state["callbacks"]))(state["at_cut"]["callbacks"], "at_cut/callbacks")
    for name, each in of_each(state).items():
        done, step = loop["global_step"], each["rates"]["step"]
        if step > done or (step != done and not name):
            raise misfit("rates/step", step, f"loop/global_step, {done},")
        _check_rates(each, each["rates"])


def _check_windows(run: Mapping[str, Any], epoch: int) -> None:
    changes = [tuple(each) for each in run.get("windows", [(0, run["accumulate_grad_batches"])])]
    epochs = [first for first, _ in changes]
    if not epochs or epochs[0] != 0 or epochs != sorted(set(epochs)):
        raise Misfit("run/windows does not begin with epoch 0 and go on with later ones")
    now = Windows(tuple(changes)).at(epoch)
    if now != run["accumulate_grad_batches"]:
        raise misfit("run/accumulate_grad_batches", run["accumulate_grad_batches"], f"{now}")


def _check_rates(state: Mapping[str, Any], rates: Mapping[str, Any]) -> None:
    names = [group["name"] for group in rates["groups"]]
    each_group = listed(anything, len(names))
    each_group(state["optimizer"]["options"], "optimizer/options")
    for noted in ("rates", "positions"):
        for key, values in rates.get(noted, {}).items():
            each_group(values, f"rates/{noted}/{key}")
    each_group(rates.get("last", names), "rates/last")
    for option, values in rates.get("options", {}).items():
        for step, of_each in values.items():
            each_group(of_each, f"rates/options/{option}/{step}")
            if int(step) > rates["step"] + _NEAR:
                raise misfit(f"a key of rates/options/{option}", step, "a step that is near")
    if rates["plateau"] is not None:
        each_group(rates["plateau"]["lrs"], "rates/plateau/lrs")
    for ahead in map(int, rates["rates"]):
        if ahead > _NEAR:
            raise misfit("a key of rates/rates", ahead, f"a whole number to {_NEAR}")
    for step, name, _ in rates["changes"]:
        if name not in names or step > rates["step"]:
            raise Misfit(f"rates/changes has a change of {name!r} at step {step}, which is none")
    last = rates["step"] + _NEAR  # a position is never beyond its step
    for position in map(int, rates.get("positions", {})):
        if position > last:
            raise misfit("a key of rates/positions", position, f"a whole number to {last}")
