"""``to_onnx``: onnxruntime computes what ``forward`` does, or nothing is written.

oneflow-onnx is in no environment of the tests: the slow ones fetch it into a folder of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import oneflow as flow
import pytest
from helpers.tiny import Tiny

from ofengine import ConfigurationError

PACKAGES = [
    *("oneflow-onnx==0.6.2", "onnx==1.17.0", "onnxruntime>=1.17", "six", "coloredlogs"),
    *("humanfriendly", "flatbuffers", "sympy", "mpmath", "packaging"),
]
"""Without what they require: OneFlow, numpy and protobuf are there."""

SCRIPT = """
import sys
from pathlib import Path

import numpy as np
import oneflow as flow
import onnxruntime
from oneflow import nn

from ofengine import ConfigurationError, TaskModule
from ofengine.onnx_model import write_onnx


class Net(TaskModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8 * 8 * 8, 10)
        self.example_input_array = flow.randn(2, 3, 16, 16)

    def forward(self, images):
        pooled = nn.functional.max_pool2d(self.body(images), 2)
        return self.head(self.drop(flow.flatten(pooled, 1)))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x, y):
        return {"sum": flow.tanh(self.layer(x)) + y, "share": [flow.softmax(y, dim=1)]}


class Rolling(nn.Module):
    def forward(self, x):
        return flow.roll(x, 1, 0)


def outputs(path, *inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return session.run(None, dict(zip(names, (each.numpy() for each in inputs))))


def off(found, expected):
    return float(np.abs(found - expected.numpy()).max())


net = Net()
net(flow.randn(8, 3, 16, 16))  # running statistics that are not those of the beginning
net.drop.eval()
path = net.to_onnx("net.onnx")
assert net.training and net.body[1].training and not net.drop.training
assert "bool" not in vars(np)
images = flow.randn(2, 3, 16, 16)  # others than those it was traced with
net.eval()
(found,) = outputs(str(path), images)
print("net", off(found, net(images)) < 1e-5)

two, x, y = Two(), flow.randn(3, 4), flow.randn(3, 6)
write_onnx(two, "two.onnx", (flow.zeros(3, 4), flow.zeros(3, 6)))
found, expected = outputs("two.onnx", x, y), two(x, y)
print("two", off(found[0], expected["sum"]) < 1e-5, off(found[1], expected["share"][0]) < 1e-5)

try:
    write_onnx(Rolling(), "roll.onnx", x)
except ConfigurationError as error:
    print("roll", error)
print(sorted(each.name for each in Path().iterdir()))
"""


@pytest.mark.slow
def test_onnxruntime_computes_what_forward_does(tmp_path: Path) -> None:
    packages, work = tmp_path / "packages", tmp_path / "work"
    work.mkdir()
    fetch = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages)]
    subprocess.run([*fetch, *PACKAGES], check=True, capture_output=True)
    ours = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([ours, str(packages)])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=str(work), capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stdout.splitlines() if "not supported" not in line]
    assert [line for line in said if not line.startswith("Unsupported")] == [
        "net True",
        "two True True",
        "roll oneflow-onnx cannot convert the operation 'roll', so nothing was written: write that "
        "in other operations, or give the weights alone to the other library (save_weights).",
        "['net.onnx', 'two.onnx']",
    ]


@pytest.mark.parametrize("sample", [None, {"x": 1}, [1.0], "x"])
def test_without_an_input_it_says_what_to_give(sample: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"to_onnx needs an input.* give input_sample, a tensor or a tuple"
    ):
        Tiny().to_onnx(tmp_path / "x.onnx", sample)


def test_a_package_that_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "oneflow_onnx", None)  # also where it is installed
    with pytest.raises(ConfigurationError, match=r'pip install "ofengine\[onnx\]"'):
        Tiny().to_onnx(tmp_path / "x.onnx", flow.ones(1, 2))
    assert list(tmp_path.iterdir()) == []
