"""One command sets everything up, on the right Python, and installs what it says."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Dict, List, Set, Tuple

import pytest
import setuptools

import ofengine
from ofengine.cli.doctor import REQUIREMENTS

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "setup.cfg").exists():
    pytest.skip("needs the source tree", allow_module_level=True)


@pytest.fixture(scope="module")
def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def lines(text: str) -> List[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


# ---------------------------------------------------------------------- what setup.cfg says


def test_the_version_is_the_package_s(config: configparser.ConfigParser) -> None:
    assert config["metadata"]["version"] == "attr: ofengine.__version__"
    source = (ROOT / "ofengine" / "__init__.py").read_text()
    assert f'__version__ = "{ofengine.__version__}"\n' in source  # setuptools reads the text


def test_the_doctor_knows_what_is_required(config: configparser.ConfigParser) -> None:
    required = lines(config["options"]["install_requires"])
    assert sorted(REQUIREMENTS) == sorted([*required, "protobuf<4"])


def code_files(package: Path) -> Set[str]:
    """Every source file, by its path from the package's folder on; links are followed."""
    return {
        (Path(package.name) / Path(folder).relative_to(package) / file).as_posix()
        for folder, _, files in os.walk(str(package), followlinks=True)
        for file in files
        if file.endswith(".py")
    }


def test_every_folder_of_code_is_a_package_and_no_other_is(
    config: configparser.ConfigParser,
) -> None:
    assert config["options"]["packages"] == "find:"
    include = lines(config["options.packages.find"]["include"])
    folders = {os.path.dirname(file) for file in code_files(ROOT / "ofengine")}
    assert "ofengine/callbacks" in folders
    packages = {folder.replace("/", ".") for folder in folders}
    assert set(setuptools.find_packages(str(ROOT), include=include)) == packages


def test_ofengine_callbacks_is_the_folder_callbacks_in_any_checkout() -> None:
    assert os.readlink(str(ROOT / "ofengine" / "callbacks")) == os.path.join("..", "callbacks")


# ---------------------------------------------------------------------- the wrong Python


@pytest.mark.parametrize("version", [(3, 7, 9), (3, 11, 7), (3, 13, 0)])
def test_setup_says_one_clear_line_on_another_python(version: Tuple[int, int, int]) -> None:
    code = f"import sys; sys.version_info = {version}; exec(open('setup.py').read())"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=str(ROOT), capture_output=True, text=True
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "needs CPython 3.8, 3.9 or 3.10" in line
    assert f"this is {'.'.join(map(str, version))}." in line


READ_BY_MAKE = ("setup.cfg", "setup.py", "pyproject.toml")


class Machine:
    """A machine with a copy of this project and nothing but the programs it is given."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.project = home / "the project"
        for name in (".ci/find-python", ".python-version", "Makefile", *READ_BY_MAKE):
            (self.project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(ROOT / name), str(self.project / name))
        self.environment: Dict[str, str] = {"HOME": str(home), "PATH": ""}
        for tool in ("sh", "dirname", "cat"):
            self.program(f"tools/{tool}", f'exec {shutil.which(tool)} "$@"')

    def program(self, path: str, script: str) -> str:
        """Add a program; its folder joins PATH unless it is one of pyenv or an environment."""
        file = self.home / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!{os.path.realpath('/bin/sh')}\n{script}\n")
        file.chmod(0o755)
        folders = self.environment["PATH"].split(":") if self.environment["PATH"] else []
        if str(file.parent) not in folders and "/bin/" not in path:
            self.environment["PATH"] = ":".join([*folders, str(file.parent)])
        return str(file)

    def python(self, path: str, status: int = 0) -> str:
        """Add a Python that is fit (0), of another version (1) or without ensurepip (2)."""
        return self.program(path, f"echo {self.home / path}; exit {status}")

    def find(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/sh", str(self.project / ".ci" / "find-python")],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def finds(self, python: str) -> bool:
        result = self.find()
        return (result.returncode, result.stdout, result.stderr) == (0, f"{python}\n", "")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_a_python_one_line_says_what_to_install(machine: Machine) -> None:
    machine.python("tools/python3", 1)
    result = machine.find()
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert "no CPython 3.8, 3.9 or 3.10" in line
    assert "pyenv install 3.10" in line


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("target", ["test", "demo"])
def test_make_says_that_line_and_fails(machine: Machine, target: str) -> None:
    result = subprocess.run(
        [str(shutil.which("make")), target],
        cwd=str(machine.project),
        env=machine.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "ofengine: no CPython 3.8, 3.9 or 3.10 found" in result.stderr.splitlines()[0]
    assert not (machine.project / ".venv").exists()


def test_the_newest_python_on_path_is_taken(machine: Machine) -> None:
    machine.python("one/python3.8")
    newest = machine.python("two/python3.10")
    assert machine.finds(newest)


def test_a_shim_that_runs_nothing_is_passed_over(machine: Machine) -> None:
    machine.program("shims/python3.10", "echo 'pyenv: python3.10: command not found' >&2; exit 127")
    real = machine.python("usr/python3.10")
    assert machine.finds(real)


def test_a_plain_python3_of_the_right_version_will_do(machine: Machine) -> None:
    assert machine.finds(machine.python("usr/python3"))


def test_the_active_environment_comes_first(machine: Machine) -> None:
    machine.python("usr/python3.10")
    active = machine.python("active/bin/python")
    machine.environment["VIRTUAL_ENV"] = str(machine.home / "active")
    assert machine.finds(active)


def test_an_active_environment_of_another_python_is_passed_over(machine: Machine) -> None:
    machine.python("active/bin/python", 1)
    machine.environment["VIRTUAL_ENV"] = str(machine.home / "active")
    assert machine.finds(machine.python("usr/python3.9"))


def test_the_python_version_file_comes_before_path(machine: Machine) -> None:
    machine.python("usr/python3.9")
    machine.program("tools/pyenv", f"echo '{machine.home}/its root'")
    machine.python("its root/versions/3.9.18/bin/python")
    wanted = machine.python("its root/versions/3.10.13/bin/python")
    (machine.project / ".python-version").write_text("3.10")
    assert machine.finds(wanted)


def test_pyenv_s_other_versions_come_after_path(machine: Machine) -> None:
    other = machine.python(".pyenv/versions/3.9.18/bin/python")
    assert machine.finds(other)
    assert machine.finds(machine.python("usr/python3.8"))


def test_uv_s_python_is_found_and_fetched_if_need_be(machine: Machine) -> None:
    fetched = machine.python("its uv/bin/python3.10")
    present = machine.home / "present"
    machine.program(
        "tools/uv",
        f"""
        case "$1 $2 $*" in
            "python install "*3.10) : >'{present}' ;;
            "python find "*3.10) [ -e '{present}' ] && echo "{fetched}" ;;
            *) exit 1 ;;
        esac""",
    )
    assert machine.finds(fetched)
    assert present.exists()


def test_a_python_without_ensurepip_is_named_only_if_there_is_no_other(machine: Machine) -> None:
    bare = machine.python("usr/python3.10", 2)
    result = machine.find()
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1
    assert f"{bare} cannot make virtual environments" in line
    assert machine.finds(machine.python("usr/python3.9"))


def test_a_real_environment_leads_to_the_python_it_was_made_from(machine: Machine) -> None:
    machine.environment["VIRTUAL_ENV"] = sys.prefix
    found = Path(machine.find().stdout.strip())
    version = subprocess.run([str(found), "--version"], capture_output=True, text=True).stdout
    assert version == f"Python {sys.version.split()[0]}\n"
    if sys.prefix != sys.base_prefix:
        assert Path(sys.prefix) not in found.parents


# ---------------------------------------------------------------------- what is installed

DIST_INFO = f"ofengine-{ofengine.__version__}.dist-info"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the build reads: building writes beside the sources."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md"):
        shutil.copy(str(ROOT / name), str(copy))
    for name in ("ofengine", "callbacks"):
        shutil.copytree(
            str(ROOT / name),
            str(copy / name),
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    return copy


def build(source: Path, kind: str) -> Path:
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    (source / "dist").mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=str(source), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return source / "dist" / result.stdout.split()[-1]


def build_from_sdist(source: Path) -> Path:
    with tarfile.open(str(build(source, "sdist"))) as archive:
        archive.extractall(str(source / "unpacked"))
    (unpacked,) = (source / "unpacked").iterdir()
    assert not (unpacked / "callbacks").exists()
    return build(unpacked, "wheel")


@pytest.mark.parametrize("made_from", ["checkout", "sdist"])
def test_the_wheel_holds_ofengine_and_nothing_at_top_level_but_it(
    source: Path, made_from: str
) -> None:
    path = build(source, "wheel") if made_from == "checkout" else build_from_sdist(source)
    with zipfile.ZipFile(str(path)) as wheel:
        names = set(wheel.namelist())
        entry_points = wheel.read(f"{DIST_INFO}/entry_points.txt")
        assert wheel.testzip() is None
    # So neither `callbacks` nor a .pth file.
    assert {name.split("/")[0] for name in names} == {"ofengine", DIST_INFO}
    installed = {name for name in names if name.startswith("ofengine/")}
    assert installed == code_files(ROOT / "ofengine") | {"ofengine/py.typed"}
    assert "ofengine/callbacks/__init__.py" in installed
    assert b"ofengine = ofengine.cli:main" in entry_points


def test_an_editable_install_adds_ofengine_to_what_can_be_imported_and_nothing_else(
    source: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site-packages"
    with zipfile.ZipFile(str(build(source, "editable"))) as wheel:
        wheel.extractall(str(site))
    folders = [path.name for path in source.iterdir() if path.is_dir()]
    code = f"""
import importlib.util, site
site.addsitedir({str(site)!r})
for name in {folders}:
    spec = importlib.util.find_spec(name)
    if spec is not None:
        print(spec.origin)
"""
    # Without the site-packages of this Python, which may have an ofengine of its own.
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=str(tmp_path), capture_output=True, text=True
    )
    assert result.stderr == ""
    assert result.stdout.splitlines() == [str(source / "ofengine" / "__init__.py")]
