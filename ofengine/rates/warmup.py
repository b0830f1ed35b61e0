"""Linear warm-up over parameter groups of unequal rates, which OneFlow's own refuses."""

from __future__ import annotations

from typing import Any, Dict

from oneflow.nn.optimizer.lr_scheduler import LRScheduler

from ofengine.constructors import tells_unknown_arguments
from ofengine.errors import RateError


@tells_unknown_arguments
class WarmupLR(LRScheduler):
    """Each group warms up linearly to where ``scheduler`` has its rate by then, and goes on there.

    As ``oneflow.optim.lr_scheduler.WarmupLR(scheduler, warmup_factor, warmup_iters, "linear")``,
    which works for groups of equal ``lr`` only. At position t < ``warmup_iters`` a group of base
    rate b has ``b * (warmup_factor + (end / b - warmup_factor) * t / warmup_iters)``, where
    ``end`` is the scheduler's rate at ``warmup_iters``; from there on it has the scheduler's.

    Args:
        scheduler: a OneFlow scheduler whose rate is a function of base rate and position
            (``get_lr``): all but ``LambdaLR``, ``ChainedScheduler``, ``SequentialLR``.
        warmup_factor: the first rate's share of the base rate, from 0 to 1.
        warmup_iters: how many positions (steps or epochs, by ``interval``) it takes; at least 1.
        last_step: as in OneFlow's schedulers.

    Raises:
        RateError: an argument is wrong.
    """

    def __init__(
        self,
        scheduler: LRScheduler,
        warmup_factor: float = 1.0 / 3,
        warmup_iters: int = 5,
        last_step: int = -1,
    ) -> None:
        if not isinstance(scheduler, LRScheduler) or type(scheduler).get_lr is LRScheduler.get_lr:
            raise RateError(
                f"WarmupLR cannot go over to {type(scheduler).__name__}, whose rate is no function "
                "of a base rate and a position: give for example a CosineDecayLR."
            )
        if isinstance(warmup_iters, bool) or not isinstance(warmup_iters, int) or warmup_iters < 1:
            raise RateError(f"WarmupLR(warmup_iters={warmup_iters!r}): give a whole number from 1.")
        if not 0.0 <= warmup_factor <= 1.0:
            raise RateError(f"WarmupLR(warmup_factor={warmup_factor!r}): give a share from 0 to 1.")
        self.schedulers = [scheduler]
        self.warmup_factor = warmup_factor
        self.warmup_iters = warmup_iters
        super().__init__(scheduler.optimizer, last_step)

    def get_lr(self, base_lr: float, step: int) -> float:
        """The rate of a group of base rate ``base_lr`` at position ``step``."""
        scheduler = self.schedulers[0]
        if step >= self.warmup_iters or base_lr == 0:
            return scheduler.get_lr(base_lr, step)
        end_factor = scheduler.get_lr(base_lr, self.warmup_iters) / base_lr
        rise = (end_factor - self.warmup_factor) * (step / self.warmup_iters)
        return base_lr * (self.warmup_factor + rise)

    def state_dict(self) -> Dict[str, Any]:
        """As in OneFlow's schedulers, without the one inside."""
        return {k: v for k, v in vars(self).items() if k not in ("optimizer", "schedulers")}
