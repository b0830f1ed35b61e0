"""The dataloaders of an evaluation stage: one, a list or a dict."""

from __future__ import annotations

from typing import Any, List, Optional

import oneflow as flow
from oneflow.utils.data import DataLoader

from ofengine.data.batches import Batches
from ofengine.data.combined import CombinedLoader
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
    """One :class:`Batches` for each dataloader of an evaluation stage: one, a list or a dict."""
    if loaders is None:
        return []
    kinds = (DataLoader, CombinedLoader)
    several = isinstance(loaders, dict)
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    elif isinstance(loaders, (list, tuple)) and any(isinstance(each, kinds) for each in loaders):
        several = True
        if not all(isinstance(each, kinds) for each in loaders):
            raise DataError(
                f"{what} mixes DataLoaders with other things: give one dataloader, or a list of "
                "oneflow.utils.data.DataLoader objects."
            )
    each_called = f"{what}[{{}}]" if several and len(loaders) > 1 else what
    return [
        Batches(loader, limit, device, each_called.format(index), limit_name, keep, keep, share)
        for index, loader in enumerate(loaders if several else [loaders])
    ]
