"""Python environments of their own, for packages that are in none of the tests'."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Dict

ROOT = Path(__file__).resolve().parents[2]


def make_environment(folder: Path, *packages: str, beside: bool = False) -> Path:
    """Make one in ``folder``, and return its Python.

    Args:
        folder: which is not there yet.
        packages: what pip is to install, with what that requires.
        beside: what the tests have can be imported, too, as far as ``packages`` do not bring it;
            so can ofengine.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", *packages]
    subprocess.run(install, check=True, env=without_paths())
    if beside:
        asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        own = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
        (own / "beside.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    return python


def without_paths() -> Dict[str, str]:
    """What the environment variables are, but for those that bring modules from elsewhere."""
    return {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
