"""Where ofengine imports OneFlow, OneFlow's lines about missing hardware do not show; others do."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Callable, Tuple

import pytest

from ofengine._oneflow import quiet

ROOT = Path(__file__).resolve().parent.parent.parent

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
    """Run Python code where the text of ``oneflow`` is the package ``oneflow``."""

    def run_code(code: str, oneflow: str, **environment: str) -> subprocess.CompletedProcess[str]:
        package = tmp_path / "oneflow"
        package.mkdir()
        (package / "__init__.py").write_text("import os, sys\n" + textwrap.dedent(oneflow))
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=str(tmp_path),
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
                **environment,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    return run_code


def says(*texts: str) -> str:
    return f"os.write(2, {''.join(texts)!r}.encode())\n"


needs_no_gpu = pytest.mark.skipif(
    any(map(os.path.exists, ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))),
    reason="with a GPU, OneFlow's lines about its driver are news and are kept",
)


# ---------------------------------------------------------------------- the real OneFlow


@pytest.mark.parametrize(
    "code",
    [
        "import ofengine; ofengine.Trainer",
        "from ofengine import TaskModule",
        "import ofengine.callbacks",
        "import ofengine.rates",
        "import ofengine.loggers",
    ],
)
def test_ofengine_s_import_of_oneflow_prints_nothing(code: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=str(tmp_path),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (result.returncode, result.stdout) == (0, "")


# ---------------------------------------------------------------------- what is held back


@needs_no_gpu
def test_known_noise_is_dropped_and_every_other_line_kept_in_order(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with quiet.quietly():
        for text in ("before\n", IBVERBS, "between \\n % 'quoted'\n\n", DESCRIPTOR, MANAGER):
            os.write(2, text.encode())
        os.write(2, b"a last line without an end")
    os.write(2, b"!\n")
    expected = "before\nbetween \\n % 'quoted'\n\na last line without an end!\n"
    assert capfd.readouterr().err == expected


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
    with quiet.quietly():
        os.write(2, line.encode())
    assert capfd.readouterr().err == line


def test_much_text_passes_through(capfd: pytest.CaptureFixture[str]) -> None:
    lines = "".join(f"line {number}\n" for number in range(20_000))
    with quiet.quietly(), open(2, "w", closefd=False) as stderr:
        stderr.write(lines)
    assert capfd.readouterr().err == lines


def test_an_import_that_raises_loses_nothing(run: Run) -> None:
    code = "import ofengine; ofengine.Trainer"
    result = run(code, says(IBVERBS, "its last words\n") + "raise ImportError('no such library')\n")
    assert result.returncode == 1
    assert result.stderr.startswith("its last words\n")
    assert "no such library" in result.stderr


def test_one_of_several_ranks_is_heard_while_it_waits(run: Run) -> None:
    oneflow = says(IBVERBS, "waiting for the others\n") + "os._exit(3)\n"
    code = "import ofengine; ofengine.Trainer"
    result = run(code, oneflow, WORLD_SIZE="2", RANK="0")
    assert (result.returncode, result.stderr) == (3, IBVERBS + "waiting for the others\n")


@pytest.mark.parametrize("closed", [(2,), (0, 2), (1, 2)])
def test_closed_descriptors_do_no_harm(run: Run, closed: Tuple[int, ...]) -> None:
    closing = "; ".join(f"os.close({number})" for number in closed)
    code = f"""
        import os
        {closing}
        from ofengine._oneflow.quiet import quietly
        with quietly():
            pass
        os._exit(7)
    """
    assert run(code, "").returncode == 7
