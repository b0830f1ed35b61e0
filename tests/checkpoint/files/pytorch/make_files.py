"""Makes the files beside it with PyTorch, and reads what ofengine wrote with PyTorch.

Needs PyTorch, numpy and safetensors and nothing else, in an environment of its own (made with
torch 2.14.1, on a CPU)::

    python make_files.py make     # net.pth, net.safetensors, nested.pth, made_by_pytorch.json
    python make_files.py read     # written.pth, written.safetensors -> read_by_pytorch.json

``test_pytorch_weights.py`` has the same small network, writes ``written.*`` and compares.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, Dict, List

import torch
from safetensors.torch import load_file, save_file
from torch import nn

HERE = Path(__file__).resolve().parent


class Net(nn.Module):
    """A small convolutional network with a buffer of each kind that networks have."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False), nn.ReLU(),
        )  # fmt: skip
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)
        self.register_buffer("mask", torch.tensor([True, False, True, True, False]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.norm(self.body(images).mean((2, 3)))
        return self.head(features) * self.mask.to(torch.float32)


def images() -> torch.Tensor:
    """Numbers that no random generator made: multiples of 1/8 in [-0.75, 0.75]."""
    count = 2 * 3 * 9 * 9
    values = [((7 * i * i + 5 * i + 3) % 13 - 6) / 8 for i in range(count)]
    return torch.tensor(values, dtype=torch.float32).reshape(2, 3, 9, 9)


def facts(net: Net) -> Dict[str, Any]:
    """The outputs, and of each tensor its dtype, shape and bytes."""
    net.eval()
    with torch.no_grad():
        outputs: List[List[float]] = net(images()).tolist()
    tensors = {
        name: [str(t.dtype), list(t.shape), t.contiguous().numpy().tobytes().hex()]
        for name, t in net.state_dict().items()
    }
    return {"torch": torch.__version__, "outputs": outputs, "tensors": tensors}


def make() -> None:
    """A trained network, as PyTorch saves it."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):  # running statistics and weights that no initialization has
        optimizer.zero_grad()
        net(images()).square().mean().backward()
        optimizer.step()
    state = net.state_dict()
    torch.save(state, HERE / "net.pth")
    save_file(state, HERE / "net.safetensors")
    views = dict(state)  # a transposed view, an expanded one, one with an offset; parameters
    weight = net.head.weight
    views["head.weight"] = nn.Parameter(weight.detach().t().contiguous().t())
    views["norm.bias"] = torch.full((1,), 0.25).expand(6)
    views["head.bias"] = torch.cat([torch.zeros(3), net.head.bias.detach()])[3:]
    kept = {"epoch": 3, "state_dict": views, "optimizer": optimizer.state_dict(),
            "dtype": torch.float32, "note": "a text"}  # fmt: skip
    torch.save(kept, HERE / "nested.pth", pickle_protocol=4)
    torch.save({"head": nn.Linear(6, 5)}, HERE / "module.pth")  # a whole module: needs code
    (HERE / "made_by_pytorch.json").write_text(json.dumps(facts(net)) + "\n")


def read() -> None:
    """What PyTorch finds in the files that ofengine wrote."""
    found = {}
    for name in ("written.pth", "written.safetensors"):
        path = HERE / name
        net = Net()
        state = torch.load(path, weights_only=True) if path.suffix == ".pth" else load_file(path)
        net.load_state_dict(state)
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        found[name] = {**facts(net), "blake2b": digest}
    (HERE / "read_by_pytorch.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    {"make": make, "read": read}[sys.argv[1]]()
