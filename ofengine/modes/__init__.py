"""The two modes a task can run in."""

import ofengine._oneflow  # noqa: F401  first: it imports OneFlow quietly
