"""`ofengine doctor`: can training run here, and if not, what mends it?

OneFlow is imported in a process of its own only: a broken OneFlow may end it.
"""

from __future__ import annotations

import glob
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import textwrap
from typing import Dict, List, NamedTuple, Optional, Tuple

import ofengine

REQUIREMENTS = (
    "oneflow>=0.9,<1.1",
    "nvidia-cudnn-cu11==8.6.0.163",
    "nvidia-cublas-cu11==11.10.3.66",
    "numpy<2",
    "protobuf<4",
    "flowvision==0.2.1",
    "attrs>=21.3",
    "safetensors>=0.3.1",
    "tqdm>=4.60",
)
"""What setup.cfg asks for, and protobuf, which OneFlow asks for."""

_CUDA_LIBRARIES = ("nvidia-cudnn-cu11", "nvidia-cublas-cu11")

_REASONS = {
    "nvidia-cudnn-cu11": " (libcudnn, which OneFlow loads even on a CPU)",
    "nvidia-cublas-cu11": " (libcublas, which OneFlow loads even on a CPU)",
    "numpy": ", because OneFlow 0.9 does not import with numpy 2",
    "protobuf": ", because OneFlow 0.9 does not import with protobuf 4",
    "flowvision": ", because flowvision 0.2.2 does not import with OneFlow 0.9",
}

# Each line that it prints is a JSON list: the check that passed, and what it found.
_PROBE = """
import json, os

def passed(check, found=None):
    os.write(1, (json.dumps([check, found]) + "\\n").encode())

import oneflow as flow
passed("import", flow.__version__)
from ofengine._oneflow.launch_race import mend_launch_race
from ofengine._oneflow.blas import kernels
passed("race", mend_launch_race())
passed("blas", kernels())
weight = flow.ones(2, requires_grad=True)
(weight * weight).sum().backward()
flow.optim.SGD([weight], lr=0.25).step()
assert weight.sum().item() == 1.0
passed("cpu")
try:
    import flowvision
except Exception as error:
    print(f"import flowvision: {type(error).__name__}: {error}")
else:
    passed("flowvision")
from ofengine.run.devices import why_unusable
names = [flow.cuda.get_device_name(index) for index in range(flow.cuda.device_count())]
unusable = {f"cuda:{index}": why_unusable(index) for index in range(len(names))}
passed("devices", names)
passed("unusable", unusable)
for index in range(len(names)):
    if unusable[f"cuda:{index}"] is not None:
        continue  # to compute there would end this process
    flow.ones(2, device=f"cuda:{index}").sum().item()
    passed(f"cuda:{index}")
"""


_CHECKS = {
    "import": "import oneflow",
    "cpu": "train on cpu",
    "flowvision": "import flowvision",
}


class Facts(NamedTuple):
    """What was found on this machine."""

    packages: Dict[str, Optional[str]]
    """Each package of `REQUIREMENTS`, and its version (None: not installed)."""
    passed: Dict[str, object]
    """The checks that passed: import, cpu, flowvision, devices, unusable, cuda:0, ..."""
    output: str
    """Whatever else the checks printed, and how they ended."""


class Problem(NamedTuple):
    """Something that keeps training from running, and the commands that mend it."""

    what: str
    mend: List[str]


def doctor() -> int:
    """Print the report; return 0 where training can run, 1 where something must be mended."""
    facts = examine()
    problems = diagnose(facts)
    print(report(facts, problems))
    return 1 if problems else 0


def examine() -> Facts:
    """Look at this machine. Takes about three seconds."""
    packages: Dict[str, Optional[str]] = {}
    for requirement in REQUIREMENTS:
        name = _name(requirement)
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    passed, output = _probe()
    return Facts(packages, passed, output)


def diagnose(facts: Facts) -> List[Problem]:
    """What must be mended, the cause first."""
    wrong_python = _wrong_python()
    if wrong_python:
        return [wrong_python]  # nothing below can be mended on this Python
    problems = []
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    for requirement in REQUIREMENTS:
        name = _name(requirement)
        found = facts.packages[name]
        if _good(requirement, facts):
            continue
        what = f"{name} is not installed." if found is None else f"{name} is {found}."
        what += f" ofengine needs {requirement}{_REASONS.get(name, '')}."
        mend = [f"{pip} {shlex.quote(requirement)}"]
        if name == "flowvision":
            # It comes as source, and its setup.py needs pkg_resources.
            mend = [f"{pip} 'setuptools<81' wheel", f"{pip} --no-build-isolation {requirement}"]
        problems.append(Problem(what, mend))
    if problems:
        return problems
    for check, title in _CHECKS.items():
        if check not in facts.passed:
            culprits = ("flowvision",) if check == "flowvision" else ("oneflow", *_CUDA_LIBRARIES)
            wanted = [shlex.quote(need) for need in REQUIREMENTS if _name(need) in culprits]
            what = f"`{title}` fails although every package is there:\n{_last_lines(facts.output)}"
            return [Problem(what, [f"{pip} --force-reinstall --no-deps {' '.join(wanted)}"])]
    return []


def report(facts: Facts, problems: List[Problem]) -> str:
    """The text for people: what was found, what to mend, and the verdict."""
    gpus = _gpus(facts)
    lines = [
        f"ofengine {ofengine.__version__}",
        "",
        "Machine",
        _row("Python", f"{platform.python_implementation()} {platform.python_version()}"),
        _row("", sys.executable),
        _row("System", " ".join([platform.system(), platform.machine(), *platform.libc_ver()])),
        _row("CPU", f"{_usable_cores()} of {os.cpu_count()} cores usable"),
        *_gpu_rows(gpus, facts),
        "",
        "Packages",
    ]
    for requirement in REQUIREMENTS:
        name = _name(requirement)
        needed = "" if _good(requirement, facts) else f"needs {requirement[len(name) :]}"
        lines.append(_row(name, f"{facts.packages[name] or 'missing':<12} {needed}"))
    lines += ["", "Checks", *_check_rows(facts, len(gpus))]
    lines += [*_blas_rows(facts), *_race_rows(facts), ""]
    lines += _verdict(facts, problems, len(gpus))
    return "\n".join(line.rstrip() for line in lines)


def _gpu_checks(gpus: int) -> List[str]:
    return [f"cuda:{index}" for index in range(gpus)]


def _failed(facts: Facts, gpus: int) -> str:
    """The first check that failed; "" where all passed that were tried."""
    tried = [*_CHECKS, *(check for check in _gpu_checks(gpus) if check not in _unusable(facts))]
    return next((check for check in tried if check not in facts.passed), "")


def _check_rows(facts: Facts, gpus: int) -> List[str]:
    failed, rows = _failed(facts, gpus), []
    for check, title in {**_CHECKS, **{c: f"compute on {c}" for c in _gpu_checks(gpus)}}.items():
        if check in facts.passed:
            rows.append(_row(title, "ok"))
        elif check in _unusable(facts):
            rows.append(_row(title, "not tried, see below"))
        else:
            rows.append(_row(title, "FAILED" if check == failed else "not reached"))
    return rows


def _race_rows(facts: Facts) -> List[str]:
    """Whether the mend of OneFlow's launch race is in place; nothing where that was not reached."""
    race = facts.passed.get("race")
    if race is None:
        return []
    if race == "mended":
        return [_row("short graph steps", "ok: OneFlow's launch race is mended")]
    what = f"OneFlow's launch race is not mended: {race}."
    return [_row("short graph steps", "may crash on a busy machine:"), *_wrap(what, "    ")]


def _verdict(facts: Facts, problems: List[Problem], gpus: int) -> List[str]:
    lines: List[str] = []
    if problems:
        lines.append("To mend")
        for number, problem in enumerate(problems, 1):
            lines += _wrap(problem.what, f"  {number}. ")
            lines += ["", *(f"       {command}" for command in problem.mend), ""]
        return [*lines, "Training cannot run here yet. Mend the above, then run this again."]
    unusable = _unusable(facts)
    for gpu, reason in unusable.items():
        lines += [*_wrap(f"{gpu} was left alone: {reason}.", ""), ""]
    failed = _failed(facts, gpus)
    if failed:
        lines += [f"On {failed} OneFlow 0.9, made for CUDA 11.7, cannot compute:"]
        lines += [*_wrap(_last_lines(facts.output), "  "), ""]
        return [*lines, 'Training can run on cpu only: say Trainer(device="cpu").']
    works = ", ".join(["cpu", *(each for each in _gpu_checks(gpus) if each in facts.passed)])
    training = "Training" if unusable else "All is well: training"
    return [*lines, f"{training} can run on {works}."]


def fits(version: Optional[str], requirement: str) -> bool:
    """True where `version` meets `requirement`, such as "oneflow>=0.9,<1.1"."""
    if version is None:
        return False
    for sign, bound in re.findall(r"(>=|==|<)([\d.]+)", requirement):
        left, right = _numbers(version), _numbers(bound)
        if not {">=": left >= right, "==": left == right, "<": left < right}[sign]:
            return False
    return True


def _name(requirement: str) -> str:
    return re.split(r"[<>=]", requirement, maxsplit=1)[0]


def _numbers(version: str) -> List[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:4]]


def _probe() -> Tuple[Dict[str, object], str]:
    """Run the checks in a process of their own."""
    # A process that is to meet other ranks would wait for them.
    ranks = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")
    environment = {key: value for key, value in os.environ.items() if key not in ranks}
    environment.update(GLOG_minloglevel="2")
    try:
        result = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
        output, end = result.stdout, result.returncode
    except subprocess.TimeoutExpired as late:
        output, end = late.stdout or b"", None
    passed: Dict[str, object] = {}
    others = []
    for line in output.decode(errors="replace").splitlines():
        try:
            check, found = json.loads(line)
            passed[check] = found
        except (ValueError, TypeError):
            others.append(line)
    if end is None:
        others.append("It did not end within 5 minutes.")
    elif end < 0:
        others.append(f"The process was ended by signal {-end}.")
    return passed, "\n".join(others)


def _wrong_python() -> Optional[Problem]:
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        here = f"{platform.system()} {platform.machine()}"
        what = f"OneFlow 0.9 has wheels for Linux x86-64 only; this is {here}."
        return Problem(what, ["# use a Linux x86-64 machine, container or WSL 2"])
    cpython = platform.python_implementation() == "CPython"
    if cpython and (3, 8) <= sys.version_info[:2] <= (3, 10):
        return None
    what = (
        f"This is {platform.python_implementation()} {platform.python_version()}. OneFlow 0.9 has "
        "wheels for CPython up to 3.10 only (on newer ones pip installs an empty oneflow 0.7.0), "
        "so ofengine needs CPython 3.8, 3.9 or 3.10. With uv, which fetches one:"
    )
    mend = [
        "pip install uv",
        "uv venv --python 3.10 .venv",
        "uv pip install -p .venv .   # in ofengine's folder",
    ]
    return Problem(what, mend)


def _good(requirement: str, facts: Facts) -> bool:
    """True where the package fits. CUDA's libraries may be the system's own, if they work."""
    name = _name(requirement)
    works = name in _CUDA_LIBRARIES and "import" in facts.passed
    return works or fits(facts.packages[name], requirement)


def _gpus(facts: Facts) -> List[str]:
    names = facts.passed.get("devices")
    return [str(name) for name in names] if isinstance(names, list) else []


def _unusable(facts: Facts) -> Dict[str, str]:
    """Each GPU that OneFlow cannot use, and why."""
    found = facts.passed.get("unusable")
    reasons = found.items() if isinstance(found, dict) else ()
    return {str(gpu): str(reason) for gpu, reason in reasons if reason is not None}


def _usable_cores() -> Optional[int]:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _gpu_rows(gpus: List[str], facts: Facts) -> List[str]:
    if gpus:
        return [_row("GPU" if not n else "", f"cuda:{n}  {gpu}") for n, gpu in enumerate(gpus)]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if "cpu" not in facts.passed:
        text = "not looked for: the checks below ended before"
    elif hidden is not None:
        text = f"none that OneFlow sees (CUDA_VISIBLE_DEVICES={hidden!r})"
    elif glob.glob("/dev/nvidia[0-9]*") or os.path.exists("/dev/dxg"):
        text = "there is one, but its driver is too old for CUDA 11.7: update it"
    elif _has_nvidia_card():
        text = "there is one, but no driver: install it (in a container: --gpus all)"
    else:
        text = "none, and none is needed"
    return [_row("GPU", text)]


def _blas_rows(facts: Facts) -> List[str]:
    """Which kernels OneFlow multiplies matrices with on a CPU, which is most of a step's time."""
    found = facts.passed.get("blas")
    if not isinstance(found, list):
        return []
    core, _, why, mended = found
    slow = "; mended: after a product other operators are no slower" if mended else ""
    return [_row("BLAS kernels", f"for {core}, {why}{slow}" if core else why)]


def _has_nvidia_card() -> bool:
    for device in glob.glob("/sys/bus/pci/devices/*"):
        try:
            with open(f"{device}/vendor") as vendor, open(f"{device}/class") as kind:
                if vendor.read().strip() == "0x10de" and kind.read().startswith("0x03"):
                    return True
        except OSError:
            continue
    return False


def _last_lines(output: str) -> str:
    """The end of a failure's output, without the stack trace of a C++ check."""
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith("    @ ")]
    return "\n".join(lines[-8:])


def _row(title: str, text: str) -> str:
    return f"  {title:<20} {text}"


def _wrap(text: str, start: str) -> List[str]:
    """Lines of at most 80 columns; `start` before the first, as much space before the others."""
    lines: List[str] = []
    for line in text.splitlines():
        lines += textwrap.wrap(line, 80 - len(start), break_long_words=False) or [""]
    return [(" " * len(start) if index else start) + line for index, line in enumerate(lines)]
