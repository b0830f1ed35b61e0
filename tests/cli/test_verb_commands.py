"""``ofengine fit`` and its like do what a script would, and keep what it takes to do it again."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
import yaml
from helpers import run_python
from verb_cases import QUIET, differing, weights_by_hand, weights_of

from ofengine import Trainer
from ofengine.cli import VERBS, main

RUNS = Path("ofengine_logs")
NET = ["nets.py:Net", "--data", "nets.py:Rows"]


def printed_config(capsys: Any, *arguments: str) -> Dict[str, Any]:
    capsys.readouterr()
    assert main(["fit", *arguments, "--print_config"]) == 0
    content: Dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return content


def fit(*arguments: str) -> None:
    assert main(["fit", *NET, *QUIET, *arguments]) == 0


# ---------------------------------------------------------------------- a run, and again


def test_a_run_is_that_of_a_script_and_its_config_repeats_it(mode: str, file: Path) -> None:
    fit("--mode", mode, "--max_epochs", "2", "--task.width=5", "--task.rate", "3e-2")
    by_hand = weights_by_hand(file, 0, {"width": 5, "rate": 0.03}, mode=mode, max_epochs=2)
    assert differing(weights_of(RUNS / "version_0"), by_hand) == []
    assert main(["fit", "--config", str(RUNS / "version_0" / "config.yaml")]) == 0
    assert differing(weights_of(RUNS / "version_1"), by_hand) == []
    one, other = ((RUNS / f"version_{n}" / "config.yaml").read_text() for n in (0, 1))
    assert re.sub("^#.*", "", one, flags=re.M) == re.sub("^#.*", "", other, flags=re.M)


def test_what_is_printed_is_what_is_kept_and_reads_as_itself(file: Path, capsys: Any) -> None:
    arguments = [*NET, *QUIET, "--seed", "7", "--task.sizes=[1, 2]", "--trainer.max_steps=2"]
    arguments += ["--trainer.accumulate_grad_batches={0: 1, 5: 4}", "--task.name", "12"]
    assert main(["fit", *arguments, "--print_config"]) == 0
    text = capsys.readouterr().out
    assert not RUNS.exists()
    Path("run.yaml").write_text(text)
    assert main(["fit", "--config", "run.yaml", "--print-config"]) == 0
    assert capsys.readouterr().out == text
    fit(*arguments[len(NET) + len(QUIET) :])
    kept = (RUNS / "version_0" / "config.yaml").read_text()
    assert re.sub("^#.*\n", "", kept, flags=re.M) == text
    assert kept.startswith("# ofengine ")
    content = yaml.safe_load(text)
    assert content["task"] == {
        "class_path": "nets.py:Net",
        "init_args": {"width": 3, "rate": 0.1, "name": "12", "sizes": [1, 2]},
    }
    assert content["trainer"]["accumulate_grad_batches"] == {0: 1, 5: 4}
    given = set(inspect.signature(Trainer).parameters) - {"_unknown"}
    assert set(content["trainer"]) == given


def test_the_run_without_a_seed_of_its_own_has_seed_0_and_null_is_none(
    file: Path, capsys: Any
) -> None:
    assert printed_config(capsys, *NET)["trainer"]["seed"] == 0
    assert printed_config(capsys, *NET, "--seed", "null")["trainer"]["seed"] is None


# ---------------------------------------------------------------------- who wins


def test_a_later_file_wins_over_an_earlier_one_and_an_option_over_both(
    file: Path, capsys: Any
) -> None:
    Path("a.yaml").write_text(
        "task: {class_path: nets.py:Net, init_args: {width: 4, rate: 1e-2}}\n"
        "data: nets.py:Rows\n"
        "trainer: {max_epochs: 3, mode: graph, accumulate_grad_batches: {0: 1, 5: 4}}\n"
    )
    Path("b.yaml").write_text(
        "task: {width: 6}\ndata: {batch_size: 8}\n"
        "trainer: {max_epochs: 5, accumulate_grad_batches: {0: 2}}\n"
    )
    files = ["--config", "a.yaml", "--config", "b.yaml"]
    for arguments in ([*files, "--max_epochs", "9"], ["--trainer.max-epochs=9", *files]):
        content = printed_config(capsys, *arguments)
        init_args = content["task"]["init_args"]
        assert (init_args["width"], init_args["rate"]) == (6, 0.01)
        assert content["data"] == {"class_path": "nets.py:Rows", "init_args": {"batch_size": 8}}
        assert content["trainer"]["max_epochs"] == 9
        assert content["trainer"]["mode"] == "graph"
        assert content["trainer"]["accumulate_grad_batches"] == {0: 2}


def test_another_task_takes_none_of_the_arguments_of_that_in_the_file(
    file: Path, capsys: Any
) -> None:
    Path("a.yaml").write_text("task: {class_path: nets.py:Net, init_args: {sizes: [1], rate: 2}}")
    arguments = ["nets.py:Wide", "--task.width", "4", "--config", "a.yaml"]
    init_args = printed_config(capsys, *arguments)["task"]["init_args"]
    assert init_args == {"deep": 1, "name": "1e-3", "rate": 0.1, "sizes": None, "width": 4}
    same = printed_config(capsys, "./nets.py:Net", "--config", "a.yaml")["task"]["init_args"]
    assert (same["sizes"], same["rate"]) == ([1], 2.0)


def test_a_file_in_a_config_is_beside_it_or_in_the_current_folder(
    file: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = file.parent / "run.yaml"
    config.write_text("task: nets.py:Net\ntrainer: {callbacks: [{class_path: nets.py:Counts}]}\n")
    elsewhere = file.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    content = printed_config(capsys, "--config", "../run.yaml")
    assert content["task"]["class_path"] == "../nets.py:Net"
    assert content["trainer"]["callbacks"][0]["class_path"] == "../nets.py:Counts"
    monkeypatch.chdir(file.parent)
    config.rename(elsewhere / "run.yaml")
    content = printed_config(capsys, "--config", "elsewhere/run.yaml")
    assert content["task"]["class_path"] == "nets.py:Net"


def test_a_task_may_be_in_a_package(file: Path, capsys: Any) -> None:
    (file.parent / "a_package").mkdir()
    (file.parent / "a_package" / "__init__.py").write_text("")
    file.rename(file.parent / "a_package" / "nets.py")
    content = printed_config(capsys, "a_package.nets:Wide", "--task.width=4")
    assert content["task"]["init_args"]["width"] == 4


# ---------------------------------------------------------------------- callbacks and loggers


def test_a_config_file_brings_callbacks_and_loggers(file: Path) -> None:
    Path("run.yaml").write_text(
        """
trainer:
  max_epochs: 4
  callbacks:
    - class_path: nets.py:Counts
      init_args: {every: 7}
    - class_path: EarlyStopping
      init_args: {monitor: val_loss, patience: 1, min_delta: 1000}
  logger:
    - class_path: ofengine.loggers.JSONLinesLogger
      init_args: {save_dir: ., name: lines}
"""
    )
    fit("--config", "run.yaml")
    rows = (Path("lines") / "version_0" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2  # the epochs until it stopped
    content = yaml.safe_load((Path("lines") / "version_0" / "config.yaml").read_text())
    counts, stopping = content["trainer"]["callbacks"]
    assert counts == {"class_path": "nets.py:Counts", "init_args": {"every": 7}}
    assert stopping["class_path"] == "ofengine.callbacks.EarlyStopping"
    module = next(each for name, each in sys.modules.items() if name == "ofengine_file_nets")
    assert module.Counts.every[-1] == 7


# ---------------------------------------------------------------------- what is kept


def configs() -> List[str]:
    return sorted(path.as_posix() for path in Path().rglob("config*.yaml"))


def test_no_config_is_written_over(file: Path) -> None:
    fit("--max_epochs=1")
    fit("--max_epochs=1")
    first = "ofengine_logs/version_0/config.yaml"
    second = "ofengine_logs/version_1/config.yaml"
    assert configs() == [first, second]
    before = Path(second).read_bytes()
    for _ in range(2):  # it goes on in its folder, with another config, then with the same
        fit("--max_epochs=2", "--ckpt_path", "last")
        assert configs() == [first, "ofengine_logs/version_1/config-v1.yaml", second]
    assert Path(second).read_bytes() == before
    assert "max_epochs: 2" in Path("ofengine_logs/version_1/config-v1.yaml").read_text()


def test_without_a_logger_a_run_has_a_folder_of_its_own_and_a_trial_has_none(file: Path) -> None:
    fit("--trainer.max_steps=1", "--trainer.logger=false")
    fit("--trainer.max_steps=1", "--trainer.logger=false")
    two = ["ofengine_logs/version_0/config.yaml", "ofengine_logs/version_1/config.yaml"]
    assert configs() == two
    fit("--trainer.fast_dev_run=true")
    assert configs() == two


# ---------------------------------------------------------------------- the other verbs


def test_the_other_verbs_take_a_checkpoint_and_tell_its_numbers(
    mode: str, file: Path, capsys: Any
) -> None:
    fit("--mode", mode, "--max_epochs", "1")
    capsys.readouterr()
    weights = weights_of(RUNS / "version_0")
    rows = np.arange(32, dtype="float32").reshape(-1, 2, 2) / 16 - 1
    hidden = rows @ weights["body.weight"].T + weights["body.bias"]
    predicted = hidden @ weights["head.weight"].T + weights["head.bias"]
    losses = ((predicted - rows.sum(axis=2, keepdims=True)) ** 2).mean(axis=(1, 2))
    kept = ["--config", str(RUNS / "version_0" / "config.yaml"), "--ckpt_path", "last"]
    for verb, name, batches in (
        ("validate", "val_loss", losses[:2]),
        ("test", "test_loss", losses[2:5]),
    ):
        assert main([verb, *kept]) == 0
        header, _, row = capsys.readouterr().out.splitlines()
        assert header.split() == ["metric", "value"]
        assert row.split()[0] == name
        assert float(row.split()[1]) == pytest.approx(batches.mean(), rel=1e-5)
    assert main(["predict", *kept]) == 0
    said = capsys.readouterr().out
    folder = Path(said.rpartition("are in ")[2].strip())
    written = np.load(str(folder / "loader_0.npz"))["predictions"]
    assert np.allclose(written, predicted.reshape(-1, 1), atol=1e-6)


def test_weights_as_they_are_made_are_asked_for_by_name(file: Path, capsys: Any) -> None:
    assert main(["validate", *NET]) == 2
    assert "--ckpt_path none" in capsys.readouterr().err
    assert main(["validate", *NET, *QUIET, "--ckpt_path", "none"]) == 0
    assert "val_loss" in capsys.readouterr().out


# ---------------------------------------------------------------------- help


@pytest.mark.parametrize("verb", list(VERBS))
def test_help_fits_a_terminal_and_tells_of_every_argument(
    verb: str, file: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([verb, *NET, "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for name in set(inspect.signature(Trainer).parameters) - {"_unknown"}:
        (described,) = re.findall(rf"--trainer\.{name} .*\n +(\S.*)", text)
        assert not described.startswith("(default")
    assert "how many features are between them (default: 3)" in text
    assert "rows of a batch (default: 2)" in text
    assert main([verb, "-h"]) == 0
    assert "--task." not in capsys.readouterr().out.partition("arguments of")[2]


def test_the_list_of_commands_has_all_of_them(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    commands = [*VERBS, "doctor", "rates", "prove", "checkpoint", "launch"]
    assert [each for each in commands if not re.search(rf"^    {each}\b", text, re.M)] == []


# ---------------------------------------------------------------------- without the extra


def test_without_jsonargparse_it_says_what_to_install_and_the_rest_works(
    file: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    for verb in VERBS:
        assert main([verb, "nets.py:Net"]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(f"ofengine {verb} needs jsonargparse: pip install ")
        assert said.err.count("\n") == 1
    assert main(["rates", "nets.py:Net", "--max-steps", "2"]) == 0
    program = (
        "import sys; sys.modules['jsonargparse'] = None; from ofengine.cli import main; main()"
    )
    for command in (
        ["launch", "--help"],
        ["checkpoint", "--help"],
        ["prove", "--help"],
        ["--help"],
    ):
        result = run_python("-c", program, *command)
        assert (result.returncode, result.stderr) == (0, "")


# ---------------------------------------------------------------------- several ranks


@pytest.mark.parametrize(
    "command",
    [
        ["fit", "--devices", "2"],
        pytest.param(["launch", "--nproc", "2", "-m", "ofengine", "fit"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_ranks_are_one_process_that_accumulates(command: List[str], file: Path) -> None:
    arguments = [*NET, *QUIET, "--max_epochs=1"]
    result = run_python("-m", "ofengine", *command, *arguments)
    assert result.returncode == 0, result.stderr
    assert configs() == ["ofengine_logs/version_0/config.yaml"]
    assert result.stdout.count("The run is in ") == 1
    assert main(["fit", *arguments, "--trainer.accumulate_grad_batches=2"]) == 0
    one, other = (weights_of(RUNS / f"version_{n}") for n in (0, 1))
    assert differing(one, other) == []
