"""A classifier, a language model and several validation sets: programs to be copied.

Graph mode runs in the tests' own process; eager mode as users start it, in the slow tests, and has
to come to the weights of graph mode.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import struct
from pathlib import Path
from types import ModuleType
from typing import Any, List, Tuple

import numpy as np
import pytest
from helpers import largest_difference, run_python, weights_of

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

for needed in ("matplotlib", "sklearn", "tensorboardX"):
    pytest.importorskip(needed)

CLASSIFIER = ["--epochs", "2"]
SETS = ["--epochs", "4"]


def load_example(name: str) -> ModuleType:
    """Import an example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_graph_mode(name: str, options: List[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the example prints in graph mode; its picture is ``picture.png``."""
    arguments = ["--mode", "graph", "--device", "cpu", "--plot", "picture.png", *options]
    assert load_example(name).main(arguments) == 0
    assert_is_picture(Path("picture.png"))
    return capsys.readouterr().out


def in_eager_mode(name: str, options: List[str]) -> str:
    """What the example prints in a process of its own; its picture is ``eager.png``."""
    arguments = ["--mode", "eager", "--device", "cpu", "--plot", "eager.png", *options]
    result = run_python(EXAMPLES / f"{name}.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert_is_picture(Path("eager.png"))
    printed: str = result.stdout
    return printed


def assert_is_picture(path: Path) -> None:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    assert 600 < width < 2000
    assert 400 < height < 1500


def found(pattern: str, printed: str) -> Tuple[Any, ...]:
    """The groups of the only place that the pattern matches."""
    (match,) = re.finditer(pattern, printed, re.MULTILINE)
    return match.groups()


def digest(printed: str) -> str:
    return str(found(r"^the weights' digest: (\w{16})$", printed)[0])


# ---------------------------------------------------------------------- image_classifier.py


def assert_classifies(printed: str) -> None:
    for whose in ("the moving average", "the best checkpoint"):
        accuracy, f1 = found(rf"^test of {whose}: accuracy ([\d.]+)%, F1 ([\d.]+)$", printed)
        assert float(accuracy) > 85
        assert abs(float(f1) - float(accuracy) / 100) < 0.03  # the classes are as good as balanced
    (folder,) = found(r"^logged in (.*), \d+ rows$", printed)
    (checkpoint,) = found(r"^the best checkpoint is (.*)$", printed)
    assert Path(checkpoint).parent == Path(folder).resolve() / "checkpoints"
    with open(Path(folder, "metrics.csv"), newline="") as file:
        table = list(csv.DictReader(file))
    scores = [float(row["val_accuracy"]) for row in table if row["val_accuracy"]]
    assert len(scores) == 2
    assert f"val_accuracy={max(scores):.3f}" in Path(checkpoint).name
    assert {"lr/all", "loss", "val_f1", "test_f1", "device/cpu_percent"} <= table[0].keys()
    assert {"throughput/samples_per_second", "gradients/net.0/norm"} <= table[0].keys()
    assert "activations/net.13/std" in table[0]
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"hparams": {"width": 16, "rate": 0.05}}
    assert [line["val_accuracy"] for line in lines if "val_accuracy" in line] == scores
    assert Path(folder, "events.out.tfevents.ofengine").stat().st_size > 1000
    (predictions,) = found(r"^its predictions are in (.*)$", printed)
    with np.load(Path(predictions, "loader_0.npz")) as kept:
        assert f"{np.mean(kept['digit'] == kept['label']):.2%}" == f"{accuracy}%"


def test_a_classifier_has_everything_around_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert_classifies(in_graph_mode("image_classifier", CLASSIFIER, capsys))


@pytest.mark.slow
def test_a_classifier_is_the_same_in_both_modes(capsys: pytest.CaptureFixture[str]) -> None:
    eager = in_eager_mode("image_classifier", CLASSIFIER)
    assert_classifies(eager)
    assert digest(eager) == digest(in_graph_mode("image_classifier", CLASSIFIER, capsys))


# ---------------------------------------------------------------------- language_model.py


def held_out_loss(printed: str) -> float:
    """Of 29 characters, guessing costs 3.4 nats."""
    return float(found(r"^held-out loss: ([\d.]+) nats a character$", printed)[0])


@pytest.mark.slow
def test_a_language_model_learns_and_writes(capsys: pytest.CaptureFixture[str]) -> None:
    printed = in_graph_mode("language_model", ["--epochs", "2"], capsys)
    assert held_out_loss(printed) < 1
    assert len(re.findall(r"^  [a-z .]+$", printed, re.MULTILINE)) >= 6


@pytest.mark.slow
def test_a_language_model_is_the_same_in_both_modes(capsys: pytest.CaptureFixture[str]) -> None:
    eager = in_eager_mode("language_model", [])
    assert held_out_loss(eager) < 0.3
    (right,) = found(r"^(\d+) of 100 sentences are right by the grammar\.$", eager)
    assert int(right) > 60
    assert digest(eager) == digest(in_graph_mode("language_model", [], capsys))


def test_all_sentences_of_the_language_model_s_grammar_are_right_by_it() -> None:
    language = load_example("language_model")
    draw = np.random.RandomState(7)
    sentences = [language.sentence(draw) for _ in range(2000)]
    assert all(map(language.is_right, sentences))
    assert max(map(len, sentences)) == language.LENGTH - 1
    for wrong in ("the cats sees a dog.", "the cat see a dog.", "the dog sees a dog", "", "a."):
        assert not language.is_right(wrong)
    tokens = language.encoded(["the dog sees a cat."]).numpy()
    assert tokens.shape == (1, language.LENGTH + 1)
    assert tokens[0, [0, 20]].tolist() == [language.END] * 2
    assert (tokens[0, 1:20] > language.END).all()
    assert (tokens[0, 21:] == language.PAD).all()


@pytest.mark.slow
def test_the_language_model_s_four_batches_come_to_what_one_of_all_their_sentences_comes_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    language = load_example("language_model")

    def trained(batch_size: int, accumulate: int) -> Any:
        options = ["--device", "cpu", "--epochs", "1", "--batch-size", str(batch_size)]
        options += ["--mode", "eager", "--accumulate", str(accumulate)]
        task, trainer = language.train(language.parse(options))
        assert trainer.global_step == 20
        return weights_of(task)

    at_once = trained(32, 1)
    assert largest_difference(trained(8, 4), at_once)[0] < 1e-4  # as its docstring says
    model = language.LanguageModel
    monkeypatch.setattr(model, "training_step", lambda task, batch, _: task.mean_loss(batch)[0])
    assert largest_difference(trained(8, 4), at_once)[0] > 5e-3  # the mean of the batches' means


# ---------------------------------------------------------------------- several_validation_sets.py


def accuracies(printed: str) -> List[float]:
    """Those of the best weights on clean, noisy and shifted images, in per cent."""
    rows = re.findall(r"^(clean|noisy|shifted) +([\d.]+)% +[\d.]+ +([\d.]+)%$", printed, re.M)
    assert [name for name, _, _ in rows] == ["clean", "noisy", "shifted"]
    assert rows[0][2] == "100.00"  # predicted as clean ones
    # What is right on both is predicted alike on both.
    shares = [[float(number) for number in row[1:]] for row in rows]
    assert all(same >= accuracy + shares[0][0] - 100 - 0.02 for accuracy, same in shares)
    assert 0 < shares[2][1] < 100
    return [accuracy for accuracy, _ in shares]


def by_epoch(printed: str, number: int) -> List[float]:
    """The accuracies of a loader that the progress bar's lines tell, epoch by epoch."""
    pattern = rf"^Epoch +\d+/\d+: .*accuracy/dataloader_idx_{number}=([\d.]+)"
    return [float(each) for each in re.findall(pattern, printed, re.MULTILINE)]


def assert_learns_the_clean_ones_best(printed: str) -> None:
    clean, noisy, shifted = accuracies(printed)
    assert clean > 85
    assert clean > noisy > shifted
    scores = by_epoch(printed, 1)
    assert len(scores) == 4
    assert noisy == pytest.approx(100 * max(scores), abs=0.011)
    (epoch,) = found(r"^Best on noisy images: .*/epoch=(\d+)\.safetensors$", printed)
    assert int(epoch) == scores.index(max(scores))


@pytest.mark.slow
def test_several_validation_sets_have_metrics_of_their_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_learns_the_clean_ones_best(in_graph_mode("several_validation_sets", SETS, capsys))


@pytest.mark.slow
def test_several_validation_sets_are_the_same_in_both_modes_and_augmentation_helps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    eager = in_eager_mode("several_validation_sets", SETS)
    assert_learns_the_clean_ones_best(eager)
    assert digest(eager) == digest(in_graph_mode("several_validation_sets", SETS, capsys))
    augmented = in_graph_mode("several_validation_sets", [*SETS, "--augment"], capsys)
    assert accuracies(augmented)[2] > accuracies(eager)[2] + 20
