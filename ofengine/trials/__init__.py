"""Runs that are tried and taken back."""

import ofengine._oneflow  # noqa: F401  first: it imports OneFlow quietly
