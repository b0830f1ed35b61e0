"""Builds the site in both languages, strictly and without a network, and looks through it.

    python docs/site/build.py            # into site/
    python docs/site/build.py --serve    # and shows it at http://127.0.0.1:8000

``site/<language>/<version>`` is made anew. Folders of other versions stay, those of releases that
are not there are built from their tags (versions.py), and the menu of versions lists them.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import logging
import multiprocessing
import re
import socket
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, List, Optional, Set, Tuple
from urllib.parse import unquote, urljoin, urlparse

import jieba
import versions
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import MkDocsException

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SITE = ROOT / "site"
LANGUAGES = {"en": "mkdocs.yml", "zh": "mkdocs.zh.yml"}


def _no_network(*_: Any) -> None:
    raise OSError("the site is built without a network")


def build_language(language: str) -> Optional[str]:
    """Build one language; return what went wrong, or None."""
    socket.socket.connect = _no_network  # type: ignore[method-assign,assignment]
    logging.basicConfig(format=f"{language}: %(levelname)s %(message)s", level=logging.WARNING)
    warned: List[str] = []

    class Warned(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warned.append(record.getMessage())

    logging.getLogger("mkdocs").addHandler(Warned(logging.WARNING))
    jieba.setLogLevel(logging.WARNING)
    config = load_config(str(HERE / LANGUAGES[language]))
    config.plugins.on_startup(command="build", dirty=False)
    try:
        build(config)
    except MkDocsException as error:
        return f"{language}: {error}"
    finally:
        config.plugins.on_shutdown()
    return f"{language}: {len(warned)} warnings" if warned else None


MARKDOWN = re.compile(r"\*\*|`|\]\(|\n\s*(?:[-*] |1\. |\||#+ )|[\u4e00-\u9fff]\n *[\u4e00-\u9fff]")
"""What a paragraph has where its Markdown was not understood, or lines of Chinese not joined."""
SEARCHED = {"en": ["lr_decay_scale", "resumed"], "zh": ["lr_decay_scale", "学习率", "检查点"]}
"""Words that the search has to find, by language."""


class Links(HTMLParser):
    """What a page links to or loads, the anchors that it has, and Markdown that is left in it."""

    def __init__(self) -> None:
        super().__init__()
        self.links: List[str] = []
        self.loaded: List[str] = []
        self.anchors: Set[str] = set()
        self.left: List[str] = []
        self._inside: List[str] = []

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        """Note what the tag of a page says."""
        if tag in ("article", "p", "td", "li", "code", "pre", "script"):
            self._inside.append(tag)
        given = dict(attrs)
        self.anchors.update(filter(None, (given.get("id"), given.get("name"))))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        for key in ("src", "href"):
            if tag != "a" and given.get(key) and given.get("rel") not in ("canonical", "alternate"):
                self.loaded.append(given[key] or "")

    def handle_endtag(self, tag: str) -> None:
        """Leave it."""
        if tag in self._inside:
            while self._inside.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        """Note text that reads as Markdown where it should not."""
        is_code = {"code", "pre", "script"}.intersection(self._inside)
        if "article" in self._inside and not is_code and MARKDOWN.search(data):
            self.left.append(data.strip())


def look_through(folder: Path) -> List[str]:
    """What is wrong in the pages of ``folder``.

    Links that lead nowhere, things that are loaded from elsewhere, Markdown that was not
    understood, and words that the search does not find.
    """
    pages = {path: Links() for path in sorted(folder.rglob("*.html"))}
    for path, page in pages.items():
        page.feed(path.read_text(encoding="utf-8"))
    wrong = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links begin at the server's root
            continue
        here = path.relative_to(ROOT)
        wrong += [f"{here} loads {each}" for each in page.loaded if urlparse(each).netloc]
        wrong += [f"{here} shows Markdown: {each[:60]!r}" for each in page.left]
        for link in page.links + page.loaded:
            parsed = urlparse(link)
            if parsed.scheme or parsed.netloc:
                continue
            target = Path(unquote(urlparse(urljoin(path.as_uri(), link)).path))
            target = target / "index.html" if target.is_dir() else target
            anchors = pages[target].anchors if target in pages else None
            anchor = unquote(parsed.fragment)
            if not target.is_file():
                wrong.append(f"{here} links to {link}, which is not there")
            elif anchor and anchors is not None and anchor not in anchors:
                wrong.append(f"{here} links to {link}, which has no such place")
    for language, words in SEARCHED.items():
        for index in folder.glob(f"{language}/*/search/search_index.json"):
            pages_of_it = json.loads(index.read_text("utf-8"))["docs"]
            # Chinese words are divided by spaces of no width.
            found = [each["text"].replace("\u200b", "") for each in pages_of_it]
            wrong += [
                f"{index.relative_to(ROOT)} does not have {word}"
                for word in words
                if not any(word in each for each in found)
            ]
    return wrong


def _lead(page: Path, to: str) -> None:
    page.write_text(
        f'<!doctype html><meta charset="utf-8"><title>ofengine</title>'
        f'<meta http-equiv="refresh" content="0; url={to}"><a href="{to}">ofengine</a>\n'
    )


def main() -> int:
    """Build, look through, and, where asked to, show the site; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--serve", action="store_true", help="show it, until Ctrl-C")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    with multiprocessing.Pool(len(LANGUAGES)) as pool:
        wrong = [each for each in pool.map(build_language, LANGUAGES) if each]
    wrong = wrong or versions.build_releases(ROOT, SITE)
    if not wrong:
        for language in LANGUAGES:
            shown = versions.list_versions(SITE / language)
            _lead(SITE / language / "index.html", f"{shown}/")
        _lead(SITE / "index.html", "en/")
        wrong = look_through(SITE)
    for each in wrong:
        print(each, file=sys.stderr)
    if wrong:
        return 1
    print(f"{sum(1 for _ in SITE.rglob('*.html'))} pages in site/")
    if arguments.serve:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(SITE))
        with http.server.ThreadingHTTPServer(("127.0.0.1", arguments.port), handler) as server:
            print(f"http://127.0.0.1:{arguments.port}/ shows it, until Ctrl-C", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
