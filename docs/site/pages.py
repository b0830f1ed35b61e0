"""MkDocs hooks: which pages the site has, under which addresses, and in which order.

The pages are files of the repository, as they stand: each is known to MkDocs by its path from the
repository's root, so that a link that works in the repository works on the site, and one that leads
nowhere fails the strict build. What a page links to that is no page, such as an example, becomes a
page with its code. The order is that of ``docs/<language>/index.md``: a page that is listed there
is in the navigation.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))  # MkDocs loads this file by its path
import drawn
import made
import versions

ROOT = Path(__file__).resolve().parents[2]
VERSION = versions.version_of(ROOT)
PROJECT = ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/RESULTS.md"]
PICTURES = (".svg", ".png")
CODE = {".py": "python", ".sh": "sh", ".cff": "yaml", "": "text"}

TITLES = {
    "en": {
        "home": "ofengine",
        "contents": "All pages",
        "project": "Project",
        "examples": "Programs",
    },
    "zh": {"home": "ofengine", "contents": "全部页面", "project": "项目", "examples": "程序"},
}
LABELS = {
    "CHANGELOG.md": {"en": "Changelog", "zh": "更新日志（英文）"},
    "CONTRIBUTING.md": {"en": "Contributing", "zh": "参与开发（英文）"},
    "SECURITY.md": {"en": "Security", "zh": "安全（英文）"},
    "benchmarks/RESULTS.md": {"en": "Benchmarks", "zh": "基准测试（英文）"},
    "LICENSE": {"en": "Licence", "zh": "许可证（英文）"},
    "CITATION.cff": {"en": "Citation", "zh": "引用（英文）"},
}

_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
_HAN = "[\u3001-\u303f\u4e00-\u9fff\uff00-\uffef]"
_LINE_OF_CHINESE = re.compile(rf"(?<={_HAN})\n *(?={_HAN})")
_LANGUAGES_LINE = re.compile(r"^.*(?:\[简体中文\]|\[English\])\(.*\n", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the site into the folder of this version, and list its pages."""
    config.site_dir = posixpath.join(config.site_dir, VERSION)
    config.nav = _navigation(_language(config))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's pages to what the theme and ``docs_dir`` bring."""
    language = _language(config)
    for path, address in _addresses(language).items():
        files.append(_page(config, path, address, _read(path, language)))
    for path in _linked(language, pictures=True):
        address = f"images/{Path(path).name}"
        files.append(File(path, str(ROOT), config.site_dir, True, dest_uri=address))
    for path in _linked(language):
        files.append(_page(config, f"{path}.md", f"code/{path}/index.html", _as_page(path)))
    for name, text in made.pages().items():
        files.append(_page(config, name, f"{name[:-3]}/index.html", text))
    return files


def on_page_context(context: Dict[str, Any], page: Page, config: MkDocsConfig, **_: Any) -> None:
    """Let the menu of languages lead to the same page in the other language."""
    here = "" if page.url in (".", "./") else page.url
    config.extra["alternate"] = [
        {"name": name, "lang": lang, "link": f"../../{lang}/{VERSION}/{here}"}
        for name, lang in (("English", "en"), ("简体中文", "zh"))
    ]


def on_post_page(output: str, **_: Any) -> str:
    """Take out what the theme would follow to guess the same page in the other language."""
    return re.sub(r'\s*<link rel="alternate"[^>]*>', "", output)


def _language(config: MkDocsConfig) -> str:
    return str(config.theme["language"])


def _pages(language: str) -> List[str]:
    folder = ROOT / "docs" / language
    return sorted(f"docs/{language}/{path.name}" for path in folder.glob("*.md"))


def _readme(language: str) -> str:
    return {"en": "README.md", "zh": "README.zh.md"}[language]


def _addresses(language: str) -> Dict[str, str]:
    """The address of each page of the repository."""
    addresses = {_readme(language): "index.html"}
    for path in _pages(language):
        name = Path(path).stem
        addresses[path] = f"{'contents' if name == 'index' else name}/index.html"
    addresses.update({path: f"{Path(path).stem.lower()}/index.html" for path in PROJECT})
    return addresses


def _read(path: str, language: str) -> str:
    """A page without its line of links to the other language, and with links to pages of code."""
    text = _LANGUAGES_LINE.sub("", (ROOT / path).read_text(encoding="utf-8"), count=1)
    fences = _FENCE.findall(text)
    prose = _LINK.sub(lambda link: link[1] + _target(path, link[2], language) + link[3], text)
    # A browser shows a line break as a space, which Chinese does not have between words.
    prose = _LINE_OF_CHINESE.sub("", prose)
    if path.endswith("/hooks.md"):  # ahead of the order as a text
        picture = drawn.picture(language, "../api/ofengine/")
        prose = re.sub(r"\n\n(?=    setup\(stage\)\n)", f"\n\n{picture}\n\n", prose, count=1)
    # Links are prose's: what stands in a block stays as it is.
    for before, after in zip(_FENCE.findall(prose), fences):
        prose = prose.replace(before, after, 1)
    return prose


def _target(page: str, link: str, language: str) -> str:
    if "://" in link or link.startswith("mailto:"):
        return link
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if page in PROJECT:  # in English only: the pages that it links to are those of the site
        path = re.sub(r"^docs/en/", f"docs/{language}/", path)
        path = _readme(language) if path == "README.md" else path
    for other in TITLES:
        if other != language and path in _addresses(other) and path not in PROJECT:
            up = "../" * _addresses(language)[page].count("/")
            address = posixpath.dirname(_addresses(other)[path])
            return f"{up}../../{other}/{VERSION}/{address}/".replace("//", "/")
    if path in made.MADE_OF:
        path = made.MADE_OF[path]
    elif (ROOT / path).is_file() and not path.endswith((".md", *PICTURES)):
        path += ".md"
    return posixpath.relpath(path, posixpath.dirname(page) or ".")


def _linked(language: str, pictures: bool = False) -> List[str]:
    """The files that a page links to and that are no pages: programs and texts, or pictures."""
    found = {path for path in ("LICENSE", "CITATION.cff") if (ROOT / path).is_file()}
    for page in _addresses(language):
        text = _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
        for link in _LINK.finditer(text):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link[2]))
            is_page = path.endswith(".md") or path in made.MADE_OF
            if (ROOT / path).is_file() and not is_page:
                found.add(path)
    return sorted(path for path in found if path.endswith(PICTURES) == pictures)


def _as_page(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    language = CODE.get(Path(path).suffix, "text")
    # In the search it comes after the pages that explain.
    return f"---\nsearch:\n  boost: 0.2\n---\n# {path}\n\n````{language}\n{text.rstrip()}\n````\n"


def _page(config: MkDocsConfig, path: str, address: str, text: str) -> File:
    page = File.generated(config, path, content=text)
    page.dest_uri = address
    return page


def _navigation(language: str) -> List[Any]:
    titles = TITLES[language]
    navigation: List[Any] = [{titles["home"]: _readme(language)}]
    for title, entries in _sections(language):
        pages = [{name: f"docs/{language}/{file}"} for name, file in entries]
        navigation += [{title: pages}] if title else pages
    navigation += made.navigation(language)
    code = _linked(language)
    project = [{LABELS[path][language]: path} for path in PROJECT]
    project += [{LABELS[path][language]: f"{path}.md"} for path in code if path in LABELS]
    project.append({titles["contents"]: f"docs/{language}/index.md"})
    project.append({titles["examples"]: [f"{path}.md" for path in code if path not in LABELS]})
    return [*navigation, {titles["project"]: project}]


def _sections(language: str) -> List[Tuple[str, List[Tuple[str, str]]]]:
    """The headings of the index, and under each its pages with their titles, as listed."""
    sections: List[Tuple[str, List[Tuple[str, str]]]] = [("", [])]
    for line in (ROOT / f"docs/{language}/index.md").read_text(encoding="utf-8").splitlines():
        row = re.match(r"\| \[([^]]+)\]\(([\w-]+\.md)\)", line)
        if line.startswith("## "):
            sections.append((line[3:].strip(), []))
        elif row:
            sections[-1][1].append((row[1], row[2]))
    return [section for section in sections if section[1]]
