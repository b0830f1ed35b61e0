"""A view that is written in place changes its tensor in eager mode, and not in a graph."""

import oneflow as flow
from oneflow import nn


class Graph(nn.Graph):
    def build(self, x):
        return write(x)


def write(x):
    y = x * 1
    y[:, 0].mul_(10)
    return y


eager, graph = (run(flow.ones(1, 2)).numpy().tolist() for run in (write, Graph()))

print("eager", eager, "graph", graph)
assert eager == [[10.0, 1.0]]
assert graph == [[1.0, 1.0]]
