"""Precision: what is computed in half precision, and where that is refused."""

from __future__ import annotations

from typing import Any, Dict, Mapping

from ofengine.errors import ConfigurationError

FULL = "32-true"
"""All is computed in the dtype of weights and batches."""
LOSS_SCALES: Dict[str, float] = {"16-mixed": 2.0**10, "bf16-mixed": 1.0}
"""What a loss is multiplied by before ``backward``, and its gradients divided by after it.

float16 has nothing between 0 and 2**-24. A power of two changes no bit of a float32 number, and one
that stays the same needs no place in a checkpoint. bfloat16 has the exponents of float32.
"""
_SPELT: Dict[Any, str] = {
    **dict.fromkeys((32, "32", FULL), FULL),
    **dict.fromkeys((16, "16", "16-mixed"), "16-mixed"),
    **dict.fromkeys(("bf16", "bf16-mixed"), "bf16-mixed"),
}
"""Lightning's names for each, those of its 1.x too."""
_WEIGHTS_TOO = 'write "16-mixed" or "bf16-mixed", which keep weights and optimizer in float32'
_DOUBLE = "leave it out, call task.double() and give batches of float64, in eager mode"
_INSTEAD: Dict[Any, str] = {
    **dict.fromkeys(("16-true", "bf16-true"), _WEIGHTS_TOO),
    **dict.fromkeys(("transformer-engine", "transformer-engine-float16"), _WEIGHTS_TOO),
    **dict.fromkeys((64, "64", "64-true"), _DOUBLE),
}


def check_precision(name: str, value: Any) -> str:
    """``value``, as Lightning spells it, as one of "32-true", "16-mixed" and "bf16-mixed"."""
    known = isinstance(value, (int, str)) and not isinstance(value, bool)
    if known and value in _SPELT:
        return _SPELT[value]
    mend = _INSTEAD.get(value) if known else None
    choices = ", ".join(f'"{each}"' for each in (FULL, *LOSS_SCALES))
    raise ConfigurationError(f"{name}={value!r}: {mend or f'use one of {choices}'}.")


def check_mixed(values: Mapping[str, Any]) -> None:
    """Refuse mixed precision where it cannot be; ``values`` are a Trainer's arguments, by name."""
    if values["precision"] == FULL:
        return
    asked = f'precision="{values["precision"]}"'
    if values["device"].type == "cpu":
        raise ConfigurationError(
            f"{asked} is for GPUs: OneFlow multiplies no matrices of half precision on a CPU. "
            "Leave precision out, which computes in float32."
        )
    if values["mode"] == "eager":
        raise ConfigurationError(
            f"{asked} is for graph mode, where OneFlow's compiler decides what is computed in half "
            'precision: write mode="graph", or leave precision out.'
        )
    if values["detect_anomaly"]:
        raise ConfigurationError(
            f"{asked} and detect_anomaly=True do not go together: a step is replayed eagerly, in "
            "float32, where what is too large for half precision is finite. Leave out one of them."
        )
