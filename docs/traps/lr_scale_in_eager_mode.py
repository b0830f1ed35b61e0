"""`lr_scale` of a parameter group is applied in a graph, and ignored in eager mode."""

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


moved = {}
for mode in ("eager", "graph"):
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    groups = [{"params": model.parameters(), "lr": 0.5, "lr_scale": 0.1}]
    optimizer = flow.optim.SGD(groups)
    if mode == "graph":
        Graph(model, optimizer)(flow.ones(1, 1))
    else:
        model(flow.ones(1, 1)).sum().backward()
        optimizer.step()
    moved[mode] = 1 - model.weight.numpy().item()

print({mode: round(by, 4) for mode, by in moved.items()})
assert abs(moved["eager"] - 0.5) < 1e-6
assert abs(moved["graph"] - 0.05) < 1e-6
