"""The versions of the site: which one this tree is, those of releases, the menu of all.

A release is a tag such as ``v0.2.0``. Those that are not in ``site/`` yet are built from their
tags, each by its own ``docs/site/build.py``, so that a fresh clone has all of them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Set, Tuple

NEXT = "next"
"""The version of a tree that goes on behind a release and has its number still."""
BUILT_FROM = "built-from"
"""The file in a release's folder that has the commit of its tag."""

_TAG = re.compile(r"v(\d+(?:\.\d+)*\w*)")


def version_of(root: Path) -> str:
    """The name of the tree's version: its number, or "next" where a tag elsewhere has that."""
    text = (root / "ofengine" / "__init__.py").read_text(encoding="utf-8")
    (number,) = re.findall(r'^__version__ = "(.+)"', text, re.MULTILINE)
    released = releases(root).get(number)
    return NEXT if released and released != _git(root, "rev-parse", "HEAD") else number


def releases(root: Path) -> Dict[str, str]:
    """The commit of each release, by its version, the oldest first.

    None outside a repository, and none where git is not there or refuses to read this one.
    """
    if not (root / ".git").exists():
        return {}
    try:
        tags = _git(root, "tag", "--list", "v*").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return {}
    found = {}
    for tag in tags:
        if _TAG.fullmatch(tag):
            found[tag[1:]] = _git(root, "rev-parse", f"{tag}^{{commit}}")
    return dict(sorted(found.items(), key=lambda each: order(each[0])))


def order(version: str) -> Tuple[bool, List[int], bool, str]:
    """What versions are sorted by: numbers as numbers, 0.2.0rc1 before 0.2.0, "next" last."""
    numbers, rest = re.match(r"((?:\d+\.?)*)(.*)", version).groups()  # type: ignore[union-attr]
    return version == NEXT, [int(n) for n in re.findall(r"\d+", numbers)], not rest, rest


def build_releases(root: Path, site: Path) -> List[str]:
    """Build what is missing in ``site`` of the releases; return what went wrong, a line each."""
    wrong = []
    for version, commit in releases(root).items():
        if version == version_of(root) or _built_from(site, version) == {commit}:
            continue
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder, "tree.tar")
            _git(root, "archive", "--output", str(archive), commit)
            shutil.unpack_archive(archive, folder)
            build = Path(folder, "docs", "site", "build.py")
            if not build.exists():
                print(f"v{version} has no site of its own")
                continue
            built = subprocess.run([sys.executable, str(build)], capture_output=True, text=True)
            if built.returncode:
                wrong += [f"v{version}: {line}" for line in built.stderr.splitlines()]
                continue
            for made in Path(folder, "site").glob(f"*/{version}"):
                place = site / made.parent.name / version
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(made, place)
                (place / BUILT_FROM).write_text(commit)
    return wrong


def _built_from(site: Path, version: str) -> Set[str]:
    """The commits that the folders of a version were built from; "" of one that says none."""
    notes = [path / BUILT_FROM for path in site.glob(f"*/{version}")]
    return {note.read_text() if note.exists() else "" for note in notes}


def list_versions(folder: Path) -> str:
    """Write the versions in ``folder`` for the menu, the newest first; return the one to show.

    It is the newest release, and where there is none yet, the newest.
    """
    found = [path.parent.name for path in folder.glob("*/index.html")]
    versions = sorted(found, key=order, reverse=True)
    rows = [{"version": each, "title": each, "aliases": []} for each in versions]
    (folder / "versions.json").write_text(json.dumps(rows), encoding="utf-8")
    finished = [each for each in versions if re.fullmatch(r"[\d.]+", each)]
    return (finished or versions)[0]


def _git(root: Path, *arguments: str) -> str:
    ran = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
    )
    return ran.stdout.strip()
