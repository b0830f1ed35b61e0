"""A key of a parameter group that nothing reads is taken without a word."""

import oneflow as flow
from oneflow import nn

model = nn.Linear(1, 1)
groups = [{"params": model.parameters(), "lr": 0.5, "lr_scal": 0.1, "weight_decya": 1e-4}]
optimizer = flow.optim.SGD(groups)

print(sorted(optimizer.param_groups[0].options))
assert optimizer.param_groups[0]["lr_scal"] == 0.1
