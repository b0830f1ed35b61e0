"""The order of the hooks as nested boxes, each hook a link to what it is for."""

from __future__ import annotations

from typing import Dict, List, Sequence, Tuple, Union

Box = Tuple[str, List["Entry"]]  # what it is, by its key in WORDS, and what is in it
Entry = Union[str, Box]

ORDER: List[Entry] = [
    "setup",
    "on_fit_start",
    ("sanity", ["on_sanity_check_start", "=validation", "on_sanity_check_end"]),
    "on_train_start",
    (
        "epoch",
        [
            "on_train_epoch_start",
            (
                "batch",
                [
                    "on_train_batch_start",
                    (
                        "eager",
                        [
                            "on_before_backward",
                            "=backward",
                            "on_after_backward",
                            "=window",
                            "on_before_optimizer_step",
                            "=update",
                            "on_before_zero_grad",
                        ],
                    ),
                    "on_after_optimizer_step",
                    "on_train_batch_end",
                    (
                        "due",
                        [
                            "on_validation_start",
                            "on_validation_epoch_start",
                            (
                                "validation_batch",
                                ["on_validation_batch_start", "on_validation_batch_end"],
                            ),
                            "on_validation_epoch_end",
                            "on_validation_end",
                        ],
                    ),
                ],
            ),
            "on_train_epoch_end",
        ],
    ),
    "on_train_end",
    "on_fit_end",
    "teardown",
]
"""One ``fit``. What begins with = is no hook but something that happens."""


def _evaluation(stage: str) -> List[Entry]:
    """One ``test`` or ``predict``."""
    batches: Box = (f"{stage}_batch", [f"on_{stage}_batch_start", f"on_{stage}_batch_end"])
    begin, end = ([f"on_{stage}_{when}", f"on_{stage}_epoch_{when}"] for when in ("start", "end"))
    return ["setup", *begin, batches, *reversed(end), "teardown"]


BEYOND: List[Box] = [
    ("compiled", ["on_before_graph_compile"]),
    ("raised", ["on_exception", "teardown"]),
    ("test", _evaluation("test")),
    ("predict", _evaluation("predict")),
]
"""What not every ``fit`` fires, and the other verbs, each in a box of its own."""

WORDS: Dict[str, Dict[str, str]] = {
    "en": {
        "fit": "fit",
        "compiled": "in graph mode, in the step, before each compilation",
        "raised": "where an exception, Ctrl-C or SIGTERM ends any of the four verbs",
        "test": "test; validate is the same, with the hooks of validation",
        "test_batch": "for each batch",
        "predict": "predict",
        "predict_batch": "for each batch",
        "sanity": "the sanity check",
        "validation": "the hooks of validation, a few batches",
        "epoch": "for each epoch",
        "batch": "for each batch",
        "eager": "the step; these four in eager mode only",
        "backward": "backward",
        "window": "at the end of an accumulation window:",
        "update": "clipping, update",
        "due": "where validation is due",
        "validation_batch": "for each of its batches",
    },
    "zh": {
        "fit": "fit",
        "compiled": "静态图模式下，在步骤之中，每次编译之前",
        "raised": "四个方法中的任何一个因异常、Ctrl-C 或 SIGTERM 而结束时",
        "test": "test；validate 与它相同，只是换成验证的钩子",
        "test_batch": "每个 batch",
        "predict": "predict",
        "predict_batch": "每个 batch",
        "sanity": "试验证",
        "validation": "验证的各个钩子，几个 batch",
        "epoch": "每个 epoch",
        "batch": "每个 batch",
        "eager": "步骤；这四个钩子只在 eager 模式触发",
        "backward": "backward",
        "window": "在梯度累积窗口结束时：",
        "update": "裁剪、更新",
        "due": "该验证的时候",
        "validation_batch": "验证的每个 batch",
    },
}


def hooks(entries: Sequence[Entry]) -> List[str]:
    """The names of the hooks, in order."""
    found: List[str] = []
    for entry in entries:
        if isinstance(entry, tuple):
            found += hooks(entry[1])
        elif not entry.startswith("="):
            found.append(entry)
    return found


def picture(language: str, api: str) -> str:
    """The boxes as HTML; ``api`` is the address of the page that has ``Callback``."""
    return f'<div class="hooks">{_inside([("fit", ORDER), *BEYOND], language, api)}</div>'


def _inside(entries: Sequence[Entry], language: str, api: str) -> str:
    parts = []
    for entry in entries:
        if isinstance(entry, tuple):
            kind, inner = entry
            title, body = WORDS[language][kind], _inside(inner, language, api)
            parts.append(f'<div class="hooks-box {kind}"><small>{title}</small>{body}</div>')
        elif entry.startswith("="):
            parts.append(f"<i>{WORDS[language][entry[1:]]}</i>")
        else:
            parts.append(f'<a href="{api}#ofengine.Callback.{entry}"><code>{entry}</code></a>')
    return "".join(parts)
