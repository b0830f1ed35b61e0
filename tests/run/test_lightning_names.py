"""The tables of Lightning's names: none is ofengine's own, and what a sentence names is there."""

from __future__ import annotations

import inspect
import re
from typing import Any, Iterator, Mapping, Set

import pytest

import ofengine.callbacks
from ofengine import Callback, TaskModule, Trainer
from ofengine.data_module import DATA_MODULE_ATTRIBUTES, DATA_MODULE_HOOKS
from ofengine.lightning_classes import CLASS_ARGUMENTS, EXPORTS
from ofengine.loggers import CSVLogger
from ofengine.run.lightning import (
    ARGUMENTS_ELSEWHERE,
    HOOKS,
    STEP_ARGUMENTS,
    TASK_ATTRIBUTES,
    TRAINER_ARGUMENTS,
    TRAINER_ATTRIBUTES,
    mend_for,
)
from ofengine.run.lightning_methods import CHECKPOINT_KEYS, METHOD_ARGUMENTS

TABLES = {
    "EXPORTS": EXPORTS,
    "ARGUMENTS_ELSEWHERE": ARGUMENTS_ELSEWHERE,
    "TRAINER_ARGUMENTS": TRAINER_ARGUMENTS,
    "TRAINER_ATTRIBUTES": TRAINER_ATTRIBUTES,
    "TASK_ATTRIBUTES": TASK_ATTRIBUTES,
    "HOOKS": HOOKS,
    "STEP_ARGUMENTS": STEP_ARGUMENTS,
    "DATA_MODULE_ATTRIBUTES": DATA_MODULE_ATTRIBUTES,
    "DATA_MODULE_HOOKS": DATA_MODULE_HOOKS,
    **CLASS_ARGUMENTS,
    "CHECKPOINT_KEYS": CHECKPOINT_KEYS,
    **METHOD_ARGUMENTS,
}
_ADVICE = re.compile(
    r"\b(add|ask|call|change|compute|freeze|give|keep|leave|let|list|make|note|return|run|split|"
    r"tells?|try|upload|use|watch|writes?)\b"
)
"""One of these words tells a user what to do."""

EXPECTED = {
    "EXPORTS": "LightningModule LightningDataModule LightningCLI RichProgressBar WandbLogger",
    "ARGUMENTS_ELSEWHERE": "ckpt_path datamodule sync_dist train_dataloaders val_dataloaders",
    "TRAINER_ARGUMENTS": """
        accelerator amp_backend auto_lr_find auto_scale_batch_size barebones benchmark
        checkpoint_callback deterministic enable_autolog_hparams
        gpus inference_mode model model_registry plugins
        progress_bar_refresh_rate reload_dataloaders_every_n_epochs resume_from_checkpoint
        tpu_cores track_grad_norm
        use_distributed_sampler verbose weights_only weights_summary
        """,
    "TRAINER_ATTRIBUTES": """
        ckpt_path fit_loop
        lightning_module lr_scheduler_configs model num_devices
        num_test_batches num_val_batches predicting progress_bar_callback
        received_sigterm state strategy testing train_dataloader training val_dataloaders
        validating
        """,
    "TASK_ATTRIBUTES": """
        all_gather automatic_optimization clip_gradients fabric
        global_rank hparams_initial local_rank manual_backward on_gpu
        strict_loading summarize to_torchscript toggle_optimizer
        untoggle_optimizer
        """,
    "STEP_ARGUMENTS": "optimizer_idx hiddens dataloader_idx optimizer_closure",
    "DATA_MODULE_ATTRIBUTES": "save_hyperparameters hparams from_datasets",
    "DATA_MODULE_HOOKS": "transfer_batch_to_device state_dict load_state_dict on_exception",
    "HOOKS": """
        backward configure_gradient_clipping configure_model
        configure_sharded_model get_progress_bar_dict lr_scheduler_step on_after_batch_transfer
        on_batch_end on_batch_start on_before_batch_transfer on_epoch_end on_epoch_start
        on_hpc_load on_hpc_save on_init_end on_init_start on_load_checkpoint on_predict_dataloader
        on_predict_model_eval on_pretrain_routine_end on_pretrain_routine_start on_save_checkpoint
        on_test_dataloader on_test_model_eval on_test_model_train on_train_dataloader
        on_val_dataloader on_validation_model_eval on_validation_model_train
        on_validation_model_zero_grad optimizer_step optimizer_zero_grad prepare_data
        tbptt_split_batch test_epoch_end test_step_end training_epoch_end training_step_end
        transfer_batch_to_device validation_epoch_end validation_step_end
        """,
}
"""Names that a user of Lightning is sure to try."""


def _names(thing: Any) -> Set[str]:
    """The names of an object's attributes and methods, those that are only annotated too."""
    annotated = [vars(base).get("__annotations__", {}) for base in type(thing).__mro__]
    return set(dir(thing)).union(*annotated)


def _arguments_of(function: Any) -> Set[str]:
    return set(inspect.signature(function).parameters)


def _trainer() -> Trainer:
    return Trainer(
        device="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _calls(sentence: str, name: str) -> Iterator[str]:
    """The keyword arguments that a sentence gives to ``name(...)``."""
    for inside in re.findall(rf"\b{name}\(([^()]*)\)", sentence):
        yield from re.findall(r"(\w+)=", inside)


@pytest.mark.parametrize("title", EXPECTED)
def test_the_names_that_users_of_lightning_try_are_there(title: str) -> None:
    assert not set(EXPECTED[title].split()) - set(TABLES[title])


def test_no_argument_of_the_trainer_is_in_its_table() -> None:
    verbs = (Trainer.fit, Trainer.validate, Trainer.test, Trainer.predict)
    own = set().union(*map(_arguments_of, (Trainer, *verbs)))
    assert not own & set(TRAINER_ARGUMENTS)


def test_what_something_else_takes_is_an_argument_there_and_not_of_the_trainer() -> None:
    others = (Trainer.fit, Trainer.validate, Trainer.test, Trainer.predict, TaskModule.log)
    taken = set().union(*map(_arguments_of, others))
    assert set(ARGUMENTS_ELSEWHERE) <= taken - _arguments_of(Trainer)


def test_no_attribute_of_the_trainer_is_in_its_table() -> None:
    assert not _names(_trainer()) & set(TRAINER_ATTRIBUTES)


def test_no_attribute_of_a_task_is_in_its_table() -> None:
    assert not _names(TaskModule()) & set(TASK_ATTRIBUTES)


def test_no_hook_of_a_callback_is_in_the_table_of_hooks() -> None:
    assert not _names(Callback()) & set(HOOKS)


def test_the_hooks_of_a_task_alone_are_in_the_table_because_a_callback_has_them_not() -> None:
    assert _names(TaskModule()) & set(HOOKS) == {
        "on_save_checkpoint",
        "on_load_checkpoint",
        "prepare_data",
    }


def test_attributes_and_hooks_of_a_task_are_apart() -> None:
    assert not set(TASK_ATTRIBUTES) & set(HOOKS)


@pytest.mark.parametrize("title", TABLES)
def test_names_are_public_names(title: str) -> None:
    assert all(name.isidentifier() and not name.startswith("_") for name in TABLES[title])


@pytest.mark.parametrize("title", TABLES)
def test_a_sentence_is_the_end_of_one(title: str) -> None:
    end = re.compile(r"[a-z](?!.*(\. |\n|  )).*[^.:;, ]")
    assert [each for each in TABLES[title].values() if not end.fullmatch(each)] == []


@pytest.mark.parametrize("title", TABLES)
def test_a_sentence_says_what_to_do(title: str) -> None:
    sentences = TABLES[title].values()
    assert [each for each in sentences if not _ADVICE.search(each)] == []


@pytest.mark.parametrize("title", TABLES)
def test_what_a_sentence_names_is_there(title: str) -> None:
    trainer, task = _names(_trainer()), _names(TaskModule())
    missing: Set[str] = set()
    for sentence in TABLES[title].values():
        missing.update(set(re.findall(r"\btrainer\.(\w+)", sentence)) - trainer)
        of_task = re.findall(r"\b(?:TaskModule|task|self)\.(?!model\b)(\w+)", sentence)
        methods = re.findall(r"\b(on_\w+|\w+_step|\w+_dataloader)\b(?=[,;: ()]|$)", sentence)
        missing.update({*of_task, *methods} - task - trainer)
        for name in re.findall(r"\b(?:an?|the) ([A-Z]\w+)\b", sentence):
            if name not in ("Callback", "DataLoader", "GPU", "KeyboardInterrupt", "SystemExit"):
                missing.update({name} - {*dir(ofengine.callbacks), "Trainer"})
    assert missing == set()


@pytest.mark.parametrize("title", TABLES)
def test_what_a_sentence_calls_takes_these_arguments(title: str) -> None:
    text = "\n".join(TABLES[title].values())
    makers = [getattr(ofengine.callbacks, name) for name in ofengine.callbacks.__all__]
    verbs = [Trainer.fit, Trainer.validate, Trainer.test, Trainer.predict]
    for function in (Trainer, CSVLogger, TaskModule.save_hyperparameters, *makers, *verbs):
        assert set(_calls(text, function.__name__)) <= _arguments_of(function)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("accelerator", "device"),
        ("barebones", "num_sanity_val_steps"),
        ("deterministic", "seed"),
        ("checkpoint_callback", "enable_checkpointing"),
        ("overfit_pct", "overfit_batches"),
        ("row_log_interval", "log_every_n_steps"),
        ("train_percent_check", "limit_train_batches"),
        ("weights_summary", "enable_model_summary"),
    ],
)
def test_an_argument_that_is_named_otherwise_is_an_argument(name: str, argument: str) -> None:
    assert argument in TRAINER_ARGUMENTS[name]
    assert argument in _arguments_of(Trainer)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_mend_is_for_the_exact_name(table: Mapping[str, str]) -> None:
    name, sentence = next(iter(table.items()))
    assert mend_for(table, name) == sentence
    assert mend_for(table, name.upper()) is None
    assert mend_for(table, "") is None
