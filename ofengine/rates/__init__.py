"""Learning rates: the parameter groups, the schedule, and the plan that knows every rate.

The builders, which make parameter groups for ``TaskModule.param_groups``, are imported from
here: :func:`by_pattern`, :func:`layer_decay`, :func:`no_weight_decay`, :func:`rates_between`
(or :func:`rates`), :func:`freeze` and :func:`unfreeze`; and :class:`WarmupLR`, a linear warm-up
over groups of any rates.
"""

import ofengine._oneflow  # noqa: F401  first: it imports OneFlow quietly
from ofengine.rates.builders import by_pattern, freeze, layer_decay, unfreeze
from ofengine.rates.regroup import no_weight_decay, rates, rates_between
from ofengine.rates.warmup import WarmupLR

__all__ = [
    "WarmupLR",
    "by_pattern",
    "freeze",
    "layer_decay",
    "no_weight_decay",
    "rates",
    "rates_between",
    "unfreeze",
]
