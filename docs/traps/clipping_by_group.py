"""`clip_grad_max_norm` clips each group by itself: two groups are clipped otherwise than one."""

import numpy as np
import oneflow as flow
from oneflow import nn

clipping = {"clip_grad_max_norm": 1.0, "clip_grad_norm_type": 2.0}
moved = {}
for groups in (1, 2):
    pair = [nn.Parameter(flow.zeros(1)), nn.Parameter(flow.zeros(1))]
    parts = [pair] if groups == 1 else [pair[:1], pair[1:]]
    optimizer = flow.optim.SGD([{"params": part, "lr": 1.0, **clipping} for part in parts])
    (pair[0] * 3 + pair[1] * 4).sum().backward()  # a gradient of (3, 4), whose norm is 5
    optimizer.clip_grad()
    optimizer.step()
    moved[groups] = -np.concatenate([each.numpy() for each in pair])

print(moved)
assert np.allclose(moved[1], [0.6, 0.8], atol=1e-4)
assert np.allclose(moved[2], [1.0, 1.0], atol=1e-4)
