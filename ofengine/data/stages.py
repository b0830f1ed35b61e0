"""The dataloaders of an evaluation stage: one, or a list."""

from __future__ import annotations

from typing import Any, List, Optional

import oneflow as flow
from oneflow.utils.data import DataLoader

from ofengine.data.batches import Batches
from ofengine.errors import DataError
from ofengine.ranks.shares import Share
from ofengine.run.arguments import Limit


def stage_loaders(
    loaders: Any,
    limit: Limit,
    device: flow.device,
    what: str,
    limit_name: str,
    keep: bool,
    share: Optional[Share] = None,
) -> List[Batches]:
    """One :class:`Batches` for each dataloader of an evaluation stage (one or a list)."""
    if loaders is None:
        return []
    if isinstance(loaders, dict) and any(isinstance(each, DataLoader) for each in loaders.values()):
        raise DataError(
            f"{what} is a dict of DataLoaders: give a list of them, as in list(loaders.values()); "
            "metrics are told apart by their number."
        )
    several = isinstance(loaders, (list, tuple)) and any(
        isinstance(loader, DataLoader) for loader in loaders
    )
    if several and not all(isinstance(loader, DataLoader) for loader in loaders):
        raise DataError(
            f"{what} mixes DataLoaders with other things: give one dataloader, or a list of "
            "oneflow.utils.data.DataLoader objects."
        )
    each_called = f"{what}[{{}}]" if several and len(loaders) > 1 else what
    return [
        Batches(loader, limit, device, each_called.format(index), limit_name, keep, keep, share)
        for index, loader in enumerate(loaders if several else [loaders])
    ]
