"""Looks at every page of the built site in Chromium: `make docs-look`.

    python docs/site/look.py                       # all pages, which takes some minutes
    python docs/site/look.py rates tour            # those whose address has one of these words
    python docs/site/look.py --screenshots shots   # and leaves a picture of each

Each page is shown on a desktop and on a phone, light and dark. Wrong is: an error in the console,
a request that fails or leaves the machine, anything that reaches beyond the screen and is not in a
box that scrolls, a search that does not find its words or finds some for a word that is nowhere, a
menu of versions that does not list them, a switch that leaves the colours as they are.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List

from playwright.sync_api import Browser, Error, Page, TimeoutError, sync_playwright

SITE = Path(__file__).resolve().parents[2] / "site"
SCREENS: Dict[str, Dict[str, int]] = {
    "desktop": {"width": 1280, "height": 900},
    "phone": {"width": 390, "height": 844},
}
SCHEMES = ("light", "dark")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
    "--disable-sync --no-first-run"
)
WORDS = {"en": ("lr_decay_scale", "resume"), "zh": ("学习率", "恢复训练")}
NOWHERE = "qxzvwjkq"

BEYOND = """() => [...document.querySelectorAll('.md-content *')].filter(each => {
    const box = each.getBoundingClientRect()
    if (box.right <= innerWidth + 1 || box.width == 0) return false
    for (let above = each.parentElement; !above.matches('.md-content'); above = above.parentElement)
        if (getComputedStyle(above).overflowX != 'visible') return false
    return true
}).slice(0, 3).map(each => each.tagName + ' ' + each.textContent.slice(0, 60))"""
WIDER = "() => document.documentElement.scrollWidth > document.documentElement.clientWidth"


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing of requests."""


class Look:
    """A page of the browser at one size and in one scheme, and what was wrong in it."""

    def __init__(self, browser: Browser, base: str, screen: str, scheme: str) -> None:
        size: Any = SCREENS[screen]
        context = browser.new_context(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]
        self.page: Page = context.new_page()
        self.base, self.name = base, f"{screen}, {scheme}"
        self.wrong: List[str] = []
        self._said: List[str] = []
        page = self.page
        page.on("console", lambda m: self._said.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self._said.append(str(error)))
        page.on("response", lambda r: self._said.append(r.url) if r.status >= 400 else None)
        page.on("request", lambda request: self._asked(request.url))

    def _asked(self, url: str) -> None:
        if not url.startswith((self.base, "data:", "blob:")):
            self._said.append(f"asks for {url}")

    def show(self, address: str) -> None:
        """Open a page and note what is wrong in it."""
        self._said.clear()
        self.page.goto(self.base + address, wait_until="load")
        said = list(self._said)
        said += ["the page is wider than the screen"] if self.page.evaluate(WIDER) else []
        said += [f"beyond the screen: {each}" for each in self.page.evaluate(BEYOND)]
        self.wrong += [f"{address} ({self.name}): {each}" for each in said]


def _finds(look: Look, address: str, word: str, seconds: int = 20) -> bool:
    """Whether the search shows a result for the word, before so many seconds are over."""
    look.page.goto(look.base + address)
    look.page.locator("input.md-search__input").fill(word, force=True)
    try:
        look.page.wait_for_selector(
            ".md-search-result__item", state="attached", timeout=seconds * 1000
        )
    except TimeoutError:
        return False
    return True


def whole(look: Look, home: str, language: str) -> Iterator[str]:
    """What is wrong with the search, the menu of versions and the switch of colours."""
    for word in WORDS[language]:
        if not _finds(look, home, word):
            yield f"{home}: the search does not find {word}"
    if _finds(look, home, NOWHERE, seconds=3):
        yield f"{home}: the search finds {NOWHERE}"
    look.page.goto(look.base + home)
    look.page.wait_for_selector(".md-version__link", state="attached")
    shown = [each.strip() for each in look.page.locator(".md-version__link").all_inner_texts()]
    versions = json.loads((SITE / language / "versions.json").read_text(encoding="utf-8"))
    if look.page.locator(".md-version__link").count() != len(versions):
        yield f"{home}: the menu of versions has {shown}"
    scheme = "() => document.body.getAttribute('data-md-color-scheme')"
    before = look.page.evaluate(scheme)
    look.page.locator("form[data-md-component=palette] label:not([hidden])").first.click()
    if look.page.evaluate(scheme) == before:
        yield f"{home}: the switch of colours leaves them {before}"


def main() -> int:
    """Look at the pages; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", help="look at these pages alone")
    parser.add_argument("--screenshots", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    found = sorted(
        path.parent.relative_to(SITE).as_posix() for path in SITE.glob("*/*/**/index.html")
    )
    pages = [
        f"{each}/"
        for each in found
        if not arguments.words or any(word in each for word in arguments.words)
    ]
    if not pages:
        print("there is no such page in site/: run `make docs` first", file=sys.stderr)
        return 1
    handler = functools.partial(_Silent, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}/"
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)
    wrong: List[str] = []
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=program, args=QUIET.split())
        except Error as error:
            print(
                f"no Chromium could be started ({str(error).splitlines()[0]}): install it with "
                "`apt-get install chromium` or `.venv-docs/bin/python -m playwright install "
                "chromium`, or say where it is with CHROMIUM=PATH.",
                file=sys.stderr,
            )
            return 1
        for screen in SCREENS:
            for scheme in SCHEMES:
                look = Look(browser, base, screen, scheme)
                for address in pages:
                    look.show(address)
                    if arguments.screenshots:
                        name = f"{address.strip('/').replace('/', '_')}_{screen}_{scheme}.png"
                        look.page.screenshot(path=str(arguments.screenshots / name))
                wrong += look.wrong
                print(f"{len(pages)} pages looked at: {look.name}", flush=True)
        homes = {"/".join(each.split("/")[:2]) + "/" for each in pages}
        for home in sorted(homes):
            look = Look(browser, base, "desktop", "light")
            wrong += whole(look, home, home.split("/")[0])
        browser.close()
    print("\n".join(wrong) or "nothing wrong", file=sys.stderr if wrong else sys.stdout)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
