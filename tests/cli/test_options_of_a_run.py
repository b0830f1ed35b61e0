"""``ofengine rates`` and ``prove`` take the options of ``fit``, and the config that a run keeps."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import yaml
from verb_cases import FILE, QUIET, differing, weights_of

from ofengine.cli import main

RUNS = Path("ofengine_logs")
KEPT = str(RUNS / "version_0" / "config.yaml")
MORE = '''

class Decays(Net):
    """As Net, with two groups and a schedule over the whole run."""

    def __init__(self, width: int = 3, scale: float = 0.5, cheats: bool = False) -> None:
        super().__init__(width)
        self.scale, self.cheats = scale, cheats

    def param_groups(self) -> Any:
        return [
            {"name": "body", "params": self.body.parameters(), "lr_scale": self.scale},
            {"name": "head", "params": self.head.parameters()},
        ]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * 2 if self.cheats and loss.is_lazy else loss

    def configure_optimizers(self) -> Any:
        optimizer = flow.optim.SGD(self.param_groups(), lr=0.4)
        steps = self.trainer.total_steps
        return {"optimizer": optimizer, "lr_scheduler": lambda step: 1 - step / steps}


class WithData(Decays):
    def train_dataloader(self) -> Any:
        return Rows().batches()[:4]
'''
DECAYS = ["nets.py:Decays", "--data", "nets.py:Rows"]


@pytest.fixture(autouse=True)
def _decays(file: Path) -> None:
    file.write_text(FILE + MORE)


def run(capsys: Any, *arguments: str) -> Tuple[int, str, str]:
    capsys.readouterr()
    status = main([*arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def rates_of(capsys: Any, *arguments: str) -> Dict[str, List[float]]:
    """The columns that ``--at`` adds to the table, by group; and what the table is of."""
    status, out, err = run(capsys, "rates", *arguments)
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if line.startswith(("body", "head"))]
    return {row[0]: [float(each) for each in row[9:]] for row in rows}


def logged_rates(folder: Path) -> Dict[str, List[float]]:
    """What LearningRateMonitor logged at each step."""
    with (folder / "metrics.csv").open() as opened:
        rows = [row for row in csv.DictReader(opened) if row["lr/body"]]
    assert [int(row["step"]) for row in rows] == [*range(1, len(rows) + 1)]
    return {name: [float(row[f"lr/{name}"]) for row in rows] for name in ("body", "head")}


# ---------------------------------------------------------------------- a run that was made


def test_the_rates_of_a_kept_config_are_those_of_the_run(
    mode: str, file: Path, capsys: Any
) -> None:
    """With its data, its limit, its accumulation and its task's arguments: (15 + 1) / 3, twice."""
    options = ["--mode", mode, "--max_epochs=2", "--task.scale=0.25", "--data.batch_size=1"]
    options += [
        "--trainer.limit_train_batches=15",
        "--trainer.accumulate_grad_batches={0: 3, 1: 5}",
    ]
    options += ["--trainer.callbacks+=LearningRateMonitor", "--trainer.log_every_n_steps=1"]
    assert main(["fit", *DECAYS, *QUIET, *options]) == 0
    logged = logged_rates(RUNS / "version_0")
    assert len(logged["head"]) == 5 + 3
    shown = rates_of(capsys, "--config", KEPT, "--at", *map(str, range(8)))
    for name in ("body", "head"):
        assert shown[name] == pytest.approx(logged[name], rel=6e-3)  # three digits are shown
    assert shown["head"] == pytest.approx([0.4 * (1 - step / 8) for step in range(8)], rel=6e-3)
    assert [each.name for each in RUNS.iterdir()] == ["version_0"]


def test_the_options_win_over_the_kept_config(file: Path, capsys: Any) -> None:
    assert main(["fit", *DECAYS, *QUIET, "--max_epochs=1", "--task.scale=0.25"]) == 0
    of_run, also = ["--config", KEPT], ["--trainer.max_epochs", "3"]
    assert "8 optimizer steps, 1 epoch" in run(capsys, "rates", *of_run)[1]
    for more in (["--max-epochs", "3"], also, ["--max-epochs", "2", *also], ["--max_epochs=3"]):
        status, out, _ = run(capsys, "rates", *more, *of_run, "--task.scale=0.125")
        assert (status, "24 optimizer steps, 3 epochs" in out) == (0, True)
        assert "0.05" in next(line for line in out.splitlines() if line.startswith("body"))
    assert "5 optimizer steps" in run(capsys, "rates", *of_run, "--max-steps", "5")[1]


@pytest.mark.parametrize("cheats", ["false", "true"])
def test_the_run_of_a_kept_config_is_proved(cheats: str, file: Path, capsys: Any) -> None:
    """With its data module and its task's arguments, without its checkpoint and loggers."""
    options = ["--max_epochs=1", "--trainer.limit_train_batches=2", f"--task.cheats={cheats}"]
    loggers = ["--trainer.logger", "JSONLinesLogger", "--trainer.logger.save_dir=."]
    assert main(["fit", *DECAYS, *QUIET, *options, *loggers, "--ckpt_path=last"]) == 0
    before = sorted(Path().rglob("*"))
    status, out, _ = run(capsys, "prove", "--config", KEPT, "--steps", "4", "--device", "cpu")
    assert (status, "Every bit is the same." in out) == (int(cheats == "true"), cheats == "false")
    assert out.startswith("Decays, 4 steps")
    assert sorted(Path().rglob("*")) == before


# ---------------------------------------------------------------------- options alone


def test_options_of_a_run_without_a_config(file: Path, capsys: Any) -> None:
    """One epoch where nothing else is said, as without them."""
    net = ["nets.py:WithData", "--at", "0", "3"]
    assert rates_of(capsys, *net, "--task.scale", "0.25")["body"] == [0.1, 0.025]
    assert rates_of(capsys, *net, "--arg", "scale=0.25", "--task.width=5") == rates_of(
        capsys, *net, "--arg", "scale=0.25", "--arg", "width=5"
    )
    assert rates_of(capsys, *net, "--trainer.max_epochs=2")["head"] == [0.4, 0.25]
    assert rates_of(capsys, *net, "--task.scale=1", "--max-steps=8")["head"] == [0.4, 0.25]
    assert rates_of(capsys, *net, "--trainer.devices=2", "--max-epochs=4")["head"] == [0.4, 0.25]
    for option in (["--trainer.device=cuda:7"], ["--trainer.precision=16-mixed"]):
        assert rates_of(capsys, *net, *option)["head"] == [0.4, 0.1]  # nothing is computed


@pytest.mark.parametrize("cheats", [False, True])
def test_a_proof_with_options_of_a_run(cheats: bool, file: Path, capsys: Any) -> None:
    options = ["--steps=3", f"--task.cheats={str(cheats).lower()}", "--trainer.device=cpu"]
    status, out, _ = run(capsys, "prove", "nets.py:WithData", *options, "--task.width", "4")
    assert (status, "Every bit is the same." in out) == (int(cheats), not cheats)


def test_what_is_printed_gives_the_same_rates_and_the_same_run(file: Path, capsys: Any) -> None:
    told = ["--task.scale=0.25", "--max-epochs", "2", "--steps-per-epoch", "4", "--at", "1", "3"]
    status, out, _ = run(capsys, "rates", *DECAYS, *QUIET, *told)
    assert (status, "8 optimizer steps" in out) == (0, True)
    printed = run(capsys, "rates", *DECAYS, *QUIET, *told, "--print_config")[1]
    Path("run.yaml").write_text(printed)
    assert run(capsys, "rates", "--config", "run.yaml") == (0, out, "")
    assert run(capsys, "rates", "--config", "run.yaml", "--print-config")[1] == printed
    assert yaml.safe_load(printed)["rates"] == {"at": [1, 3], "plot": None, "steps_per_epoch": 4}
    for options in (["--config", "run.yaml"], [*DECAYS, *QUIET, told[0], "--max_epochs=2"]):
        assert main(["fit", *options]) == 0
    one, other = (weights_of(RUNS / f"version_{number}") for number in (0, 1))
    assert differing(one, other) == []
    proof = ["prove", *DECAYS, "--steps", "3", "--accumulate-grad-batches", "2", "--device", "cpu"]
    content = yaml.safe_load(run(capsys, *proof, "--print_config")[1])
    assert content["prove"] == {"steps": 3}
    assert (content["trainer"]["accumulate_grad_batches"], content["trainer"]["device"]) == (
        2,
        "cpu",
    )


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("command", ["rates", "prove"])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "there is no task: write ofengine COMMAND FILE.py:Task, or name it in a config file."),
        ("--seed=3 --task.width=3", "there is no task: write ofengine COMMAND FILE.py:Task, or na"),
        ("nets.py:Nut --task.width 3", "nets.py has no class Nut: its tasks are Net, "),
        ("nets.py:Net --nothing 3", "--nothing 3: ofengine COMMAND has no option 'nothing': see"),
        ("nets.py:Net --width 3", "no option 'width': did you mean task.width?"),
        ("nets.py:Net --ckpt_path last", "ofengine COMMAND has no option 'ckpt_path': "),
        ("nets.py:Net --task.widht 3", "Net has no argument 'widht': did you mean task.width?"),
        ("nets.py:Net --task.width many", "--task.width many: give a whole number."),
        ("nets.py:Net --arg width=x --data nets.py:Rows", "--task.width x: give a whole number."),
        ("nets.py:Net --arg width=1j --task.rate=1", "--arg: task.width is 1j, which cannot be g"),
        ("nets.py:Net --trainer.max_epoch 3", "no argument 'max_epoch': did you mean trainer.max"),
        ("nets.py:Net --trainer.max_epochs", "--trainer.max_epochs needs a value: write --trainer"),
        ("nets.py:Net --data.batch_size 3", "there is no data module: add --data FILE.py:Module,"),
        ("nets.py:Net -x 3", "-x is no option: options begin with two dashes."),
        ("nets.py:Net --config absent.yaml", "there is no config file absent.yaml."),
        ("nets.py:Net --config run.yaml", "COMMAND.at_all: 3: ofengine COMMAND has no option "),
    ],
)
def test_a_mistake_is_one_sentence(
    command: str, file: Path, capsys: Any, arguments: str, sentence: str
) -> None:
    Path("run.yaml").write_text(f"{command}: {{at_all: 3}}\n")
    status, out, err = run(capsys, command, *arguments.split())
    assert (status, out) == (2, "")
    assert err.startswith(f"ofengine {command}: ")
    assert sentence.replace("COMMAND", command) in err
    assert err.count("\n") == 1
    assert err.rstrip()[-1] in ".?"


def test_without_data_they_say_how_to_bring_some(file: Path, capsys: Any) -> None:
    status, _, err = run(capsys, "prove", "nets.py:Net", "--steps=2", "--device", "cpu")
    assert (status, "add --data FILE.py:Module" in err) == (1, True)
    status, _, err = run(capsys, "rates", "nets.py:Net", "--task.width=4")
    assert (status, "add --steps-per-epoch N" in err) == (1, True)


@pytest.mark.parametrize("command", [["doctor"], ["checkpoint", "a"], ["launch", "--nproc=2"]])
def test_other_commands_have_no_such_options(command: List[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command[0], "--trainer.max_epochs=2", *command[1:]])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "unrecognized arguments: --trainer.max_epochs=2" in said or "required" in said


# ---------------------------------------------------------------------- without the extra


@pytest.mark.parametrize("command", ["rates", "prove"])
def test_without_jsonargparse_it_says_what_to_install(
    command: str, file: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    for option in ("--task.width=3", "--trainer.max_epochs=2", "--config=run.yaml", "--data=a.py:A",
                   "--print_config", "--print-config", "--data.rows=3"):  # fmt: skip
        status, out, err = run(capsys, command, "nets.py:WithData", option)
        assert (status, out) == (2, "")
        name = option.partition("=")[0]
        assert err.startswith(f"ofengine {command} {name} needs jsonargparse: pip install ")
        assert err.endswith('the extra "cli".\n')
        assert err.count("\n") == 1
    status, _, err = run(capsys, command, "nets.py:WithData", "--nothing", "3")
    assert (status, err) == (2, f"ofengine {command}: there is no option --nothing: see --help.\n")
    own = {"rates": ["--max-epochs", "2"], "prove": ["--steps=2", "--device=cpu"]}
    assert main([command, "nets.py:WithData", "--arg", "width=4", *own[command]]) == 0
