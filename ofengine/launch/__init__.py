"""Several ranks: how they are started, what each is, and how they end together."""

from ofengine.launch.itself import launch_self
from ofengine.launch.launcher import start_ranks

__all__ = ["launch_self", "start_ranks"]
