"""Every use of OneFlow's private API and of its binaries, a file a subject, and nothing else.

Seen working with OneFlow 0.9.0. If a new version of OneFlow breaks ofengine, the place to mend is
here. Importing this package imports OneFlow, quietly, lets it compute with the kernels that fit
the processor, and mends the contexts of ``autograd.Function``: every package of ofengine that needs
OneFlow imports this one first.
"""

import sys

from ofengine._oneflow.quiet import quietly

_oneflow_was_there = "oneflow" in sys.modules
with quietly():
    import oneflow  # noqa: F401

# These import OneFlow.
from ofengine._oneflow.blas import take_newer_kernels  # noqa: E402
from ofengine._oneflow.function_contexts import mend_function_contexts  # noqa: E402

take_newer_kernels(_oneflow_was_there)
mend_function_contexts()
