"""A checkpoint's state with one thing changed that an enemy, or a mistake, might have changed."""

from __future__ import annotations

import copy
import random
from typing import Any, Callable, Dict, List, Tuple

import numpy as np

State = Dict[str, Any]
Place = Tuple[Any, Any]
"""A dict or list, and a key or index of it."""

VALUES: List[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 10**6, 2**31, 2**62, 2**64, -(2**63), 10**400, 0.0, -0.5,
    1.5, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), "", "text", "0", "-1", "ä" * 300,
    "nul\0", "lone \ud800", "../../etc/passwd", "/", [], [[]], {}, {"a": 1}, [1, 2, 3], ["x"],
    [None], {"": {}}, np.zeros(0, "float32"), np.zeros((), "float32"), np.ones(3, "float64"),
    np.full((2, 2), np.nan, "float32"), np.arange(5, dtype="uint8"), np.ones(2, dtype="bool"),
    np.arange(700, dtype="int64"),
]  # fmt: skip


def places(value: Any, found: List[Place]) -> List[Place]:
    """Every place in a state, the root left out."""
    if isinstance(value, dict):
        for key in value:
            found.append((value, key))
            places(value[key], found)
    elif isinstance(value, list):
        for index in range(len(value)):
            found.append((value, index))
            places(value[index], found)
    return found


def mutated(state: State, number: int) -> Tuple[State, str]:
    """A deep copy of ``state`` with the change of this ``number``, and what it is, in words."""
    chance = random.Random(number)
    state = copy.deepcopy(state)
    found = places(state, [])
    # Long lists and the many entries of one kind would take all chances.
    holder, key = _any_place(state, chance) if chance.random() < 0.7 else chance.choice(found)
    change = chance.choice(CHANGES)
    before = holder[key]
    words = change(holder, key, chance, found)
    return state, f"{number}: {_path(state, holder, key)} {words}, was {before!r:.60}"


def _any_place(state: State, chance: random.Random) -> Place:
    """A place found by going down, each branch as likely as the others."""
    holder: Any = state
    key: Any = chance.choice(list(state))
    while isinstance(holder[key], (dict, list)) and len(holder[key]) and chance.random() < 0.9:
        holder = holder[key]
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = chance.choice(keys)
    return holder, key


def _path(value: Any, holder: Any, key: Any) -> str:
    if value is holder:
        return str(key)
    for name in value if isinstance(value, dict) else range(len(value)):
        if isinstance(value[name], (dict, list)):
            inside = _path(value[name], holder, key)
            if inside:
                return f"{name}/{inside}"
    return ""


def _replace(holder: Any, key: Any, chance: random.Random, found: List[Place]) -> str:
    holder[key] = copy.deepcopy(chance.choice(VALUES))
    return f"is {holder[key]!r:.40}"


def _remove(holder: Any, key: Any, chance: random.Random, found: List[Place]) -> str:
    del holder[key]
    return "is removed"


def _rename(holder: Any, key: Any, chance: random.Random, found: List[Place]) -> str:
    if isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
        return "is doubled"
    name = chance.choice(["", "x", f"{key}x", "__class__", "training_step", "9" * 30, "-1"])
    holder[name] = holder.pop(key)
    return f"is called {name!r}"


def _add(holder: Any, key: Any, chance: random.Random, found: List[Place]) -> str:
    value = copy.deepcopy(chance.choice(VALUES))
    if isinstance(holder, list):
        holder.append(value)
        return f"is followed by {value!r:.40}"
    name = chance.choice(["x", "__class__", "__dict__", "load_state_dict", "optimizer", "0", "a.b"])
    holder[name] = value
    return f"has {name!r}={value!r:.40} beside it"


def _take_other(holder: Any, key: Any, chance: random.Random, found: List[Place]) -> str:
    other, name = chance.choice(found)
    value = copy.deepcopy(other[name])
    if isinstance(holder, dict) and isinstance(value, dict) and len(value) > 50:
        return "stays"
    holder[key] = value
    return f"is what {name!r} is"


def _change_a_little(holder: Any, key: Any, chance: random.Random, found: List[Place]) -> str:
    value = holder[key]
    if isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, (int, float)):
        holder[key] = chance.choice([value + 1, value - 1, -value, value * 2, float(value),
                                     value + 0.5, str(value), [value]])  # fmt: skip
    elif isinstance(value, str):
        holder[key] = chance.choice([value[:-1], f"{value}x", value.upper(), [value], 0])
    elif isinstance(value, np.ndarray):
        holder[key] = _other_array(value, chance)
    elif isinstance(value, list):
        holder[key] = chance.choice([value[:-1], value[::-1], value * 2, [], dict.fromkeys("ab")])
    elif isinstance(value, dict):
        holder[key] = chance.choice([{}, list(value.values()), {"x": value}])
    else:
        holder[key] = chance.choice(VALUES)
    return f"is {holder[key]!r:.40}"


def _other_array(value: np.ndarray, chance: random.Random) -> np.ndarray:
    flat = value.reshape(-1)
    kinds: List[Callable[[], np.ndarray]] = [
        lambda: value.astype("float64"), lambda: value.astype("int64"), lambda: flat[:-1],
        lambda: np.zeros_like(value), lambda: flat.copy(), lambda: value[None],
        lambda: np.concatenate([flat, flat]), lambda: np.full_like(value, 255),
        lambda: np.roll(flat, 1).reshape(value.shape), lambda: value.astype("uint8"),
    ]  # fmt: skip
    return chance.choice(kinds)()


CHANGES = (_replace, _replace, _replace, _remove, _rename, _add, _take_other, _change_a_little,
           _change_a_little)  # fmt: skip
