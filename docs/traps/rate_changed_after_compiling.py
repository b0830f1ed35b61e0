"""A rate that is changed after a graph was compiled stays what it was in the graph."""

import oneflow as flow
from oneflow import nn


class Graph(nn.Graph):
    def __init__(self, model, optimizer):
        super().__init__()
        self.model = model
        self.add_optimizer(optimizer)

    def build(self, x):
        loss = self.model(x).sum()
        loss.backward()
        return loss


model = nn.Linear(1, 1, bias=False)
nn.init.ones_(model.weight)
optimizer = flow.optim.SGD(model.parameters(), lr=0.5)
graph = Graph(model, optimizer)
graph(flow.ones(1, 1))
optimizer.param_groups[0]["lr"] = 0.0
before = model.weight.numpy().item()
graph(flow.ones(1, 1))
by = before - model.weight.numpy().item()

print("with a rate of 0 the weight moved by", by)
assert abs(by - 0.5) < 1e-6
