"""The examples run from end to end and keep what their texts promise."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import struct
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any, List

import numpy as np
import oneflow as flow
import pytest
from helpers import run_python

from ofengine import Trainer
from ofengine.errors import OFEngineWarning

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CLASSES = 10
PER_FILE = 6
pytestmark = pytest.mark.filterwarnings("ignore:ReLU6 module")


def run_example(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run an example as its users do."""
    return run_python(EXAMPLES / name, *arguments, env={**os.environ, **environment})


def load_example(name: str) -> ModuleType:
    """Import an example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def only_sentence(text: str) -> str:
    """The one line of ``text`` that is not OneFlow's own noise."""
    (line,) = [
        line for line in text.splitlines() if "libibverbs" not in line and "cuda_device" not in line
    ]
    return line


# ---------------------------------------------------------------------- digits_finetune.py


@pytest.mark.slow
def test_two_ranks_learn_the_digits_as_one_process_with_twice_the_accumulation() -> None:
    pytest.importorskip("sklearn")
    common = ("digits_finetune.py", "--epochs", "1", "--device", "cpu")
    started_plainly = run_example(*common, "--devices", "2")
    alone = run_example(*common, "--mode", "eager", "--accumulate", "2")
    assert started_plainly.returncode == alone.returncode == 0, started_plainly.stderr
    digests = [
        re.findall(r"the weights' digest: (\w+)", each.stdout) for each in (started_plainly, alone)
    ]
    assert len(digests[0]) == 1  # rank 0 alone prints
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_two_ranks_learn_the_digits_in_the_mode_that_is_asked_for() -> None:
    pytest.importorskip("sklearn")
    result = run_example(
        *("digits_finetune.py", "--epochs", "1", "--device", "cpu"),
        *("--devices", "2", "--mode", "graph"),
    )
    assert result.returncode == 0, result.stderr
    assert "graph mode" in result.stdout and "eager mode" not in result.stdout


@pytest.mark.parametrize("mode", ["graph", pytest.param("eager", marks=pytest.mark.slow)])
def test_digits_are_learnt_alike_in_both_modes(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curves.png"
    result = run_example(
        *("digits_finetune.py", "--mode", mode, "--epochs", "4", "--device", "cpu"),
        *("--plot", str(picture)),
    )
    assert result.returncode == 0, result.stderr

    held_out = re.findall(r"held-out images of (\S+): (.*)", result.stdout)
    assert [name for name, _ in held_out] == ["0-4", "5-9", "5-9"]
    assert percentages(held_out[0][1])[0] > 95
    before, after = percentages(held_out[1][1])
    assert before < 50
    assert after > 90
    assert percentages(held_out[2][1]) == [before, after]

    assert "weights: 0.0e+00, bit for bit the same" in result.stdout

    # lr * lr_scale at the first step, before any decay event and at the top of the cosine.
    rows = re.findall(r"^  (early|late|head) +[\d,]+ +(\S+) +(\S+)$", result.stdout, re.MULTILINE)
    firsts = {name: float(first) for name, first, _ in rows}
    assert firsts == {"early": 5e-3, "late": 1.5e-2, "head": 5e-2}
    assert all(0 < float(last) < float(first) for _, first, last in rows)

    width, height = png_size(picture)
    assert 800 < width < 3000
    assert 300 < height < 2000


def percentages(text: str) -> List[float]:
    return [float(number) for number in re.findall(r"([\d.]+)%", text)]


def png_size(path: Path) -> List[int]:
    """Width and height from the header of a PNG file that is complete."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    return list(struct.unpack(">II", content[16:24]))


@pytest.mark.parametrize(("module", "package"), [("sklearn", "scikit-learn"), ("matplotlib",) * 2])
def test_digits_names_the_package_that_is_missing(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load_example("digits_finetune")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else find_spec(name)
    )
    assert example.main(["--plot", "curves.png"]) == 1
    assert capsys.readouterr().err == f"This example needs {package}: pip install {package}\n"


@pytest.mark.skipif(flow.cuda.is_available(), reason="there is a GPU")
def test_digits_says_in_a_sentence_that_there_is_no_gpu() -> None:
    pytest.importorskip("sklearn")
    result = run_example("digits_finetune.py", "--device", "cuda")
    assert result.returncode == 1
    assert only_sentence(result.stderr).startswith("device='cuda', but OneFlow finds no GPU here")


# ---------------------------------------------------------------------- layerwise_tutorial.py


@pytest.fixture(scope="module")
def tutorial() -> ModuleType:
    return load_example("layerwise_tutorial")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of CIFAR-10's format, six images in each."""
    root = tmp_path_factory.mktemp("cifar")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for index, name in enumerate(FILES):
        entry = {
            "batch_label": name,
            "labels": labels_of(index),
            "data": pixels_of(index).reshape(PER_FILE, 3072),
            "filenames": [f"{number}.png" for number in range(PER_FILE)],
        }
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    meta = {"label_names": [f"class {number}" for number in range(CLASSES)], "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    return root


FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def pixels_of(file: int) -> np.ndarray:
    """The images of a file: (images, red-green-blue, rows, columns)."""
    return np.random.RandomState(file).randint(0, 256, (PER_FILE, 3, 32, 32)).astype(np.uint8)


def labels_of(file: int) -> List[int]:
    return [(file + 3 * number) % CLASSES for number in range(PER_FILE)]


def test_cifar10_files_are_read_as_they_are_written(tutorial: ModuleType, cifar: Path) -> None:
    to_tensor = tutorial.transforms.ToTensor()
    train = tutorial.cifar10(str(cifar), train=True, transform=to_tensor, checked=False)
    test = tutorial.cifar10(str(cifar), train=False, transform=to_tensor, checked=False)
    assert (len(train), len(test)) == (5 * PER_FILE, PER_FILE)
    assert train.classes[9] == "class 9"
    for dataset, files in ((train, range(5)), (test, [5])):
        images, labels = zip(*(dataset[index] for index in range(len(dataset))))
        expected = np.concatenate([pixels_of(file) for file in files]).astype(np.float32) / 255
        assert np.array_equal(np.stack([image.numpy() for image in images]), expected)
        assert list(labels) == [label for file in files for label in labels_of(file)]


def test_the_tutorial_checks_the_files_and_says_what_is_wrong(cifar: Path) -> None:
    result = run_example("layerwise_tutorial.py", "--data-dir", str(cifar))
    assert (result.returncode, result.stdout) == (1, "")
    assert only_sentence(result.stderr) == (
        f"CIFAR-10 is damaged or not complete in {cifar}/cifar-10-batches-py: --download fetches "
        "it (170 MB), --data-dir names another folder."
    )


def test_without_data_and_network_the_tutorial_says_so_in_a_sentence(tmp_path: Path) -> None:
    result = run_example("layerwise_tutorial.py", "--data-dir", str(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert only_sentence(result.stderr).startswith(f"CIFAR-10 is not there in {tmp_path}/")

    nowhere = "http://127.0.0.1:9"  # the discard port, where nothing listens
    result = run_example(
        *("layerwise_tutorial.py", "--data-dir", str(tmp_path), "--download"),
        http_proxy=nowhere, https_proxy=nowhere, no_proxy="", NO_PROXY="",
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (1, "")
    sentence = only_sentence(result.stderr)
    assert sentence.startswith("CIFAR-10 could not be downloaded from https://")
    assert sentence.endswith(f"where there is a network and unpack it in {tmp_path}.")


def train_tutorial(tutorial: ModuleType, cifar: Path, *options: str) -> Trainer:
    """Two batches of the tutorial."""
    arguments = tutorial.parse(
        [*options, "--device", "cpu", "--batch-size", "6", "--limit-train-batches", "2"]
    )
    to_tensor = tutorial.transforms.ToTensor()
    train = tutorial.cifar10(str(cifar), train=True, transform=to_tensor, checked=False)
    test = tutorial.cifar10(str(cifar), train=False, transform=to_tensor, checked=False)
    trainer: Trainer = tutorial.run(arguments, train, test)
    return trainer


def test_the_tutorial_warns_of_the_pooling_layer_s_group_and_trains_the_others(
    tutorial: ModuleType, cifar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(OFEngineWarning, match="group 'adaptive_avg_pool2d' is empty"):
        trainer = train_tutorial(tutorial, cifar)
    # Batch 0 is followed by a decay event.
    rows = re.findall(r"^(\S+) +(\S+e-\d+) +(\S+e-\d+)$", capsys.readouterr().out, re.MULTILINE)
    assert rows == [
        ("features", "1.00e-03", "9.00e-04"),
        ("adaptive_avg_pool2d", "1.00e-04", "8.00e-05"),
        ("classifier", "1.00e-05", "7.00e-06"),
    ]
    assert trainer.global_step == 2
    assert 0 <= trainer.callback_metrics["val_accuracy"] <= 1


@pytest.mark.filterwarnings("ignore:group 'adaptive_avg_pool2d' is empty")
@pytest.mark.parametrize(
    "groups",
    [
        "decay",
        pytest.param("scale", marks=pytest.mark.slow),
        pytest.param("finetune", marks=pytest.mark.slow),
    ],
)
def test_the_tutorial_gives_the_same_weights_in_both_modes(
    groups: str, tutorial: ModuleType, cifar: Path
) -> None:
    eager = train_tutorial(tutorial, cifar, "--groups", groups)
    graph = train_tutorial(tutorial, cifar, "--groups", groups, "--mode", "graph")
    assert_same_weights(eager.task, graph.task)


@pytest.mark.filterwarnings("ignore:group 'adaptive_avg_pool2d' is empty")
def test_the_cookbook_s_own_graph_trains_as_the_engine_s_does(
    tutorial: ModuleType, cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the engine's graph draws the masks of eager mode.
    monkeypatch.setattr(flow.nn.Dropout, "forward", lambda layer, x: x)
    eager = train_tutorial(tutorial, cifar, "--groups", "scale")
    graph = train_tutorial(tutorial, cifar, "--groups", "scale", "--mode", "graph", "--own-graph")
    assert type(graph.task).__name__ == "OwnGraphTutorial"
    assert_same_weights(eager.task, graph.task, but="num_batches_tracked")


def assert_same_weights(one: Any, other: Any, but: str = "-") -> None:
    others = other.state_dict()
    assert one.state_dict().keys() == others.keys()
    differing = [
        name
        for name, tensor in one.state_dict().items()
        if not name.endswith(but) and not np.array_equal(tensor.numpy(), others[name].numpy())
    ]
    assert differing == []


# ---------------------------------------------------------------------- gan.py


def test_a_gan_comes_to_the_same_weights_in_both_modes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    gan = load_example("gan")
    short = ["--device", "cpu", "--epochs", "2", "--batches", "3"]
    states = []
    for mode in ("eager", "graph"):
        trained = gan.train(gan.parse([*short, "--mode", mode]))
        states.append({n: each.numpy().tobytes() for n, each in trained.state_dict().items()})
    assert states[0] == states[1]
    capsys.readouterr()
    assert gan.main([*short, "--mode", "eager", "--plot", str(tmp_path / "gan.png")]) == 0
    said = capsys.readouterr().out
    assert said.count("x") >= gan.GAUSSIANS
    assert "of the points are near one of the 8 Gaussians" in said
    assert (tmp_path / "gan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_gan_learns_all_gaussians() -> None:
    gan = load_example("gan")
    trained = gan.train(gan.parse(["--device", "cpu"]))
    with flow.no_grad():
        noise = np.random.default_rng(2).standard_normal((4000, gan.NOISE)).astype("float32")
        shares = gan.hits(trained.generator(flow.tensor(noise)).numpy())
    assert sum(shares) > 0.7
    assert min(shares) > 0.04
