"""What the READMEs show runs, and both say the same."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import List, Tuple

import pytest

from ofengine import Trainer, hooks

ROOT = Path(__file__).resolve().parent.parent
READMES = ["README.md", "README.zh.md"]

# The data that the blocks take for granted, as little of it as there can be.
PRELUDE = """
import warnings
warnings.filterwarnings("ignore", message="ReLU6 module")
import numpy as np
import oneflow as flow
from flowvision.transforms import ToTensor
from ofengine import ImageArrays

train_dataloader = [(flow.randn(2, 3, 32, 32), flow.tensor([3, 7])) for _ in range(2)]
transform = ToTensor()


def CIFAR10(root, transform):
    return ImageArrays(np.zeros((40, 32, 32, 3), "uint8"), [0] * 40, transform)


"""


def blocks(readme: str) -> List[Tuple[str, str]]:
    """The language and the text of each fenced block."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def python_of(readme: str) -> List[str]:
    return [text for language, text in blocks(readme) if language == "python"]


def test_the_python_of_the_readme_runs_and_prints_what_it_says(tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    script.write_text("\n".join([PRELUDE, *python_of("README.md")]))
    result = subprocess.run(
        [sys.executable, str(script)], cwd=str(tmp_path), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    promised = [text for language, text in blocks("README.md") if language == "text"]
    assert promised
    for text in promised:
        assert text in result.stdout


def test_both_readmes_show_the_same_code() -> None:
    english, chinese = (
        [
            ast.dump(ast.parse(text)) if language == "python" else (language, text)
            for language, text in blocks(readme)
            if language != "sh"
        ]
        for readme in READMES
    )
    assert english == chinese


def test_both_readmes_have_the_same_sections() -> None:
    english, chinese = (
        re.findall(r"^(#+) ", (ROOT / readme).read_text(encoding="utf-8"), re.MULTILINE)
        for readme in READMES
    )
    assert english == chinese


@pytest.mark.parametrize("readme", READMES)
def test_every_file_that_a_readme_links_to_is_there(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("readme", READMES)
def test_the_hook_order_is_that_of_the_code(readme: str) -> None:
    order = re.search(r"::\n\n(.*?teardown\(stage\)\n)", hooks.__doc__ or "", re.DOTALL)
    assert order is not None
    assert order.group(1) in (ROOT / readme).read_text(encoding="utf-8")


@pytest.mark.parametrize("readme", READMES)
def test_the_table_of_arguments_is_complete(readme: str) -> None:
    arguments = list(inspect.signature(Trainer.__init__).parameters)[1:]
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / readme).read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"`(\w+)`", " ".join(rows))
    assert [argument for argument in arguments if argument not in named] == []
