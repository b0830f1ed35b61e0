"""One run: its settings, its progress, its state, and the loops that move it on."""

import ofengine._oneflow  # noqa: F401  first: it imports OneFlow quietly
