"""`import oneflow` prints nothing of its own accord, and loses nothing that matters."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path
from typing import Callable, Optional, Tuple

import pytest

from ofengine import _startup

ROOT = Path(__file__).resolve().parent.parent
PTH = ROOT / "ofengine" / "_pth.py"
INSTALLED_PTH = Path(sysconfig.get_paths()["purelib"]) / "ofengine.pth"

IBVERBS = "libibverbs not available, ibv_fork_init skipped\n"
DESCRIPTOR = (
    "W20261122 12:51:18.812005  3281 cuda_device_descriptor_class.cpp:48] "
    "CUDA driver version is insufficient for CUDA runtime version\n"
)
MANAGER = (
    "E20261122 12:52:53.843837  4963 cuda_device_manager_factory.cpp:65] Failed to get cuda "
    "runtime version: CUDA driver version is insufficient for CUDA runtime version\n"
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run Python code where the text of `oneflow` is the package `oneflow`."""

    def run_code(
        code: str, oneflow: str, *options: str, without_ofengine: bool = False, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        package = tmp_path / "oneflow"
        package.mkdir()
        (package / "__init__.py").write_text("import os, sys\n" + textwrap.dedent(oneflow))
        paths = [str(tmp_path)] if without_ofengine else [str(tmp_path), str(ROOT)]
        return subprocess.run(
            [sys.executable, *options, "-c", textwrap.dedent(code)],
            cwd=str(tmp_path),
            env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(paths), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    return run_code


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_startup, "_GPU_FILES", ())


def says(*texts: str) -> str:
    return f"os.write(2, {''.join(texts)!r}.encode())\n"


# ---------------------------------------------------------------------- the real OneFlow


@pytest.mark.parametrize(
    "code", ["import ofengine, flowvision", "import flowvision, ofengine", "import oneflow"]
)
def test_every_import_order_prints_nothing(code: str, tmp_path: Path) -> None:
    if not code.startswith("import ofengine") and not INSTALLED_PTH.exists():
        pytest.skip("ofengine is not installed here, so ofengine.pth is missing")
    environment = {key: value for key, value in os.environ.items() if key != "OFENGINE_KEEP_NOISE"}
    if not INSTALLED_PTH.exists():
        environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=str(tmp_path),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (result.returncode, result.stdout) == (0, "")


# ---------------------------------------------------------------------- the filter


@pytest.mark.usefixtures("no_gpu")
def test_known_noise_is_dropped_and_every_other_line_kept_in_order(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with _startup.without_known_noise():
        for text in ("before\n", IBVERBS, "between \\n % 'quoted'\n\n", DESCRIPTOR, MANAGER):
            os.write(2, text.encode())
        os.write(2, b"a last line without an end")
    os.write(2, b"!\n")
    expected = "before\nbetween \\n % 'quoted'\n\na last line without an end!\n"
    assert capfd.readouterr().err == expected


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    "line",
    [
        "I say: " + IBVERBS,
        IBVERBS.replace("skipped", "skipped twice"),
        DESCRIPTOR.replace("cuda_device_descriptor_class.cpp", "another.cpp"),
        DESCRIPTOR.replace("insufficient for", "newer than"),
        "W20261122 rpc_client.cpp:190] LoadServer 127.0.0.1 Failed at 0 times\n",
    ],
)
def test_a_line_that_only_resembles_noise_is_kept(
    line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with _startup.without_known_noise():
        os.write(2, line.encode())
    assert capfd.readouterr().err == line


def test_a_missing_driver_is_news_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_startup, "_GPU_FILES", (os.devnull,))
    with _startup.without_known_noise():
        os.write(2, (IBVERBS + DESCRIPTOR + MANAGER).encode())
    assert capfd.readouterr().err == DESCRIPTOR + MANAGER


def test_more_than_a_pipe_holds_passes_through(capfd: pytest.CaptureFixture[str]) -> None:
    lines = "".join(f"line {number}\n" for number in range(20_000))
    with _startup.without_known_noise():
        sys.__stderr__.flush()  # type: ignore[union-attr]
        with open(2, "w", closefd=False) as stderr:
            stderr.write(lines)
    assert capfd.readouterr().err == lines


def test_noise_can_be_kept(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OFENGINE_KEEP_NOISE", "1")
    with _startup.without_known_noise():
        os.write(2, IBVERBS.encode())
    assert capfd.readouterr().err == IBVERBS


# ---------------------------------------------------------------------- the import


def test_the_import_is_filtered_once_and_leaves_no_trace(run: Run) -> None:
    code = """
        import sys, ofengine
        from ofengine._startup import OneFlowFinder, quiet_oneflow_import
        quiet_oneflow_import()
        assert sys.meta_path.count(OneFlowFinder) == 1
        import importlib.util
        assert importlib.util.find_spec("oneflow") is not None
        import oneflow
        assert type(oneflow.__loader__).__name__ == "SourceFileLoader"
        assert oneflow.__spec__.loader is oneflow.__loader__
        quiet_oneflow_import()
        assert OneFlowFinder not in sys.meta_path
        import os
        os.write(2, b"libibverbs not available, ibv_fork_init skipped\\n")
    """
    result = run(code, says(IBVERBS, "a warning\n") + "print('from Python', file=sys.stderr)\n")
    assert result.returncode == 0
    assert result.stderr == "a warning\nfrom Python\n" + IBVERBS


def test_an_import_that_raises_loses_nothing(run: Run) -> None:
    result = run(
        "import ofengine, oneflow", says(IBVERBS, "the reason\n") + "raise ImportError('no core')\n"
    )
    assert result.returncode == 1
    assert result.stderr.startswith("the reason\nTraceback")
    assert result.stderr.endswith("ImportError: no core\n")


def test_the_last_words_of_a_process_that_dies_in_the_import_come_out(run: Run) -> None:
    result = run("import ofengine, oneflow", says(IBVERBS, "Check failed\n") + "os.abort()\n")
    assert result.returncode < 0
    assert "Check failed\n" in result.stderr
    assert IBVERBS not in result.stderr


def test_an_import_that_waits_is_heard_while_it_waits(tmp_path: Path) -> None:
    package = tmp_path / "oneflow.py"
    package.write_text(f"import os\n{says('waiting for rank 0' + chr(10))}os.read(0, 1)\n")
    with subprocess.Popen(
        [sys.executable, "-c", "import ofengine, oneflow"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        assert process.stderr.readline() == b"waiting for rank 0\n"
        assert process.poll() is None
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.wait() == 0


@pytest.mark.parametrize("closed", [(2,), (0, 2), (0, 1), (0, 1, 2)])
def test_closed_descriptors_do_no_harm(run: Run, closed: Tuple[int, ...]) -> None:
    code = f"""
        import os
        kept = os.dup(1)
        for descriptor in {closed}:
            os.close(descriptor)
        import ofengine, oneflow
        os.write(kept, b"imported")
    """
    result = run(code, "try:\n    " + says(IBVERBS) + "except OSError:\n    pass\n")
    assert (result.returncode, result.stdout, result.stderr) == (0, "imported", "")


@pytest.mark.parametrize("replacement", ["io.StringIO()", "None"])
def test_a_replaced_sys_stderr_is_left_alone(run: Run, replacement: str) -> None:
    code = f"""
        import io, sys
        sys.stderr = {replacement}
        import ofengine, oneflow
        print(sys.stderr and sys.stderr.getvalue())
    """
    result = run(code, says(IBVERBS, "kept\n") + "sys.stderr and sys.stderr.write('hello')\n")
    assert result.stderr == "kept\n"
    assert result.stdout == ("None\n" if replacement == "None" else "hello\n")


def test_keep_noise_leaves_the_import_alone(run: Run) -> None:
    result = run("import ofengine, oneflow", says(IBVERBS), OFENGINE_KEEP_NOISE="1")
    assert result.stderr == IBVERBS


# ---------------------------------------------------------------------- ofengine.pth


def test_the_pth_makes_an_import_of_oneflow_alone_quiet(run: Run) -> None:
    code = f"""
        exec(open({str(PTH)!r}).read())
        import oneflow
        assert not [finder for finder in sys.meta_path if "OFEngine" in str(finder)]
    """
    assert run(code, says(IBVERBS, "kept\n"), "-S").stderr == "kept\n"


def test_the_pth_imports_nothing_at_start(run: Run) -> None:
    code = f"""
        import sys
        text = open({str(PTH)!r}).read()
        before = set(sys.modules)
        exec(text)
        assert set(sys.modules) == before
        import json
        assert "ofengine" not in sys.modules
    """
    result = run(code, "", "-S")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("broken", [None, "1 / 0"])
def test_the_pth_is_silent_where_ofengine_is_gone_or_broken(
    run: Run, tmp_path: Path, broken: Optional[str]
) -> None:
    if broken is not None:
        (tmp_path / "ofengine").mkdir()
        (tmp_path / "ofengine" / "__init__.py").write_text(broken)
    code = f"exec(open({str(PTH)!r}).read())\nimport oneflow; print(oneflow.answer)"
    result = run(code, says("kept\n") + "answer = 42\n", "-S", without_ofengine=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "42\n", "kept\n")
