"""Forward hooks of modules are left out of a graph."""

import oneflow as flow
from oneflow import nn


class Graph(nn.Graph):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def build(self, x):
        return self.model(x)


model = nn.Identity()
model.register_forward_hook(lambda module, inputs, output: output * 10)
eager, graph = model(flow.ones(1)).numpy().item(), Graph(model)(flow.ones(1)).numpy().item()

print("eager", eager, "graph", graph)
assert (eager, graph) == (10.0, 1.0)
