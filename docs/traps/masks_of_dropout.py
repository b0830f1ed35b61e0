"""Two dropout layers draw the same masks, whatever `manual_seed` says."""

import oneflow as flow
from oneflow import nn

masks = []
for seed in (0, 1):
    flow.manual_seed(seed)
    layers = nn.Dropout(0.5), nn.Dropout(0.5)
    masks += [layer(flow.ones(1000)).numpy().tolist() for layer in layers]

print("different masks:", len({tuple(mask) for mask in masks}), "of", len(masks))
assert all(mask == masks[0] for mask in masks)
