"""Weights to and from PyTorch: to the bit, and no file runs anything or changes half a model.

``files/pytorch/make_files.py`` made the files with PyTorch, and read with it what ofengine wrote.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import oneflow as flow
import pytest
from helpers import bits, quiet_trainer
from oneflow import nn

from ofengine import CheckpointError, OFEngineWarning, TaskModule, load_weights
from ofengine.checkpoint import save_weights
from ofengine.checkpoint.pytorch import encode_pth, weights_in

FILES = Path(__file__).resolve().parent / "files" / "pytorch"
TOLERANCE = 2e-6
"""Between the outputs of both libraries, whose kernels add up in other orders; they are below 2."""


class Net(TaskModule):
    """That of ``make_files.py``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False), nn.ReLU(),
        )  # fmt: skip
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)
        self.register_buffer("mask", flow.tensor([False] * 5))

    def forward(self, images: Any) -> Any:
        features = self.norm(self.body(images).mean((2, 3)))
        return self.head(features) * self.mask.to(flow.float32)


def images() -> Any:
    count = 2 * 3 * 9 * 9
    values = [((7 * i * i + 5 * i + 3) % 13 - 6) / 8 for i in range(count)]
    return flow.tensor(values, dtype=flow.float32).reshape(2, 3, 9, 9)


def told(name: str) -> Dict[str, Any]:
    facts: Dict[str, Any] = json.loads((FILES / name).read_text())
    return facts


def assert_equals_pytorch_s(net: Net, facts: Dict[str, Any], mode: str) -> None:
    for name, tensor in net.state_dict().items():
        dtype, shape, content = facts["tensors"][name]
        assert (str(tensor.dtype), list(tensor.shape)) == (dtype.replace("torch", "oneflow"), shape)
        assert tensor.numpy().tobytes().hex() == content, name
    assert list(net.state_dict()) == list(facts["tensors"])
    (outputs,) = quiet_trainer(mode=mode).predict(net, [images()])
    assert np.abs(outputs.numpy() - np.array(facts["outputs"])).max() < TOLERANCE


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_a_file_of_pytorch_has_the_same_bits_and_outputs(mode: str, name: str) -> None:
    net = Net()
    load_weights(net, FILES / name)
    assert_equals_pytorch_s(net, told("made_by_pytorch.json"), mode)


def test_views_parameters_and_dicts_in_dicts_are_read() -> None:
    net, plain = Net(), Net()
    load_weights(plain, FILES / "net.pth")
    load_weights(net, FILES / "nested.pth", prefix="state_dict.")
    expected = {**bits(plain), "norm.bias": np.full(6, 0.25, "float32").tobytes()}
    assert bits(net) == expected


def trained() -> Net:
    net = Net()
    load_weights(net, FILES / "net.pth")
    with flow.no_grad():
        net.head.weight.copy_(net.head.weight * 2)
        net.norm.weight.copy_(flow.arange(6, dtype=flow.float32) / 8)
    return net


@pytest.mark.parametrize("name", ["written.pth", "written.safetensors"])
def test_pytorch_read_the_same_bits_and_outputs_of_what_was_written(name: str, mode: str) -> None:
    facts = told("read_by_pytorch.json")[name]
    read = (FILES / name).read_bytes()
    assert hashlib.blake2b(read, digest_size=16).hexdigest() == facts["blake2b"]
    assert_equals_pytorch_s(trained(), facts, mode)


def test_what_is_written_is_that_which_pytorch_read(tmp_path: Path) -> None:
    path = save_weights(trained(), tmp_path / "written.pth")
    assert path.read_bytes() == (FILES / "written.pth").read_bytes()
    save_weights(trained(), tmp_path / "written.safetensors")
    begins = [
        each.read_bytes()
        for each in (tmp_path / "written.safetensors", FILES / "written.safetensors")
    ]
    numbers = [each[8 + int.from_bytes(each[:8], "little") :] for each in begins]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 2, 3)])
@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?"])
def test_every_kind_of_number_comes_back(shape: Tuple[int, ...], dtype: str) -> None:
    array = (np.arange(np.prod(shape, dtype=int)) % 3).astype(dtype).reshape(shape)
    content = encode_pth({"a.b": array, "ü": array[...]})
    read = weights_in(Path("x.pth"), content)
    assert list(read) == ["a.b", "ü"]
    for each in read.values():
        assert (each.shape, each.dtype, each.tobytes()) == (shape, array.dtype, array.tobytes())


def test_numbers_that_pytorch_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'a' holds complex64 numbers.* \.pth"):
        encode_pth({"a": np.zeros(2, "c8")})
    with pytest.raises(CheckpointError, match=r"cannot keep metadata: .*\.safetensors"):
        save_weights(Net(), tmp_path / "x.pt", {"epoch": 3})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- names that do not fit


class Other(TaskModule):
    """A network with another head, and without the mask."""

    def __init__(self, outputs: int = 5) -> None:
        super().__init__()
        self.body, self.norm = Net().body, Net().norm
        self.classifier = nn.Linear(6, outputs)


def test_names_that_do_not_fit_are_told_in_one_sentence() -> None:
    net = Other()
    before = bits(net)
    with pytest.raises(
        CheckpointError,
        match=r"lacks 'classifier.bias' and 'classifier.weight' of Other, and has 'head.bias', "
        r"'head.weight' and 'mask' beside it\.$",
    ):
        load_weights(net, FILES / "net.pth")
    assert bits(net) == before
    with pytest.warns(
        OFEngineWarning,
        match=r"'classifier.bias' and 'classifier.weight' of Other stayed as before, and "
        r"'head.bias', 'head.weight' and 'mask' of what was read was not used",
    ):
        load_weights(net, FILES / "net.pth", strict=False)
    plain = Net()
    load_weights(plain, FILES / "net.pth")
    assert bits(net) == {
        name: before[name] if name.startswith("classifier") else bits(plain)[name]
        for name in before
    }


def test_a_shape_that_does_not_fit_is_refused_without_strict_too() -> None:
    net = Net()
    net.head = nn.Linear(6, 7)
    before = bits(net)
    with pytest.raises(CheckpointError, match=r"'head.weight' has the shape \(5, 6\) there and"):
        load_weights(net, FILES / "net.pth", strict=False)
    assert bits(net) == before


@pytest.mark.parametrize("strict", [True, False])
def test_a_prefix_that_is_missing_is_told(strict: bool) -> None:
    with pytest.raises(CheckpointError, match=r"; give prefix='state_dict\.'\.$"):
        load_weights(Net(), FILES / "nested.pth", strict=strict)


# ---------------------------------------------------------------------- files of an enemy


def archive(pickled: bytes, **files: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as made:
        made.writestr("x/data.pkl", pickled)
        for name, each in files.items():
            made.writestr("x/data/" + name.lstrip("_"), each)
    return content.getvalue()


def tensor(
    count: int = 4,
    offset: int = 0,
    shape: Tuple[Any, ...] = (4,),
    strides: Tuple[Any, ...] = (1,),
    kind: str = "FloatStorage",
) -> bytes:
    """The pickle of ``{"w": tensor}``, with what a forger likes."""

    class Written:
        def __reduce__(self) -> Any:
            return _STUBS["_rebuild_tensor_v2"], ("stored", offset, shape, strides, False, None)

    class Pickler(pickle._Pickler):  # type: ignore[name-defined]
        def persistent_id(self, each: Any) -> Any:
            return ("storage", _STUBS[kind], "0", "cpu", count) if each == "stored" else None

        def save_global(self, each: Any, name: Any = None) -> None:
            self.write(f"c{each.module}\n{each.__name__}\n".encode())

    Pickler.dispatch = {**pickle._Pickler.dispatch, type(tensor): Pickler.save_global}  # type: ignore[attr-defined]
    content = io.BytesIO()
    Pickler(content, 2).dump({"w": Written()})
    return content.getvalue()


def _stub(module: str, name: str) -> Any:
    def stub() -> None: ...

    stub.__name__, stub.module = name, module  # type: ignore[attr-defined]
    return stub


_STUBS = {
    name: _stub(module, name)
    for module, name in [
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch", "FloatStorage"),
        ("torch", "BFloat16Storage"),
        ("torch", "WrongStorage"),
    ]
}
FOUR = np.arange(4, dtype="float32").tobytes()


def test_the_forger_s_tools_make_a_good_file_too() -> None:
    read = weights_in(Path("x.pth"), archive(tensor(), _0=FOUR))
    assert read["w"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (tensor(shape=(5,)), "reaches to number 4 of a storage that has 4"),
        (tensor(offset=1), "reaches to number 4 of"),
        (tensor(strides=(2,)), "reaches to number 6 of"),
        (tensor(strides=(10**15,)), "reaches to number 3,000,000,000,000,000 of"),
        (tensor(offset=-1), "damaged at byte"),
        (tensor(shape=(-4,)), "damaged at byte"),
        (tensor(strides=(-1,)), "damaged at byte"),
        (tensor(shape=(4.0,)), "damaged at byte"),
        (tensor(shape=(True,)), "damaged at byte"),
        (tensor(shape=(4, 1)), "shape that cannot be"),
        (tensor(shape=(2,) * 40, strides=(0,) * 40), "shape that cannot be"),
        (tensor(shape=(1 << 60,), strides=(0,)), "shape that cannot be"),
        (tensor(count=5), "has 16 bytes, and should hold 5 numbers for 'w'"),
        (tensor(count=2**61), "should hold 2,305,843,009,213,693,952"),
        (tensor(kind="BFloat16Storage"), r"bfloat16 numbers, which .* with model.float\(\)"),
        (tensor(kind="WrongStorage"), "asks for torch.WrongStorage, which no weights need"),
        (pickle.dumps([]), "no dict of weights"),
        (pickle.dumps({(1, 2): 3}, 2), "a key in it is a tuple"),
        (pickle.dumps({1.5: 3}, 2), "a key in it is a float"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "too many values, or they are nested"),
        (b"cos\nsystem\n(S'true'\ntR.", "asks for os.system, which no weights need"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "asks for os.system"),
        (b"c__builtin__\neval\n.", "asks for __builtin__.eval"),
        (b"ctorch\nload\n.", "asks for torch.load"),
        (b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "instruction that no weights need"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "instruction that no weights need"),
        (b"I" + b"9" * 100 + b"\n.", "instruction that no weights need"),
        (b"\x80\x02}r\xff\xff\xff\xff", "damaged at byte"),
        (b"", "damaged at byte"),
    ],
)  # fmt: skip
def test_a_forged_pickle_is_refused_and_nothing_changes(
    pickled: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(archive(pickled, _0=FOUR))
    module = nn.Module()
    module.w = nn.Parameter(flow.ones(4))
    with pytest.raises(CheckpointError, match=message):
        load_weights(module, path)
    assert module.w.numpy().tolist() == [1, 1, 1, 1]


def test_what_grows_without_end_ends() -> None:
    """Each of 60 lists holds the one before it twice: 2**60 values in 500 bytes."""
    inner = b"]q\x00" + b"".join(
        b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="too many values"):
        weights_in(Path("x.pth"), archive(b"\x80\x02}X\x01\x00\x00\x00a(" + inner + b"ts."))


def test_a_module_that_was_saved_whole_is_refused_by_its_name() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"it asks for torch\.nn\.modules\.linear\.Linear, which .*model\.state_dict\(\)",
    ):
        load_weights(Net(), FILES / "module.pth")


def test_an_archive_that_is_none_of_pytorch_s_is_refused() -> None:
    def packed(content: bytes) -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as each:
            each.writestr("x/data.pkl", content)
        return made.getvalue()

    def of(*names: str) -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as each:
            for name in names:
                each.writestr(name, tensor())
        return made.getvalue()

    big = io.BytesIO()
    with zipfile.ZipFile(big, "w") as each:
        each.writestr("x/data.pkl", tensor())
        each.writestr("x/byteorder", "big")
    cases: List[Tuple[bytes, str]] = [
        (packed(b"\0" * 10**7), "'x/data.pkl' in it is packed, which torch.save never does"),
        (of("readme.txt"), r"no weights of torch.save: save torch's state_dict\(\)"),
        (of("x/data.pkl", "y/data.pkl"), "no weights of torch.save"),
        (of("data.pkl"), "no weights of torch.save"),
        (archive(tensor()), "'x/data/0' is missing in it"),
        (big.getvalue(), "high byte first"),
        (b"PK\x03\x04" + b"\0" * 100, "damaged or no file of PyTorch's"),
    ]
    for content, message in cases:
        with pytest.raises(CheckpointError, match=message):
            weights_in(Path("x.pth"), content)


def test_files_that_overlap_in_an_archive_are_refused() -> None:
    """A list at the end that names the same bytes many times: a bomb without packing."""
    plain = archive(tensor(), _0=FOUR * 1000)
    start = plain.index(b"PK\x01\x02", plain.rindex(FOUR))
    end = plain.index(b"PK\x05\x06")
    entries = plain[start:end]
    last = entries[entries.rindex(b"PK\x01\x02") :]
    more = [last.replace(b"x/data/0", b"x/data/" + bytes([65 + i])) for i in range(20)]
    listed = entries + b"".join(more)
    head = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 22, 22, len(listed), start, 0)
    with pytest.raises(CheckpointError, match="larger than the file"):
        weights_in(Path("x.pth"), plain[:start] + listed + head)


def test_any_damage_is_refused_in_a_sentence_or_harmless() -> None:
    """1,200 files with some bytes changed, cut off or put in: an error of one class, or tensors."""
    good = (FILES / "nested.pth").read_bytes()
    chance = random.Random(17)
    refused = 0
    for _ in range(1200):
        content = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            place = chance.randrange(len(content))
            what = chance.random()
            if what < 0.7:
                content[place] = chance.randrange(256)
            elif what < 0.85:
                del content[place : place + chance.randrange(1, 50)]
            else:
                content[place:place] = bytes(chance.randrange(256) for _ in range(4))
        try:
            read = weights_in(Path("x.pth"), bytes(content))
        except CheckpointError as error:
            refused += 1
            assert str(error).startswith("x.pth ")
            assert str(error).endswith(".")
        else:
            assert all(isinstance(each, np.ndarray) for each in read.values())
    assert refused > 800


def test_any_pickle_is_refused_in_a_sentence_or_harmless() -> None:
    """The same with the pickle alone, whose checksum is then right."""
    with zipfile.ZipFile(FILES / "nested.pth") as made:
        (name,) = [each for each in made.namelist() if each.endswith("/data.pkl")]
        good = made.read(name)
        files = {
            each.split("/data/")[1]: made.read(each) for each in made.namelist() if "/data/" in each
        }
    chance = random.Random(18)
    refused = 0
    for _ in range(300):
        content = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        try:
            weights_in(Path("x.pth"), archive(bytes(content), **files))
        except CheckpointError:
            refused += 1
    assert refused > 60
