"""Builds the site in both languages, strictly and without a network, and looks through it.

    python docs/site/build.py            # into site/
    python docs/site/build.py --serve    # and shows it at http://127.0.0.1:8000

``site/<language>/<version>`` is made anew. Folders of other versions stay, and the menu of versions
lists them.
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
from typing import Any, Dict, List, Optional, Set, Tuple
from urllib.parse import unquote, urljoin, urlparse

import jieba
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import MkDocsException

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SITE = ROOT / "site"
LANGUAGES = {"en": "mkdocs.yml", "zh": "mkdocs.zh.yml"}
VERSION = re.findall(r'__version__ = "(.+)"', (ROOT / "ofengine/__init__.py").read_text())[0]


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


class Links(HTMLParser):
    """What a page links to or loads, and the anchors that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.links: List[str] = []
        self.loaded: List[str] = []
        self.anchors: Set[str] = set()

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        """Note what the tag of a page says."""
        given = dict(attrs)
        self.anchors.update(filter(None, (given.get("id"), given.get("name"))))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        for key in ("src", "href"):
            if tag != "a" and given.get(key) and given.get("rel") not in ("canonical", "alternate"):
                self.loaded.append(given[key] or "")


def look_through(folder: Path) -> List[str]:
    """What is wrong in the pages of ``folder``: links that lead nowhere, things from elsewhere."""
    pages = {path: Links() for path in sorted(folder.rglob("*.html"))}
    for path, page in pages.items():
        page.feed(path.read_text(encoding="utf-8"))
    wrong = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links begin at the server's root
            continue
        here = path.relative_to(ROOT)
        wrong += [f"{here} loads {each}" for each in page.loaded if urlparse(each).netloc]
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
    return wrong


def list_versions(language: str) -> None:
    """Write the versions that are there for the menu, the newest first, and lead to it."""
    folder = SITE / language
    versions = sorted(
        (path.name for path in folder.iterdir() if (path / "index.html").is_file()),
        key=lambda name: [int(number) for number in re.findall(r"\d+", name)],
        reverse=True,
    )
    rows: List[Dict[str, Any]] = [{"version": v, "title": v, "aliases": []} for v in versions]
    (folder / "versions.json").write_text(json.dumps(rows))
    _lead(folder / "index.html", f"{versions[0]}/")


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
    if not wrong:
        for language in LANGUAGES:
            list_versions(language)
        _lead(SITE / "index.html", f"en/{VERSION}/")
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
