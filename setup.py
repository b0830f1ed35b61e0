"""What setup.cfg cannot say: a clear word on the wrong Python."""

import sys

if not (3, 8) <= sys.version_info[:2] <= (3, 10):
    here = ".".join(map(str, sys.version_info[:3]))
    sys.exit(
        "ofengine needs CPython 3.8, 3.9 or 3.10, because OneFlow 0.9 has no wheel for newer ones; "
        f"this is {here}. Install python3.10, for instance with pyenv or uv, and try again with it."
    )

from setuptools import setup

setup()
