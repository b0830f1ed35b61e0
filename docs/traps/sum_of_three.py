"""A graph computes a + (b + c) as (a + b) + c: other last bits than in eager mode."""

import numpy as np
import oneflow as flow
from oneflow import nn


class Graph(nn.Graph):
    def build(self, a, b, c):
        return a + (b + c)


numbers = np.random.RandomState(0).randn(3, 1000).astype(np.float32)
a, b, c = map(flow.tensor, numbers)
eager, graph = (a + (b + c)).numpy(), Graph()(a, b, c).numpy()

print((eager != graph).sum(), "of 1000 sums differ")
assert (eager != graph).any()
assert (graph == (a + b + c).numpy()).all()
