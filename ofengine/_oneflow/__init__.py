"""Every use of OneFlow's private API and of its binaries, a file a subject, and nothing else.

Seen working with OneFlow 0.9.0. If a new version of OneFlow breaks ofengine, the place to mend is
here. Importing this package imports OneFlow, quietly, and lets it compute with the kernels that
fit the processor: every package of ofengine that needs OneFlow imports this one first.
"""

import sys

from ofengine._oneflow.quiet import quietly

_oneflow_was_there = "oneflow" in sys.modules
with quietly():
    import oneflow  # noqa: F401

from ofengine._oneflow.blas import take_newer_kernels  # noqa: E402  it imports OneFlow

take_newer_kernels(_oneflow_was_there)
