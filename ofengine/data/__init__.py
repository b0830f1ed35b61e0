"""Batches: which ones, in which order, on which device; seeds and generators."""

import ofengine._oneflow  # noqa: F401  first: it imports OneFlow quietly
