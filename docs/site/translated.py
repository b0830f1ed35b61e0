"""Says which Chinese page was translated from an English page that has changed since.

    python docs/site/translated.py                     # lists them
    python docs/site/translated.py docs/zh/rates.md    # notes that it is up to date now

A Chinese page ends in a comment with a digest of the English page that it was translated from.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import Dict, List, Optional

ROOT = Path(__file__).resolve().parents[2]
_NOTE = re.compile(r"\n<!-- translated from (\S+) (\w+) -->\n\Z")


def pairs() -> Dict[Path, Path]:
    """The English page of each Chinese one."""
    pages = {path: ROOT / "docs/en" / path.name for path in (ROOT / "docs/zh").glob("*.md")}
    return {ROOT / "README.zh.md": ROOT / "README.md", **dict(sorted(pages.items()))}


def digest(english: Path) -> str:
    """What changes with the page's words, and not with where its lines break."""
    words = " ".join(english.read_text(encoding="utf-8").split())
    return hashlib.sha256(words.encode()).hexdigest()[:12]


def noted(chinese: Path) -> Optional[str]:
    """The digest that the Chinese page was translated from; None where it says none."""
    found = _NOTE.search(chinese.read_text(encoding="utf-8"))
    return found[2] if found else None


def note(chinese: Path) -> None:
    """Note that the Chinese page says what the English one says now."""
    english = pairs()[chinese]
    text = _NOTE.sub("", chinese.read_text(encoding="utf-8")).rstrip("\n") + "\n"
    name = english.relative_to(ROOT).as_posix()
    chinese.write_text(
        f"{text}\n<!-- translated from {name} {digest(english)} -->\n", encoding="utf-8"
    )


def behind() -> List[str]:
    """The Chinese pages whose English page has changed since."""
    return [
        chinese.relative_to(ROOT).as_posix()
        for chinese, english in pairs().items()
        if noted(chinese) != digest(english)
    ]


if __name__ == "__main__":
    for given in sys.argv[1:]:
        note(Path(given).resolve())
    print("\n".join(behind()) or "every Chinese page is up to date")
