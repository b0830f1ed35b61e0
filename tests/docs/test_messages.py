"""The site's page of errors and warnings has every one that the code can raise."""

from __future__ import annotations

import html
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any, Callable, List

import oneflow as flow
import pytest
from oneflow import nn

import ofengine.errors
from ofengine import OFEngineError, TaskModule, Trainer
from ofengine.callbacks import EarlyStopping, GradualUnfreezing, ModelCheckpoint
from ofengine.metrics import Accuracy

ROOT = Path(__file__).resolve().parents[2]


def _messages() -> Any:
    path = ROOT / "docs" / "site" / "messages.py"
    spec = importlib.util.spec_from_file_location("messages", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["messages"] = module
    spec.loader.exec_module(module)
    return module


MESSAGES = _messages()
KINDS = [name for name in vars(ofengine.errors) if name.endswith("Error")]
TEXTS = [" ".join(each.text.split()) for each in MESSAGES.messages()]


PAGE = " ".join(html.unescape(re.sub(r"</?(?:var|code)>", "", MESSAGES.page())).split())
LITERAL = r'f?"((?:[^"\\]|\\.)*)"'


def _longest_part(text: str) -> str:
    """Of a text in the code the longest part that is put in as it stands; "" for none."""
    parts = re.split(r"\{(?:[^{}]|\{[^{}]*\})*\}|%[-+,.\d]*[a-z]", text.replace('\\"', '"'))
    longest = " ".join(max(parts, key=len).replace("`", "").split())
    return longest if len(longest) > 5 and not re.search(r"[\\{]", longest) else ""


@pytest.mark.parametrize(
    ("kind", "begins", "least"),
    [
        ("of ofengine's own", rf"(?:raise \w*(?:{'|'.join(KINDS)})|(?<![\w.])warn)\(\s*", 300),
        ("of any class", r"raise (?!AssertionError)(?:\w+\.)*[A-Z]\w*\(\s*(?:[\w.()]+, )?", 550),
        ("of a class known in a run", r"raise type\(\w+\)\(\s*", 1),
        ("a line of the log", r"\blog\.(?:warning|error)\(\s*", 12),
        ("a line on stderr", r"(?<![\w.])say\(\s*", 6),
        ("a line of a command", r"\bprint\(\s*(?=[^()]*(?:\([^()]*\)[^()]*)*file=sys\.stderr)", 6),
    ],
)
def test_what_a_message_begins_with_is_on_the_page(kind: str, begins: str, least: int) -> None:
    """Found by a search in the text of the code, and not as the page's maker reads it."""
    looked_for = 0
    for path in MESSAGES.sources():
        for text in re.findall(begins + LITERAL, path.read_text(encoding="utf-8")):
            longest = _longest_part(text)
            looked_for += bool(longest)
            assert longest in PAGE, f"{path}: {text}"
    assert looked_for >= least


def test_no_other_way_to_tell_a_message_is_in_the_code() -> None:
    """Each of these would need to be read by the page's maker, too."""
    ways = r"\bparser\.(?:error|exit)\(|\blog\.(?:exception|critical|log)\(|stderr\.write\(f?\""
    assert [
        f"{path}: {found}"
        for path in MESSAGES.sources()
        for found in re.findall(ways, path.read_text(encoding="utf-8"))
    ] == []


@pytest.mark.parametrize(
    "text",
    [
        "has no sums(...)",
        "has no value(state)",
        "there is no hyper-parameter ‹name›; there are ‹known›",
        "OneFlow's BLAS goes on with kernels for ‹before› (‹why›)",
        "what was trained since the last checkpoint could not be saved: ‹error›",
        "‹text› is below 1",
        "No restart is left of ‹restarts›. Giving up.",
        "ofengine ‹what› needs jsonargparse",
    ],
)
def test_a_message_of_each_kind_is_on_the_page(text: str) -> None:
    assert text in PAGE


def test_no_variant_of_a_message_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MESSAGES, "MOST_VARIANTS", 10**9)
    every = [(each.path, each.line, each.text) for each in MESSAGES.messages()]
    monkeypatch.undo()
    assert [(each.path, each.line, each.text) for each in MESSAGES.messages()] == every
    # A name that is put into what is assigned to it does not make a text of its own at each turn.
    assert not [text for *_, text in every if re.search(r"times ‹\w+› times", text)]
    monkeypatch.setattr(MESSAGES, "MOST_VARIANTS", 3)
    with pytest.raises(ValueError, match="variants, and 3 is the most"):
        MESSAGES.messages()


class Plain(TaskModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.options = options

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum()

    def param_groups(self) -> List[Any]:
        return [{"params": self.layer.parameters(), "lr": 0.1, **self.options}]


def _fit(trainer: Trainer, task: TaskModule) -> None:
    trainer.fit(task, [flow.ones(2, 2)])


def _trainer(**options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(logger=False, enable_checkpointing=False, max_epochs=1, **quiet, **options)


class Reads(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum() * self.layer(batch).mean().item()


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: Trainer(mode="fast"),
        lambda: Trainer(accelerator="gpu"),  # type: ignore[call-arg]
        lambda: Trainer(max_epoch=3),  # type: ignore[call-arg]
        lambda: Trainer(max_time="soon"),
        lambda: _trainer().num_devices,
        lambda: _fit(_trainer(), Plain(lr_scal=1.0)),
        lambda: _fit(_trainer(), Plain(lr_scale=-1.0)),
        lambda: _fit(_trainer(), Plain(lr_decay_scale="half")),
        lambda: _fit(_trainer(mode="graph"), Reads()),
        lambda: _trainer().fit(Plain()),
        lambda: _trainer().test(Plain(), [flow.ones(2, 2)]),
        lambda: _fit(_trainer(callbacks=GradualUnfreezing({0: ["tail"]})), Plain()),
        lambda: Plain.load_from_checkpoint("nowhere.safetensors"),
        lambda: EarlyStopping(monitor=3),  # type: ignore[arg-type]
        lambda: ModelCheckpoint(restore_best=True),
        lambda: Accuracy(num_classes=1),
        lambda: Accuracy().compute(),
    ],
)
def test_an_error_that_is_raised_is_one_of_the_page(mistake: Callable[[], object]) -> None:
    with pytest.raises((OFEngineError, AttributeError)) as raised:
        mistake()
    if not isinstance(raised.value, OFEngineError):
        pytest.fail(f"the mistake is no error of ofengine's: {raised.value!r}")
    said = " ".join(str(raised.value).split())
    assert any(_pattern(text).fullmatch(said) for text in TEXTS), said


def _pattern(text: str) -> re.Pattern[str]:
    """What a text of the page stands for; one that puts in nearly all would match anything."""
    parts = re.split(r"‹[^›]*›", text)
    if sum(map(len, parts)) < 15:
        return re.compile(r"(?!)")
    return re.compile(".*?".join(map(re.escape, parts)), re.DOTALL)
