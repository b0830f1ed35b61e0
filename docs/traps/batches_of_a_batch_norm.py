"""`num_batches_tracked` of a batch norm stands still in a graph; its other statistics move."""

import oneflow as flow
from oneflow import nn


class Graph(nn.Graph):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def build(self, x):
        return self.model(x)


counts = {}
for mode in ("eager", "graph"):
    norm = nn.BatchNorm1d(2)
    run = norm if mode == "eager" else Graph(norm)
    for _ in range(3):
        run(flow.ones(4, 2)).numpy()
    counts[mode] = int(norm.num_batches_tracked.numpy()), norm.running_mean.numpy().tolist()

print(counts)
assert counts["eager"][0] == 3
assert counts["graph"][0] == 0
assert counts["eager"][1] == counts["graph"][1]
