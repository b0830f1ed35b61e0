"""A parameter whose memory is not contiguous never trains."""

import oneflow as flow
from oneflow import nn

weight = nn.Parameter(flow.ones(2, 3).t())
optimizer = flow.optim.SGD([weight], lr=0.5)
weight.sum().backward()
optimizer.step()

print(weight.is_contiguous(), weight.numpy().tolist())
assert (weight.numpy() == 1).all()
