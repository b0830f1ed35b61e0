"""What the site adds to the pages is true, and the Chinese pages keep up with the English ones."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any, List

import oneflow as flow
import pytest
from oneflow import nn

import ofengine
from ofengine import Callback, TaskModule, Trainer, callback

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
        assert linked == names + DRAWN.hooks(DRAWN.BEYOND)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_hook_is_drawn_and_leads_to_what_it_is_for(language: str) -> None:
    picture = DRAWN.picture(language, "API")
    linked = re.findall(r'<a href="API#ofengine\.Callback\.(\w+)"><code>\1</code></a>', picture)
    assert set(linked) == set(callback.HOOKS)


class _Notes(Callback):
    def __init__(self) -> None:
        self.fired: List[str] = []


for _hook in callback.HOOKS:
    setattr(_Notes, _hook, lambda self, *_, hook=_hook: self.fired.append(hook))


class _Task(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch)

    predict_step = test_step


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_the_other_verbs_and_an_exception_are_drawn_as_they_fire(verb: str) -> None:
    drawn, notes = dict(DRAWN.BEYOND), _Notes()
    trainer = Trainer(logger=False, enable_progress_bar=False, callbacks=notes)
    task = _Task()
    getattr(trainer, verb)(task, [flow.ones(2, 2)])
    assert notes.fired == DRAWN.hooks(drawn[verb])
    notes.fired.clear()
    with pytest.raises(RuntimeError):
        getattr(trainer, verb)(task, [flow.ones(2, 3)])
    assert notes.fired[-2:] == drawn["raised"]


def test_what_is_to_be_cited_is_this_version() -> None:
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", cited, re.MULTILINE) == [ofengine.__version__]
