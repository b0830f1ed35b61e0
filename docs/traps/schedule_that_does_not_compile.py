"""`LambdaLR` works in eager mode and does not compile into a graph."""

import oneflow as flow
from oneflow import nn


class Graph(nn.Graph):
    def __init__(self, model, optimizer, schedule):
        super().__init__()
        self.model = model
        self.add_optimizer(optimizer, lr_sch=schedule)

    def build(self, x):
        loss = self.model(x).sum()
        loss.backward()
        return loss


model = nn.Linear(1, 1)
optimizer = flow.optim.SGD(model.parameters(), lr=0.5)
schedule = flow.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
try:
    Graph(model, optimizer, schedule)(flow.ones(1, 1))
except Exception as error:
    refused = error

print(type(refused).__name__, refused)
assert isinstance(refused, AttributeError)
