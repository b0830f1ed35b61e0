"""A parameter that `build` reaches through a plain list is a constant there, and never trains."""

import oneflow as flow
from oneflow import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(flow.ones(1))
        self.shift = nn.Parameter(flow.ones(1))
        self.parts = [self.shift]

    def forward(self, x):
        return x * self.scale + self.parts[0]


class Graph(nn.Graph):
    def __init__(self, model, optimizer):
        super().__init__()
        self.model = model
        self.add_optimizer(optimizer)

    def build(self, x):
        loss = self.model(x).sum()
        loss.backward()
        return loss


model = Model()
optimizer = flow.optim.SGD(model.parameters(), lr=0.5)
Graph(model, optimizer)(flow.ones(1))

print("scale", model.scale.numpy(), "shift", model.shift.numpy())
assert model.scale.numpy().item() == 0.5
assert model.shift.numpy().item() == 1.0
