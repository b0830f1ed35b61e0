"""Every use of OneFlow's private API and of its binaries, a file a subject, and nothing else.

Seen working with OneFlow 0.9.0. If a new version of OneFlow breaks ofengine, the place to mend is
here. Importing this package imports OneFlow, quietly: every package of ofengine that needs OneFlow
imports this one first.
"""

from ofengine._oneflow.quiet import quietly

with quietly():
    import oneflow  # noqa: F401
