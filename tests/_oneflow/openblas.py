"""Processes whose OneFlow has the OpenBLAS kernels that a test wants, and what they found."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import Any, Dict

import pytest
from helpers import run_python

from ofengine._oneflow import blas

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = blas._processor_flags()

needs_avx2 = pytest.mark.skipif(
    bool(blas._NEEDED - FLAGS), reason="this processor has no AVX2 and FMA"
)


def found_by(begin: str, code: str, **environment: str) -> Dict[str, Any]:
    """What ``code``, behind ``begin``, left in ``found``; what it "said" on standard error."""
    kept = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_CORETYPE", "OFENGINE_BLAS")}
    program = f"{begin}\nfound = {{}}\n{textwrap.dedent(code)}\nprint(json.dumps(found))"
    ended = run_python("-c", program, env={**kept, "PYTHONPATH": str(ROOT), **environment})
    assert ended.returncode == 0, ended.stderr
    return {**json.loads(ended.stdout.splitlines()[-1]), "said": ended.stderr}
