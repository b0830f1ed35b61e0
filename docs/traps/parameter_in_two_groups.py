"""A parameter in two groups is updated twice in eager mode; a graph aborts the process."""

import subprocess
import sys

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
optimizer = flow.optim.SGD(
    [{"params": [model.weight], "lr": 0.1}, {"params": [model.weight], "lr": 0.1}]
)
if "graph" in sys.argv:
    Graph(model, optimizer)(flow.ones(1, 1))
    sys.exit("it did not abort")

model(flow.ones(1, 1)).sum().backward()
optimizer.step()
by = 1 - model.weight.numpy().item()
died = subprocess.run([sys.executable, __file__, "graph"], capture_output=True)

print(
    "in eager mode it moved by", round(by, 4), "- in a graph the process ended by", died.returncode
)
assert abs(by - 0.2) < 1e-6
assert died.returncode < 0  # by a signal
