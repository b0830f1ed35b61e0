"""A graph refuses a batch of another shape than its first, such as the last one of an epoch."""

import oneflow as flow
from oneflow import nn


class Graph(nn.Graph):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def build(self, x):
        return self.model(x)


graph = Graph(nn.Linear(3, 2))
graph(flow.ones(8, 3))
try:
    graph(flow.ones(5, 3))
except Exception as error:
    refused = str(error)

print(refused.strip().splitlines()[-1][:100])
assert "static inputs" in refused
