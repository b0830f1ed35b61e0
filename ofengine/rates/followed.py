"""A scheduler as somebody meets it who asks it for the rates, while the plan moves them."""

from __future__ import annotations

from typing import Any, Callable, List

from ofengine.errors import ConfigurationError


class Followed:
    """``scheduler``, whose last rates are those that train.

    The engine asks a scheduler for its function of the step, and steps it only when ``fit`` ends:
    until then its own ``get_last_lr`` tells the first rates.

    Args:
        scheduler: what ``configure_optimizers`` returned; all its other attributes are there.
        rates: gives the rates of all groups at the step that was made last.
    """

    def __init__(self, scheduler: Any, rates: Callable[[], List[float]]) -> None:
        self._scheduler, self._rates = scheduler, rates

    def get_last_lr(self) -> List[float]:
        """The rate of each group in the step that was made last, scale and decay included.

        Before the first step those of that step.
        """
        return self._rates()

    def step(self, *arguments: Any, **options: Any) -> None:
        """Raise :class:`ConfigurationError`: a second step would change nothing, or be lost."""
        raise ConfigurationError(
            "the Trainer moves rates by itself, and a step() of a scheduler is lost: leave it out; "
            'how often they move say "interval" and "frequency" in configure_optimizers().'
        )

    def __getattr__(self, name: str) -> Any:
        """Whatever else the scheduler has."""
        if name.startswith("_"):
            raise AttributeError(name)  # so that it can be copied
        return getattr(self._scheduler, name)
