"""A second training graph over the same module fails until its gradients are set to None."""

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


model = nn.Linear(1, 1)
optimizer = flow.optim.SGD(model.parameters(), lr=0.5)
Graph(model, optimizer)(flow.ones(4, 1))
try:
    Graph(model, optimizer)(flow.ones(3, 1))
except Exception as error:
    refused = str(error)
optimizer.zero_grad(set_to_none=True)
Graph(model, optimizer)(flow.ones(3, 1))

print(refused.strip().splitlines()[-1][:100])
assert "is_eager" in refused
