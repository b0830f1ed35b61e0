"""The site keeps the pages of every release, and leads to the newest."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any, List

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What a release's own docs/site/build.py does, as far as its place and its name matter.
BUILDS = """
import pathlib, re
root = pathlib.Path(__file__).resolve().parents[2]
version = re.findall('"(.+)"', (root / "ofengine/__init__.py").read_text())[0]
for language in ("en", "zh"):
    page = root / "site" / language / version / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f"{language} of {version}")
"""


def _versions() -> Any:
    spec = importlib.util.spec_from_file_location("versions", ROOT / "docs/site/versions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VERSIONS = _versions()


class Repository:
    """A repository of releases, each with a site of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._git("init", "--quiet")
        self.write("docs/site/build.py", BUILDS)

    def write(self, path: str, text: str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def commit(self, version: str, tag: bool = True) -> None:
        self.write("ofengine/__init__.py", f'__version__ = "{version}"\n')
        self.write("notes", f"{version} {tag}")
        self._git("add", ".")
        self._git("commit", "--quiet", "-m", version)
        if tag:
            self._git("tag", "-m", version, f"v{version}")

    def _git(self, *arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        where = ["git", "-C", str(self.folder), "-c", "commit.gpgsign=false"]
        subprocess.run([*where, "-c", "tag.gpgsign=false", *who, *arguments], check=True)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")


def _menu(site: Path) -> List[str]:
    return [row["version"] for row in json.loads((site / "versions.json").read_text())]


def test_releases_that_are_not_there_are_built_from_their_tags(
    repository: Repository, tmp_path: Path
) -> None:
    repository.commit("0.9.0")
    repository.commit("0.10.0")
    repository.commit("0.11.0", tag=False)
    site = tmp_path / "site"
    for version in ("0.11.0", "0.9.0"):  # this one, and one that was built before it had a tag
        (site / "en" / version).mkdir(parents=True)
        (site / "en" / version / "index.html").write_text("not from a tag")
    assert VERSIONS.version_of(repository.folder) == "0.11.0"
    assert VERSIONS.build_releases(repository.folder, site) == []
    for version in ("0.9.0", "0.10.0"):
        for language in ("en", "zh"):
            page = site / language / version / "index.html"
            assert page.read_text() == f"{language} of {version}"
    assert VERSIONS.list_versions(site / "en") == "0.11.0"
    assert _menu(site / "en") == ["0.11.0", "0.10.0", "0.9.0"]
    (site / "en" / "0.9.0" / "index.html").write_text("kept")
    assert VERSIONS.build_releases(repository.folder, site) == []
    assert (site / "en" / "0.9.0" / "index.html").read_text() == "kept"


def test_a_tree_behind_its_release_is_the_next_one(repository: Repository, tmp_path: Path) -> None:
    repository.commit("0.2.0")
    assert VERSIONS.version_of(repository.folder) == "0.2.0"
    repository.commit("0.2.0", tag=False)
    assert VERSIONS.version_of(repository.folder) == "next"
    assert VERSIONS.build_releases(repository.folder, tmp_path / "site") == []
    (tmp_path / "site/en/next").mkdir()
    (tmp_path / "site/en/next/index.html").write_text("this one")
    assert VERSIONS.list_versions(tmp_path / "site/en") == "0.2.0"
    assert _menu(tmp_path / "site/en") == ["next", "0.2.0"]


def test_versions_are_in_their_order() -> None:
    versions = ["next", "0.10.0", "1.0", "0.9.0", "0.10.0rc1", "0.10.1"]
    in_order = ["0.9.0", "0.10.0rc1", "0.10.0", "0.10.1", "1.0", "next"]
    assert sorted(versions, key=VERSIONS.order) == in_order


def test_a_release_that_cannot_be_built_is_an_error_that_names_it(
    repository: Repository, tmp_path: Path
) -> None:
    repository.write("docs/site/build.py", "raise SystemExit('a page is missing')")
    repository.commit("0.1.0")
    repository.commit("0.2.0", tag=False)
    wrong = VERSIONS.build_releases(repository.folder, tmp_path / "site")
    assert wrong == ["v0.1.0: a page is missing"]


def test_a_tree_without_a_repository_or_git_has_its_number(tmp_path: Path) -> None:
    (tmp_path / "ofengine").mkdir()
    (tmp_path / "ofengine/__init__.py").write_text('__version__ = "0.3.0"\n')
    assert VERSIONS.version_of(tmp_path) == "0.3.0"
    assert VERSIONS.releases(tmp_path) == {}
    (tmp_path / ".git").write_text("gitdir: nowhere\n")
    assert VERSIONS.version_of(tmp_path) == "0.3.0"
