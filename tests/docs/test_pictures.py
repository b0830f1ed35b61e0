"""The pictures of rates are those of the code beside them, and none is missing."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any, Dict

import pytest
from flowvision import scheduler as of_flowvision
from oneflow.optim import lr_scheduler

import ofengine.rates

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
PAGE = (ROOT / "docs" / "en" / "rate-pictures.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def drawn() -> Dict[str, str]:
    """Each picture, drawn anew."""
    spec = importlib.util.spec_from_file_location("draw", IMAGES / "draw.py")
    assert spec is not None and spec.loader is not None
    draw: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    return dict(draw.rates())


# A table shorter than the run, as it may well be, is told.
@pytest.mark.filterwarnings("ignore::ofengine.OFEngineWarning")
def test_each_picture_is_what_its_code_gives(drawn: Dict[str, str]) -> None:
    kept = {path.relative_to(IMAGES).as_posix() for path in (IMAGES / "rates").glob("*")}
    assert kept | {"rates-definition.svg"} == set(drawn)
    old = [n for n, text in drawn.items() if (IMAGES / n).read_text(encoding="utf-8") != text]
    assert old == [], "they are drawn anew by `python docs/images/draw.py`"


def test_the_page_shows_every_picture(drawn: Dict[str, str]) -> None:
    shown = re.findall(r"\]\(\.\./images/(rates/[\w-]+\.svg)\)", PAGE)
    assert sorted(shown) == sorted(set(drawn) - {"rates-definition.svg"})


def test_a_picture_has_the_rates_of_its_closed_form(drawn: Dict[str, str]) -> None:
    """The curve of StepLR: from 0.1 to 0.03 at step 30, to 0.009 at step 60."""
    left, width, top, height = 46, 270, 8, 96
    xs = [f"{left + width * step / 90:.4g}" for step in (30, 60, 90)]
    ys = [f"{top + height * (1 - rate / 0.1):.1f}" for rate in (0.03, 0.009)]
    assert f'd="M46 8H{xs[0]}V{ys[0]}H{xs[1]}V{ys[1]}H{xs[2]}"' in drawn["rates/StepLR.svg"]


def test_every_builder_and_every_schedule_has_a_picture() -> None:
    code = "".join(re.findall(r"^```python\n.*?^```$|^\| `[^`]+`", PAGE, re.MULTILINE | re.DOTALL))
    builders = {name for name in ofengine.rates.__all__ if name != "rates"}  # rates_between
    of_oneflow = {name for name in vars(lr_scheduler) if name[0].isupper()}
    counted = {name for name in vars(of_flowvision) if name.endswith("LRScheduler")}
    assert len(of_oneflow) > 10 and len(counted) > 5
    missing = [n for n in builders | of_oneflow | counted if not re.search(rf"\b{n}\b", code)]
    assert missing == []
