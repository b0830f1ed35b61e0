"""What the site adds to the pages is true, and the Chinese pages keep up with the English ones."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import ofengine
from ofengine import callback

ROOT = Path(__file__).resolve().parents[2]


def _part(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DRAWN, TRANSLATED = _part("drawn"), _part("translated")


def test_every_chinese_page_was_translated_from_the_english_page_as_it_is() -> None:
    behind = TRANSLATED.behind()
    assert behind == [], (
        "their English pages have changed: translate what has, then run "
        f"`python docs/site/translated.py {' '.join(behind)}`"
    )


def test_a_changed_english_page_is_noticed(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("README.md", "README.zh.md", "docs/en/data.md", "docs/zh/data.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(TRANSLATED, "ROOT", tmp_path)
    assert TRANSLATED.behind() == []
    english = tmp_path / "docs/en/data.md"
    english.write_text(english.read_text(encoding="utf-8").replace("\n", "\n "), encoding="utf-8")
    assert TRANSLATED.behind() == []  # the same words
    english.write_text(english.read_text(encoding="utf-8") + "One more.\n", encoding="utf-8")
    assert TRANSLATED.behind() == ["docs/zh/data.md"]
    TRANSLATED.note(tmp_path / "docs/zh/data.md")
    TRANSLATED.note(tmp_path / "docs/zh/data.md")
    assert TRANSLATED.behind() == []
    text = (tmp_path / "docs/zh/data.md").read_text(encoding="utf-8")
    assert text.count("<!-- translated from docs/en/data.md") == 1


def test_the_drawn_order_of_hooks_is_that_of_the_code() -> None:
    order = re.search(r"::\n\n(.*?teardown\(stage\)\n)", callback.__doc__ or "", re.DOTALL)
    assert order is not None
    names = [name for name in re.findall(r"\w+", order[1]) if name in callback.HOOKS]
    assert DRAWN.hooks(DRAWN.ORDER) == names
    for language in ("en", "zh"):
        linked = re.findall(r'#ofengine\.Callback\.(\w+)"', DRAWN.picture(language, ""))
        assert linked == names


def test_what_is_to_be_cited_is_this_version() -> None:
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", cited, re.MULTILINE) == [ofengine.__version__]
