"""The doctor names what is missing and the command that mends it, whatever is broken."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, Tuple

import pytest
from helpers import run_python

from ofengine import cli
from ofengine.cli import doctor
from ofengine.cli.doctor import Facts, diagnose, fits, report

PYTHON = shlex.quote(sys.executable)
ROOT = Path(__file__).resolve().parents[2]

GOOD = {
    "oneflow": "0.9.0",
    "nvidia-cudnn-cu11": "8.6.0.163",
    "nvidia-cublas-cu11": "11.10.3.66",
    "numpy": "1.26.4",
    "protobuf": "3.20.3",
    "flowvision": "0.2.1",
    "attrs": "26.1.0",
    "safetensors": "0.8.0",
    "tqdm": "4.70.1",
}
PASSED: Dict[str, object] = {"import": "0.9.0", "cpu": None, "flowvision": None}


def facts(passed: Dict[str, object], output: str = "", **packages: object) -> Facts:
    found = {**GOOD, **{name.replace("_", "-"): version for name, version in packages.items()}}
    return Facts(found, passed, output)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("version", "requirement", "answer"),
    [
        ("0.9.0", "oneflow>=0.9,<1.1", True),
        ("0.7.0", "oneflow>=0.9,<1.1", False),
        ("1.0.0", "oneflow>=0.9,<1.1", True),
        ("1.1.0", "oneflow>=0.9,<1.1", False),
        ("0.10.0", "oneflow>=0.9,<1.1", True),
        ("1.26.4", "numpy<2", True),
        ("2.0.0", "numpy<2", False),
        ("2.0.0rc1", "numpy<2", False),
        ("3.20.3", "protobuf<4", True),
        ("4.25.9", "protobuf<4", False),
        ("0.2.1", "flowvision==0.2.1", True),
        ("0.2.2", "flowvision==0.2.1", False),
        ("8.6.0.163", "nvidia-cudnn-cu11==8.6.0.163", True),
        (None, "numpy<2", False),
    ],
)
def test_versions_are_compared_as_numbers(version: str, requirement: str, answer: bool) -> None:
    assert fits(version, requirement) is answer


# ---------------------------------------------------------------------- the diagnosis


def test_a_healthy_machine_has_no_problem() -> None:
    assert diagnose(facts(PASSED)) == []
    assert "All is well: training can run on cpu." in report(facts(PASSED), [])


@pytest.mark.parametrize(
    ("package", "version", "command"),
    [
        ("oneflow", None, "'oneflow>=0.9,<1.1'"),
        ("oneflow", "0.7.0", "'oneflow>=0.9,<1.1'"),
        ("numpy", "2.2.6", "'numpy<2'"),
        ("protobuf", "4.25.9", "'protobuf<4'"),
        ("nvidia_cudnn_cu11", None, "nvidia-cudnn-cu11==8.6.0.163"),
        ("nvidia_cublas_cu11", None, "nvidia-cublas-cu11==11.10.3.66"),
        ("safetensors", None, "'safetensors>=0.3.1'"),
    ],
)
def test_each_missing_package_has_its_command(package: str, version: str, command: str) -> None:
    (problem,) = diagnose(facts({}, **{package: version}))
    assert package.replace("_", "-") in problem.what
    assert problem.mend == [f"{PYTHON} -m pip install {command}"]


def test_flowvision_is_mended_with_the_setuptools_that_builds_it() -> None:
    (problem,) = diagnose(facts(PASSED, flowvision="0.2.2"))
    assert problem.mend == [
        f"{PYTHON} -m pip install 'setuptools<81' wheel",
        f"{PYTHON} -m pip install --no-build-isolation flowvision==0.2.1",
    ]


def test_libraries_of_the_system_s_own_are_accepted_where_they_work() -> None:
    found = facts(PASSED, nvidia_cudnn_cu11=None, nvidia_cublas_cu11="11.11.3.6")
    assert diagnose(found) == []
    assert "needs" not in report(found, [])


def test_an_import_that_fails_for_an_unknown_reason_is_shown() -> None:
    trace = "libibverbs not available\n    @ 0x7f46 google::Fail()\nundefined symbol: foo"
    (problem,) = diagnose(facts({}, trace))
    assert "undefined symbol: foo" in problem.what
    assert "0x7f46" not in problem.what
    assert "--force-reinstall --no-deps 'oneflow>=0.9,<1.1' nvidia-cudnn-cu11" in problem.mend[0]


@pytest.mark.parametrize("version", [(3, 7, 9), (3, 11, 7), (3, 13, 0)])
def test_the_wrong_python_is_the_only_problem_named(
    monkeypatch: pytest.MonkeyPatch, version: Tuple[int, int, int]
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    monkeypatch.setattr(platform, "python_version", lambda: ".".join(map(str, version)))
    (problem,) = diagnose(facts({}, oneflow="0.7.0", numpy="2.2.6"))
    assert f"CPython {'.'.join(map(str, version))}" in problem.what
    assert "uv venv --python 3.10 .venv" in problem.mend


def test_another_system_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    (problem,) = diagnose(facts({}))
    assert "Linux x86-64 only; this is Darwin arm64" in problem.what


# ---------------------------------------------------------------------- the report


def test_the_report_fits_a_terminal_and_shows_what_was_not_reached() -> None:
    found = facts({"import": "0.9.0"}, "a line of the failure\n" * 30, numpy="2.2.6")
    lines = report(found, diagnose(found)).splitlines()
    assert max(len(line) for line in lines if sys.executable not in line) <= 80
    assert "  import oneflow       ok" in lines
    assert "  train on cpu         FAILED" in lines
    assert "  import flowvision    not reached" in lines
    assert "  numpy                2.2.6        needs <2" in lines


def test_gpus_are_listed_and_training_is_said_to_run_on_them() -> None:
    devices = {"devices": ["NVIDIA A", "NVIDIA B"], "cuda:0": None, "cuda:1": None}
    text = report(facts({**PASSED, **devices}), [])
    assert (
        "  GPU                  cuda:0  NVIDIA A\n                       cuda:1  NVIDIA B" in text
    )
    assert "All is well: training can run on cpu, cuda:0, cuda:1." in text


def test_a_gpu_that_cannot_compute_leaves_the_cpu() -> None:
    found = facts({**PASSED, "devices": ["NVIDIA A"]}, "no kernel image is available")
    assert diagnose(found) == []
    text = report(found, [])
    assert "  compute on cuda:0    FAILED" in text
    assert "no kernel image is available" in text
    assert 'Training can run on cpu only: say Trainer(device="cpu").' in text


UNUSABLE = (
    "cuda:0 has compute capability 9.0, and OneFlow 0.9.0 has machine code for 6.0 to 8.9 only"
)


def test_a_gpu_that_oneflow_has_no_code_for_is_told_of() -> None:
    devices = {"devices": ["NVIDIA H200"], "unusable": {"cuda:0": UNUSABLE}}
    found = facts({**PASSED, **devices})
    assert diagnose(found) == []
    text = report(found, [])
    assert "  compute on cuda:0    not tried, see below\n" in text
    assert f"cuda:0 was left alone: {UNUSABLE}." in " ".join(text.split())
    assert text.endswith("\nTraining can run on cpu.")


def test_a_gpu_beside_one_that_oneflow_has_no_code_for() -> None:
    unusable = {"cuda:0": UNUSABLE, "cuda:1": None}
    found = {**PASSED, "devices": ["NVIDIA H200", "NVIDIA A100"], "unusable": unusable}
    text = report(facts({**found, "cuda:1": None}), [])
    assert "  compute on cuda:1    ok\n" in text
    assert text.endswith("\nTraining can run on cpu, cuda:1.")
    text = report(facts(found, "no kernel image"), [])
    assert "  compute on cuda:1    FAILED\n" in text
    assert "On cuda:1 OneFlow 0.9" in text


# ---------------------------------------------------------------------- the command


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the doctor where fake packages lie before the real ones."""

    def run_doctor(fake: str = "", **versions: str) -> subprocess.CompletedProcess[str]:
        if fake:
            (tmp_path / "oneflow.py").write_text(fake)
        for name, version in versions.items():
            folder = tmp_path / f"{name}-{version}.dist-info"
            folder.mkdir()
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            (folder / "METADATA").write_text(metadata)
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        return run_python("-m", "ofengine", "doctor", cwd=str(tmp_path), env=environment)

    return run_doctor


def test_this_machine_is_healthy(run: Run) -> None:
    result = run()
    assert (result.returncode, result.stderr) == (0, "")
    assert "All is well" in result.stdout
    assert "OneFlow's launch race is mended" in result.stdout


def test_a_placeholder_of_oneflow_is_reported(run: Run) -> None:
    result = run("raise RuntimeError('This package is a placeholder.')", oneflow="0.7.0")
    assert (result.returncode, result.stderr) == (1, "")
    assert "oneflow is 0.7.0. ofengine needs oneflow>=0.9,<1.1" in result.stdout


GPU = """
import os
import oneflow as flow

def end(*_, **__):  # as on an H200, whatever is computed there
    os.abort()

real = flow.ones
flow.ones = lambda *sizes, **options: end() if "device" in options else real(*sizes, **options)
flow.Generator = flow.cuda.synchronize = flow.Tensor.cuda = end
flow.cuda.is_available = lambda: True
flow.cuda.device_count = lambda: 1
flow.cuda.get_device_name = lambda index: "NVIDIA Test"
flow.cuda.get_device_capability = lambda index: CAPABILITY
"""


@pytest.mark.parametrize("capability", [(9, 0), (8, 9)])
def test_a_gpu_is_computed_on_only_where_oneflow_has_code_for_it(
    tmp_path: Path, run: Run, capability: Tuple[int, int]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(GPU.replace("CAPABILITY", repr(capability)))
    result = run()
    assert result.returncode == 0, result.stderr
    assert "cuda:0  NVIDIA Test" in result.stdout
    if capability == (9, 0):
        assert UNUSABLE in " ".join(result.stdout.split())
        assert "Training can run on cpu." in result.stdout
    else:  # the stand-in does its part
        assert "compute on cuda:0    FAILED" in result.stdout
        assert "The process was ended by signal 6." in result.stdout


def test_numpy_2_is_reported(run: Run) -> None:
    result = run("raise RuntimeError('Unable to import Numpy array')", numpy="2.0.1")
    assert (result.returncode, result.stderr) == (1, "")
    assert "-m pip install 'numpy<2'" in result.stdout


def test_a_oneflow_that_ends_the_process_is_reported(run: Run) -> None:
    result = run("import os; os.write(2, b'Check failed: driver\\n'); os.abort()", oneflow="0.9.0")
    assert (result.returncode, result.stderr) == (1, "")
    assert "Check failed: driver" in result.stdout
    assert "The process was ended by signal 6." in result.stdout


def test_ranks_are_not_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = run("import os; raise ImportError(os.environ.get('RANK', 'no rank'))", oneflow="0.9.0")
    assert "ImportError: no rank" in result.stdout


def test_whether_the_race_is_mended_is_told() -> None:
    healthy = report(facts({**PASSED, "race": "mended"}), [])
    assert "  short graph steps    ok: OneFlow's launch race is mended\n" in healthy
    assert "launch race" not in report(facts({}), [])  # not reached
    text = report(facts({**PASSED, "race": "not for this machine"}), [])
    assert "OneFlow's launch race is not mended: not for this machine." in text


def test_the_exit_status_follows_the_problems(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: facts(PASSED))
    assert cli.main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "examine", lambda: facts({}, numpy="2.2.6"))
    assert cli.main(["doctor"]) == 1
    assert "Mend the above, then run this again." in capsys.readouterr().out


def test_without_a_command_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([])
    assert exit_.value.code == 2
    assert "usage: ofengine" in capsys.readouterr().err


def test_the_blas_kernels_are_told() -> None:
    assert "BLAS" not in report(facts(PASSED), [])
    found = {**PASSED, "blas": ["Haswell", "Barcelona", "chosen for a test", False]}
    assert "  BLAS kernels         for Haswell, chosen for a test\n" in report(facts(found), [])
    found["blas"] = ["Haswell", "Barcelona", "chosen for a test", True]
    assert "for Haswell, chosen for a test; mended: after a product" in report(facts(found), [])
    found["blas"] = ["", "", "not known here", False]
    assert "  BLAS kernels         not known here\n" in report(facts(found), [])
