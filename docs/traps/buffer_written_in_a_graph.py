"""What a step adds to a buffer in place is lost in a graph."""

import oneflow as flow
from oneflow import nn


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", flow.zeros(1))
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        self.seen.add_(x.shape[0])
        return self.layer(x)


class Graph(nn.Graph):
    def __init__(self, module):
        super().__init__()
        self.module = module
        self.add_optimizer(flow.optim.SGD(module.parameters(), lr=0.1))

    def build(self, x):
        loss = self.module(x).sum()
        loss.backward()
        return loss


in_eager_mode, in_a_graph = Counts(), Counts()
graph, batch = Graph(in_a_graph), flow.ones(8, 1)
for _ in range(3):
    in_eager_mode(batch)
    graph(batch)

print("eager mode:", in_eager_mode.seen.item(), "a graph:", in_a_graph.seen.item())
assert in_eager_mode.seen.item() == 24
assert in_a_graph.seen.item() == 0
