"""A graph keeps what Python said when it was traced: a number, a switch, training or eval."""

import oneflow as flow
from oneflow import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = 1.0
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(x) * self.factor


class Graph(nn.Graph):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def build(self, x):
        return self.model(x)


model = Model()
graph = Graph(model)
graph(flow.ones(1000)).numpy()
model.factor = 0.0
model.eval()
after = graph(flow.ones(1000)).numpy()

print("eager", model(flow.ones(3)).numpy(), "graph", after[:3])
assert set(after.tolist()) == {0.0, 2.0}
