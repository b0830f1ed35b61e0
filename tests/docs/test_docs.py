"""What README and docs/ show runs, is complete, and is the same in both languages."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import attrs
import jsonargparse
import pytest
from helpers.resuming import some_slow
from oneflow import nn

import ofengine
from ofengine import GraphModeError, OFEngineError, Trainer, callback
from ofengine.cli import VERBS, main
from ofengine.run import lightning
from ofengine.run.constants import CONSTANTS, constants_only
from ofengine.run.progress import Point, Progress
from ofengine.run.settings import Settings
from ofengine.run.view import RunView
from ofengine.tracing import Trace

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
if not DOCS.exists():
    pytest.skip("needs the source tree", allow_module_level=True)

READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
PAGES = sorted((DOCS / "en").glob("*.md"))
ENGLISH = [READMES[0], *PAGES]
TRANSLATIONS = [(READMES[0], READMES[1]), *((page, DOCS / "zh" / page.name) for page in PAGES)]
ALL = [*READMES, *PAGES, *sorted((DOCS / "zh").glob("*.md")), ROOT / "CONTRIBUTING.md"]
MOST_LINES = 200

# The data that the blocks take for granted, as little of it as there can be.
DATA = """
import warnings
warnings.filterwarnings("ignore", message="ReLU6 module")
import numpy as np
import oneflow as flow
from flowvision.transforms import ToTensor
from ofengine import ImageArrays
from pathlib import Path
from PIL import Image

for name in ("cat", "dog"):
    Path("photos", name).mkdir(parents=True)
    Image.new("RGB", (48, 32)).save(f"photos/{name}/1.png")

train_dataloader = [(flow.randn(8, 3, 32, 32), flow.tensor([3, 7] * 4)) for _ in range(2)]
transform = ToTensor()


def CIFAR10(root, transform):
    return ImageArrays(np.zeros((40, 32, 32, 3), "uint8"), [0] * 40, transform)


"""

# Pages other than these are run with the first stages of MobileNetV2 instead of all seven, which
# takes a third of the time to compile.
WITH_ALL_STAGES = ["README.md", "tutorial.md"]
SHORT = """
import functools
import flowvision.models

flowvision.models.mobilenet_v2 = functools.partial(
    flowvision.models.mobilenet_v2,
    inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]],
)
"""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path) -> List[Tuple[str, str]]:
    """The language and the text of each fenced block; one in a list without its indentation."""
    found = re.findall(r"^( *)```(\w+)\n(.*?)^ *```$", read(path), re.MULTILINE | re.DOTALL)
    return [
        (language, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE))
        for indent, language, text in found
    ]


def python_of(path: Path) -> List[str]:
    return [text for language, text in blocks(path) if language == "python"]


def prose_of(path: Path) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", read(path), flags=re.MULTILINE | re.DOTALL)


def definitions_of(path: Path) -> Iterator[str]:
    """The imports and classes of a page, which the other pages go on from."""
    for text in python_of(path):
        for node in ast.parse(text).body:
            if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef)):
                yield ast.get_source_segment(text, node) or ""


# ---------------------------------------------------------------------- the code


PROGRAMS = [page for page in ENGLISH if python_of(page)]
SLOW_PAGES = ("callbacks.md", "prove.md", "tour.md", "tutorial.md")
QUICK = [page for page in PROGRAMS if page.name not in SLOW_PAGES]


@pytest.mark.parametrize("page", some_slow(PROGRAMS, *QUICK), ids=name_of)
def test_the_python_of_a_page_runs_and_prints_what_it_says(page: Path, tmp_path: Path) -> None:
    before = [] if page in READMES else definitions_of(READMES[0])
    script = tmp_path / "page.py"
    short = [] if page.name in WITH_ALL_STAGES else [SHORT]
    script.write_text("\n".join([DATA, *short, *before, *python_of(page)]), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, str(script)], cwd=str(tmp_path), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for promised in [text for language, text in blocks(page) if language == "text"]:
        assert promised in result.stdout


@pytest.mark.slow
def test_the_commands_of_the_page_on_them_do_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    page = DOCS / "en" / "command-line.md"
    (config,) = (text for language, text in blocks(page) if language == "yaml")
    (promised,) = (text for language, text in blocks(page) if language == "text")
    (tmp_path / "run.yaml").write_text(config, encoding="utf-8")
    commands = [text for language, text in blocks(page) if language == "sh"]
    refused = []
    for command in "".join(commands).splitlines():
        words, _, file = (shlex.split(part) for part in command.partition(">"))
        if words[0] == "pip":
            continue
        capsys.readouterr()
        status = main(words[1:])
        said = capsys.readouterr()
        if status != 0:
            refused.append(said.err)
        if file:
            (tmp_path / file[0]).write_text(said.out, encoding="utf-8")
    assert "".join(refused) == promised
    assert len(list((tmp_path / "ofengine_logs").rglob("config.yaml"))) == 8


@pytest.mark.parametrize("path", [*ENGLISH, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_every_command_of_a_page_is_one_that_there_is(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the options that it has; what it does is tested elsewhere."""

    class Understood(Exception):
        pass

    def stopping(read_arguments: Any) -> Any:
        def stop(parser: Any, words: List[str]) -> None:
            read_arguments(parser, words)
            raise Understood

        return stop

    for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
        monkeypatch.setattr(kind, "parse_args", stopping(kind.parse_args))
    for command in "".join(
        text for language, text in blocks(path) if language == "sh"
    ).splitlines():
        program, *words = shlex.split(command.partition(" > ")[0], comments=True) or [""]
        if program == "ofengine" and words[0] not in VERBS:
            with pytest.raises(Understood):
                main(words)
        elif program == "make":
            targets = [word for word in words if "=" not in word]
            assert [each for each in targets if f"\n{each}:" not in read(ROOT / "Makefile")] == []
        elif program.endswith("python") and words[0] != "-m":
            for option in filter(re.compile("--").match, words[1:]):
                assert f'"{option}"' in read(ROOT / words[0])
        elif program.endswith("python"):
            files = [word for word in words if word.startswith("tests/")]
            assert importlib.util.find_spec(words[1]) and all(
                (ROOT / each).exists() for each in files
            )
        elif program == ".ci/run":
            assert (ROOT / program).exists()
        else:  # of the system, or run by the page on the command line
            assert program in ("", ".", "pip", "nft", "unshare", "ofengine")


def test_some_page_promises_what_is_printed() -> None:
    assert any(language == "text" for page in ENGLISH for language, _ in blocks(page))


def test_the_readme_installs_as_the_page_on_installing_does() -> None:
    for readme, language in zip(READMES, ("en", "zh")):
        page = [text for kind, text in blocks(DOCS / language / "install.md") if kind == "sh"]
        for kind, text in blocks(readme):
            assert kind != "sh" or text in page


# ---------------------------------------------------------------------- both languages


@pytest.mark.parametrize(("english", "chinese"), TRANSLATIONS, ids=name_of)
def test_both_languages_show_the_same_code(english: Path, chinese: Path) -> None:
    assert _code(english) == _code(chinese)


def _code(path: Path) -> List[Tuple[str, str]]:
    """The blocks, without comments, which are translated."""
    without_comments = {
        "python": lambda text: ast.dump(ast.parse(text)),
        "sh": lambda text: re.sub(r" *#.*", "", text),
    }
    return [
        (language, without_comments.get(language, str)(text)) for language, text in blocks(path)
    ]


@pytest.mark.parametrize(("english", "chinese"), TRANSLATIONS, ids=name_of)
def test_both_languages_have_the_same_sections_and_tables(english: Path, chinese: Path) -> None:
    assert _shape(english) == _shape(chinese)


@pytest.mark.parametrize(("english", "chinese"), TRANSLATIONS, ids=name_of)
def test_both_languages_mention_the_same_names(english: Path, chinese: Path) -> None:
    in_english, in_chinese = (
        set(re.findall(r"`([^`]+)`", re.sub(r"\s+", " ", prose_of(page))))
        for page in (english, chinese)
    )
    assert in_english == in_chinese


def _shape(path: Path) -> List[str]:
    """Headings by their depth, rows of tables, items of lists, indented lines of code."""
    text = prose_of(path)
    return [
        *re.findall(r"^(?:#+ |\||- )", text, re.MULTILINE),
        *re.findall(r"^    (?![-`]).*", text, re.MULTILINE),
    ]


def test_every_chinese_page_is_a_translation() -> None:
    chinese = {path.name for path in (DOCS / "zh").glob("*.md")}
    assert chinese == {page.name for page in PAGES}


# ---------------------------------------------------------------------- links and lengths


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_link_leads_somewhere(path: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(path)) if "://" not in link]
    assert links
    broken = []
    for link in links:
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert broken == []


def _anchors(path: Path) -> List[str]:
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(path), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_index_and_the_readme_name_every_page(language: str) -> None:
    readme = READMES[language == "zh"]
    for page in PAGES:
        if page.name != "index.md":
            assert f"]({page.name})" in read(DOCS / language / "index.md")
        assert f"](docs/{language}/{page.name})" in read(readme)


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_a_readme_stays_short(readme: Path) -> None:
    assert len(read(readme).splitlines()) <= MOST_LINES


# ---------------------------------------------------------------------- complete and true

LANGUAGES = pytest.mark.parametrize("language", ["en", "zh"])


@LANGUAGES
def test_the_hook_order_is_that_of_the_code(language: str) -> None:
    order = re.search(r"::\n\n(.*?teardown\(stage\)\n)", callback.__doc__ or "", re.DOTALL)
    assert order is not None
    assert order.group(1) in read(DOCS / language / "hooks.md")


@LANGUAGES
def test_the_table_of_hooks_is_complete_and_has_their_arguments(language: str) -> None:
    rows = _rows(DOCS / language / "hooks.md")
    named = {name: row[1] for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert [hook for hook in callback.HOOKS if hook not in named] == []
    for hook in callback.HOOKS:
        arguments = list(inspect.signature(getattr(callback.Callback, hook)).parameters)[3:]
        if not hook.startswith(("on_test", "on_predict")):  # as in validation
            assert re.findall(r"`(\w+)`", named[hook]) == arguments


@LANGUAGES
def test_the_table_of_arguments_is_complete(language: str) -> None:
    arguments = _arguments_of_the_trainer()
    rows = _rows(DOCS / language / "trainer.md")
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert [argument for argument in arguments if argument not in named] == []


@LANGUAGES
def test_the_table_of_methods_is_complete(language: str) -> None:
    rows = _rows(DOCS / language / "trainer.md")
    named = [name for row in rows for name in re.findall(r"`(\w+)[`(]", row[0])]
    kinds = r"\w+_step|\w+_dataloader|param_groups|configure_\w+|build_graph|on_\w+_checkpoint"
    own = set(dir(ofengine.TaskModule)).difference(dir(nn.Module), callback.HOOKS)
    methods = [
        name
        for name in own
        if re.fullmatch(kinds, name) and inspect.isfunction(getattr(ofengine.TaskModule, name))
    ]
    assert "configure_optimizers" in methods
    assert [name for name in methods if name not in named] == []


@LANGUAGES
@pytest.mark.parametrize(
    ("kind", "place"),
    [(RunView, "trainer"), (Settings, "trainer.settings"), (Progress, "trainer.progress")],
)
def test_all_that_a_run_tells_is_on_its_page_with_its_type(
    kind: type, place: str, language: str
) -> None:
    expected = {f"{place}.{name}": annotation for name, annotation in _public(kind).items()}
    rows = [row for row in _rows(_attributes_page(language)) if row[0].startswith("`trainer.")]
    told = {row[0].strip("`"): row[1].strip("`") for row in rows}
    of_it = {name for name in told if name.partition("(")[0].rpartition(".")[0] == place}
    assert {name: told[name] for name in of_it} == expected


@LANGUAGES
def test_every_point_of_a_run_is_on_the_page(language: str) -> None:
    rows = [row[0].strip("`") for row in _rows(_attributes_page(language))]
    assert [row for row in rows if row.startswith("Point.")] == [str(point) for point in Point]


@LANGUAGES
def test_the_page_says_what_may_be_set_and_what_a_compiled_step_may_not_read(
    language: str,
) -> None:
    own = {name: each for name, each in _own(RunView).items() if isinstance(each, property)}
    assert [name for name, each in own.items() if each.fset is not None] == ["should_stop"]
    section = read(_attributes_page(language)).split("\n## ")[5]
    named = list(dict.fromkeys(re.findall(r"`trainer\.(\w+)`", section)))
    first = next(place for place, name in enumerate(named) if name in CONSTANTS)
    assert first > 3 and len(named) > first + 5
    trainer = Trainer(logger=False, max_epochs=1)
    for place, name in enumerate(named):  # first those that are refused
        is_refused = False
        try:
            with Trace(), constants_only():
                getattr(trainer, name)
        except GraphModeError:
            is_refused = True
        except OFEngineError:  # there was no fit
            pass
        assert is_refused is (place < first), name


def _attributes_page(language: str) -> Path:
    return DOCS / language / "trainer-attributes.md"


def _own(kind: type) -> Dict[str, Any]:
    """What a class has, those that it comes from included, but for object."""
    return {name: each for base in kind.__mro__[-2::-1] for name, each in vars(base).items()}


def _public(kind: type) -> Dict[str, str]:
    """What is public of a class, methods with their arguments, and the type of each."""
    found = {field.name: field.type for field in attrs.fields(kind)} if attrs.has(kind) else {}
    for name, value in _own(kind).items():
        if name[0] == "_" or name in found:
            continue
        if isinstance(value, property):
            found[name] = inspect.signature(value.fget).return_annotation
        else:
            function = getattr(value, "__func__", value)  # of a class method
            call = f"{name}({', '.join(_arguments(function))})"
            found[call] = inspect.signature(function).return_annotation
    return found


_STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def _arguments(function: Callable[..., object]) -> List[str]:
    """Each argument but the first, as it is written in the code."""
    return [
        f"{_STARS.get(each.kind, '')}{each.name}: {each.annotation}"
        + ("" if each.default is each.empty else f" = {each.default!r}")
        for each in list(inspect.signature(function).parameters.values())[1:]
    ]


def _arguments_of_the_trainer() -> List[str]:
    parameters = inspect.signature(Trainer.__init__).parameters.values()
    return [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]


def _rows(path: Path) -> List[List[str]]:
    """The cells of every row of the page's tables."""
    lines = re.findall(r"^\|(.*)\|$", read(path), re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


@LANGUAGES
@pytest.mark.parametrize(
    "module",
    ["ofengine", "ofengine.callbacks", "ofengine.loggers", "ofengine.metrics", "ofengine.rates"],
)
def test_every_public_name_is_told(module: str, language: str) -> None:
    text = "".join(map(read, (DOCS / language).glob("*.md")))
    names = [name for name in importlib.import_module(module).__all__ if name[0] != "_"]
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_name_that_is_mentioned_exists(path: Path) -> None:
    trainer = Trainer(logger=False, max_epochs=1)
    for name in re.findall(r"`trainer\.(\w+)", prose_of(path)):
        assert name in dir(trainer)
    for names in re.findall(r"`Trainer\(([^)`]*)\)?`", prose_of(path)):
        for name in re.findall(r"(\w+)=", names):
            assert name in _arguments_of_the_trainer()
    for name in re.findall(r"`ofengine\.(\w+)", prose_of(path)):
        assert name in ofengine.__all__ or importlib.util.find_spec(f"ofengine.{name}")


NAME = re.compile(r"`(\w+)`")


@LANGUAGES
def test_what_lightning_s_users_are_told_is_not_here_is_not(language: str) -> None:
    sections = read(DOCS / language / "from-lightning.md").split("\n## ")[1:]
    named = [
        {name for row in re.findall(r"^\| (.*?) \|.*", text, re.M) for name in NAME.findall(row)}
        for text in (sections[3], sections[4], sections[6].partition("`BackboneFinetuning` |")[2])
    ]
    assert all(len(each) > 5 for each in named)
    otherwise = {"precision", "strategy"}  # with other values
    assert not (named[0] - otherwise) & set(_arguments_of_the_trainer())
    assert not [name for name in named[1] if hasattr(ofengine.TaskModule, name)]
    assert not named[2] & set(ofengine.callbacks.__all__)


@LANGUAGES
def test_every_hook_of_lightning_s_is_told(language: str) -> None:
    text = read(DOCS / language / "from-lightning.md").split("\n## ")[6]
    rows = [NAME.findall(row) for row in re.findall(r"^\| (.*?) \|.*", text, re.M)][1:]
    ours = {*callback.HOOKS, "state_dict", "load_state_dict"}
    same, others = set(rows[0]), [name for row in rows[1:] for name in row]
    new = ours - same
    assert new == {"on_after_optimizer_step", "on_before_graph_compile"} and not same - ours
    assert all(f"`{name}`" in text for name in new)
    hooks = [name for name in lightning.HOOKS if name.startswith("on_")]
    assert sorted(others) == sorted(hooks)


@LANGUAGES
def test_what_is_new_of_lightning_s_and_all_its_attributes_are_told(language: str) -> None:
    page = DOCS / language / "from-lightning.md"
    named = {name for row in _rows(page) for name in NAME.findall(row[0])}
    assert {"WeightAveraging", "LitLogger"} <= named
    assert "](../../ofengine/run/lightning.py)" in read(page)  # on the site the page made of it


def test_contributing_shows_the_rooms_as_they_are() -> None:
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "tests" / "test_rooms.py")
    assert spec is not None and spec.loader is not None
    rooms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rooms)
    picture = read(ROOT / "CONTRIBUTING.md").split("## Rooms")[1].split("```")[1].strip("\n")
    shown: List[List[str]] = []
    for line in picture.splitlines():
        names = re.findall(r"[\w/]+(?:\.py|/)(?= )", line[: line.find("  ", 3)] + " ")
        if line.startswith(" + "):
            shown[-1] += names
        elif names:
            shown.append(names)
    numbers = []
    for names in shown:
        places = {
            rooms.room_of(name.strip("/").replace(".py", "").replace("/", "."))
            for name in names
            if name != "checkpoint/"  # what of it is in no room above: named behind those
        }
        assert len(places) <= 1, names
        numbers += places
    assert numbers == sorted(numbers)
    unnamed = [room for n, room in enumerate(rooms.ROOMS) if n not in numbers]
    assert [room[0] for room in unnamed] == ["ofengine", "run", "checkpoint.background"]


def test_every_file_that_contributing_names_exists() -> None:
    named = set(re.findall(r"(?<![\w/.-])(?:[\w.]+/)*\w+\.py\b", read(ROOT / "CONTRIBUTING.md")))
    assert len(named) > 10
    folders = (ROOT, ROOT / "ofengine")
    assert [name for name in named if not any((each / name).exists() for each in folders)] == []


def test_contributing_tells_which_files_a_batch_and_a_rate_pass() -> None:
    section = read(ROOT / "CONTRIBUTING.md").split("### How a batch and a rate travel")[1]
    batch, rate = section.split("\n## ")[0].split("\nA rate, ")
    for text, rooms in ((batch, "data modes ranks run"), (rate, "_oneflow callbacks rates")):
        files = re.findall(r"`((\w+)/\w+\.py)`", text)
        assert len(files) >= 8 and {room for _, room in files} == set(rooms.split())
        assert len(re.findall(r"^\d\. ", text, re.M)) == 4


@LANGUAGES
def test_how_it_works_names_what_is_there(language: str) -> None:
    text = read(DOCS / language / "how-it-works.md")
    rooms = "|".join(path.name for path in (ROOT / "ofengine").iterdir() if path.is_dir())
    named = re.findall(rf"(?<!/)\b((?:{rooms})/\w+)(?:\.(\w+))?", text)
    assert len(named) > 10
    for file, name in named:
        code = read(ROOT / "ofengine" / f"{file}.py")
        assert name in ("", "py") or re.search(rf"^(?:def|class) {name}\b", code, re.M), name


@LANGUAGES
def test_how_it_works_names_who_asks_which_mode_it_is(language: str) -> None:
    (row,) = [row for row in _rows(DOCS / language / "how-it-works.md") if row[0] == "`modes/`"]
    asks = re.compile(
        r"\b(?:mode|name)(?:\"\])? == \"(?:eager|graph)\""
        r"|^from ofengine\.modes\.(?:eager|graph|global_graph|several) import",
        re.M,
    )
    asking = {path.name for path in (ROOT / "ofengine/run").glob("*.py") if asks.search(read(path))}
    assert asking == set(re.findall(r"`run/(\w+\.py)`", row[1])) - {"mode.py"}
    callbacks = {name for path in (ROOT / "callbacks").glob("*.py") for name in _asked(path, asks)}
    assert callbacks == set(re.findall(r"`(\w+Callback)`", row[1]))


def _asked(path: Path, asks: re.Pattern[str]) -> List[str]:
    return re.findall(r"^class (\w+)", read(path), re.M) if asks.search(read(path)) else []


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_test_that_is_named_is_there(path: Path) -> None:
    for file, name in re.findall(r"`(tests/[^`:]*)(?:::)?([^`]*)`", prose_of(path)):
        assert (ROOT / file).exists(), file
        assert not name or name in _functions(ROOT / file), f"{file}::{name}"


def _functions(path: Path) -> List[str]:
    """The tests of a file that are run: not those that are skipped."""
    tree = ast.parse(read(path))
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and not any("skip" in ast.dump(mark) for mark in node.decorator_list)
    ]


@LANGUAGES
@pytest.mark.parametrize(("page", "least"), [("reliability.md", 30), ("rate-pictures.md", 10)])
def test_every_promise_names_its_tests(page: str, least: int, language: str) -> None:
    promises = []
    for table in re.findall(r"(?:^\|.*\n)+", read(DOCS / language / page), re.MULTILINE):
        heading, _, *rows = table.splitlines()
        if re.search(r"\| (?:Held by|由谁保证|Test|测试) \|$", heading):
            promises += rows
    assert len(promises) >= least
    assert [row for row in promises if not re.search(r"\| `tests/[^|]*\|$", row)] == []
