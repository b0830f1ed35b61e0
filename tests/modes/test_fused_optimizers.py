"""``fused=True`` of OneFlow's optimizers: kernels of GPUs, which a CPU does without."""

from __future__ import annotations

import warnings
from typing import Any

import oneflow as flow
import pytest
from helpers import SquaredLine, assert_same_weights, quiet_trainer

MAKE = {
    "SGD": lambda groups, **o: flow.optim.SGD(groups, lr=0.1, momentum=0.9, **o),
    "Adam": lambda groups, **o: flow.optim.Adam(groups, lr=0.1, **o),
    "AdamW": lambda groups, **o: flow.optim.AdamW(groups, lr=0.1, **o),
}


class Fusing(SquaredLine):
    def __init__(self, name: str, fused: bool) -> None:
        super().__init__()
        self.name, self.fused = name, fused

    def configure_optimizers(self) -> Any:
        return MAKE[self.name](self.param_groups(), fused=self.fused)


@pytest.mark.parametrize("name", list(MAKE))
def test_a_cpu_updates_as_without_it(name: str, mode: str) -> None:
    fused, plain = Fusing(name, True), Fusing(name, False)
    batches = [flow.ones(2, 2) * (i + 1) for i in range(3)]
    with pytest.warns(UserWarning, match="only support cuda parameters"):
        quiet_trainer(mode=mode, max_epochs=1).fit(fused, batches)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet_trainer(mode=mode, max_epochs=1).fit(plain, batches)
    assert_same_weights(fused, plain)
