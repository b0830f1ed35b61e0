"""`flow.save` writes a folder of files, and what it wrote there before stays."""

import os
import tempfile

import oneflow as flow
from oneflow import nn

with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "model")
    flow.save(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict(), path)
    first = sorted(os.listdir(path))
    flow.save(nn.Linear(2, 2).state_dict(), path)
    second = sorted(os.listdir(path))

print(second)
assert set(first) < set(second)
