"""What to write where a user writes a name that PyTorch Lightning has and ofengine has not.

Tables for the arguments of the Trainer and of its verbs, the Trainer's attributes, the task's
attributes, the hooks, and the arguments of log and of training_step. Each has the names of
Lightning 2.x and the well-known ones that 1.x had; a name that ofengine has is in none of them. A
value is the end of an error's sentence: a clause that begins in lower case and has no full stop.
"""

from __future__ import annotations

from typing import Dict, Mapping, Optional


def mend_for(table: Mapping[str, str], name: str) -> Optional[str]:
    """What to write instead of Lightning's ``name``, or None where ``table`` has no such name."""
    return table.get(name)


def _each(names: str, mend: str) -> Dict[str, str]:
    return dict.fromkeys(names.split(), mend)


_LEAVE_OUT = "devices, num_nodes and strategy say all there is to say about ranks: leave it out"
_STEPS_ALONE = (
    "the Trainer calls backward and the optimizers itself: return the loss from training_step, and "
    "several optimizers by name from configure_optimizers, or, in graph mode, write a graph of "
    "your own in TaskModule.build_graph"
)
_GRAD_NORM = (
    "list a ModelStatistics(activations=False) in callbacks, which logs gradients' norms in both "
    "modes"
)
_ANEW_EACH_PASS = (
    "a dataloader is asked for its batches anew in each epoch: let its dataset, or its __iter__, "
    "choose what an epoch reads"
)
_SPLIT_SEQUENCES = (
    "a batch is trained on as a whole: split long sequences in the dataset, so that each part is a "
    "batch"
)

TRAINER_ARGUMENTS: Mapping[str, str] = {
    # Which machine, how many processes.
    "accelerator": 'write device="auto", "cpu", "cuda" or "cuda:N"',
    "gpus": "write devices=2, or another number of ranks",
    "auto_select_gpus": 'write device="auto", which takes the first GPU where there is one',
    **_each("tpu_cores ipus", 'there are GPUs and CPUs only: write device="auto"'),
    **_each(
        "distributed_backend num_processes prepare_data_per_node",
        _LEAVE_OUT,
    ),
    **_each(
        "use_distributed_sampler replace_sampler_ddp",
        "the batches that the DataLoader's own sampler gives are shared out among the ranks: leave "
        "it out",
    ),
    "plugins": "what plugins change is fixed here: write a Callback, or a graph of your own in "
    "TaskModule.build_graph",
    # How it computes.
    **_each("amp_backend amp_level use_amp", 'write precision="16-mixed", on a GPU in graph mode'),
    "deterministic": "write seed=0, or another number, which fixes shuffling and dropout; OneFlow "
    "has no switch for its kernels",
    "benchmark": "call oneflow.backends.cudnn.enable_conv_heuristic_search_algo(False) before fit: "
    "cuDNN then searches for the fastest kernels",
    "inference_mode": "validation, test and prediction always run without gradients: leave it out",
    "terminate_on_nan": "list a TerminateOnNaN in callbacks, which names the first step whose loss "
    "is not finite",
    "automatic_optimization": _STEPS_ALONE,
    "enable_pl_optimizer": "the optimizer is OneFlow's own, without a wrapper: leave it out",
    "track_grad_norm": _GRAD_NORM,
    "truncated_bptt_steps": _SPLIT_SEQUENCES,
    "stochastic_weight_avg": "list a StochasticWeightAveraging in callbacks",
    # How long, and on which data.
    **_each("reload_dataloaders_every_n_epochs reload_dataloaders_every_epoch", _ANEW_EACH_PASS),
    "multiple_trainloader_mode": "give fit an ofengine.CombinedLoader(loaders, mode)",
    "overfit_pct": "write overfit_batches, a float for a share",
    "train_percent_check": "write limit_train_batches, a float for a share",
    "val_percent_check": "write limit_val_batches, a float for a share",
    "test_percent_check": "write limit_test_batches, a float for a share",
    # What else happens.
    "barebones": "write logger=False, enable_checkpointing=False, enable_progress_bar=False, "
    "enable_model_summary=False and num_sanity_val_steps=0",
    "checkpoint_callback": "write enable_checkpointing=True or False, and list a ModelCheckpoint "
    "of your own in callbacks",
    "early_stop_callback": "list an EarlyStopping in callbacks",
    "resume_from_checkpoint": 'write fit(task, ckpt_path="last"), or the path of a file',
    "weights_save_path": "list a ModelCheckpoint(dirpath=...) in callbacks",
    "progress_bar_refresh_rate": "list a ProgressBar(refresh_rate=...) in callbacks",
    "process_position": "the progress bar keeps its place: leave it out",
    "weights_summary": "write enable_model_summary=True or False, and list a "
    "ModelSummary(max_depth=...) in callbacks for another depth",
    "auto_lr_find": "write trainer.lr_find(task, train_dataloader).suggestion() before fit",
    "auto_scale_batch_size": "list a BatchSizeFinder() in callbacks, or write "
    "trainer.scale_batch_size(task, train_dataloader) before fit",
    "row_log_interval": "write log_every_n_steps",
    "flush_logs_every_n_steps": "write logger=CSVLogger(folder, flush_logs_every_n_steps=...), "
    "from ofengine.loggers",
    "log_gpu_memory": "nothing here measures the GPU's memory: watch nvidia-smi",
    "move_metrics_to_cpu": "logged tensors become numbers by themselves: leave it out",
    "enable_autolog_hparams": "what save_hyperparameters() was told goes to the loggers and into "
    "checkpoints: leave it out",
    "model_registry": "nothing is uploaded here: list a ModelCheckpoint(dirpath=...) in callbacks, "
    "and upload its best_model_path after fit",
    # fit, validate, test and predict.
    "model": "it is called task here: give the task first, as in fit(task, train_dataloader)",
    "train_dataloader": "write train_dataloaders",
    "test_dataloaders": "write dataloaders, as in test(task, dataloaders=...)",
    "verbose": "the progress bar shows the metrics: leave it out, or write "
    "Trainer(enable_progress_bar=False)",
    "weights_only": "no checkpoint here can run code: leave it out; load_weights(task, path) takes "
    "the weights alone",
}
"""Arguments of Lightning's ``Trainer``, and of its ``fit``, ``validate``, ``test`` and
``predict``."""

ARGUMENTS_ELSEWHERE: Mapping[str, str] = {
    **_each(
        "datamodule ckpt_path train_dataloaders val_dataloaders rates_on_resume",
        "give it to fit, as in Trainer(...).fit(task, ...)",
    ),
    **_each("dataloaders", "give it to validate, test or predict"),
    **_each("sync_dist prog_bar on_step on_epoch", "give it to log, as in self.log(name, value)"),
}
"""Arguments of the Trainer's verbs, and of ``self.log``, that are written into the Trainer's."""

TRAINER_ATTRIBUTES: Mapping[str, str] = {
    # The task, its optimizer and its rates.
    **_each("model lightning_module get_model", "write trainer.task"),
    **_each(
        "lightning_optimizers optimizer_frequencies",
        "write trainer.optimizers, a dict by name, or trainer.optimizer where there is one",
    ),
    **_each(
        "lr_scheduler_configs lr_schedulers",
        "there is one schedule: write trainer.lr_scheduler, or ask trainer.rates, which knows "
        "every group's rate at every step",
    ),
    **_each(
        "tune tuner tuning auto_lr_find",
        "write trainer.lr_find(task, train_dataloader).suggestion()",
    ),
    "init_module": "make the task in the usual way: the Trainer moves it to its device",
    # Metrics, loggers, callbacks.
    "progress_bar_dict": "write trainer.progress_bar_metrics",
    **_each(
        "progress_bar_callback prediction_writer_callbacks",
        "keep the object that you list in callbacks, or look for it in trainer.callbacks",
    ),
    "weights_save_path": "ask the ModelCheckpoint in trainer.callbacks for its dirpath",
    "call_hook": "only the Trainer calls hooks: call the callback's method itself",
    # The data.
    **_each(
        "train_dataloader val_dataloaders test_dataloaders predict_dataloaders",
        "keep the dataloader that you give to the Trainer, or ask the task's own method",
    ),
    **_each(
        "reset_train_dataloader reset_val_dataloader reset_train_val_dataloaders "
        "reset_test_dataloader reset_predict_dataloader reload_dataloaders_every_n_epochs",
        _ANEW_EACH_PASS,
    ),
    "limit_train_batches": "write trainer.num_training_batches: what the limit leaves of an epoch",
    **_each(
        "num_val_batches num_test_batches num_predict_batches num_sanity_val_batches "
        "limit_val_batches limit_test_batches limit_predict_batches",
        "write trainer.num_evaluation_batches: of the evaluation going on, all dataloaders "
        "together",
    ),
    "overfit_batches": "write trainer.num_training_batches: what it leaves of an epoch",
    "profiler": "write trainer.profile",
    # Where a run is.
    **_each(
        "fit_loop validate_loop test_loop predict_loop train_loop evaluation_loop",
        "the loops are no objects here: trainer.current_epoch, trainer.global_step and "
        "trainer.batch_idx tell where a run is",
    ),
    "state": "setup(stage) tells which verb runs, and task.training whether it trains",
    "training": "write task.training, which is False during an evaluation",
    **_each(
        "validating testing predicting evaluating",
        "the hooks tell it: note it in on_validation_start and on_validation_end, or those of test "
        "and predict",
    ),
    "enable_validation": "write trainer.has_validation",
    "disable_validation": "write not trainer.has_validation",
    **_each(
        "val_check_interval val_check_batch",
        "keep the number that you give as val_check_interval, or note in on_validation_start when "
        "validation is due",
    ),
    **_each(
        "ckpt_path resume_from_checkpoint validated_ckpt_path tested_ckpt_path predicted_ckpt_path",
        "keep the path that you give as ckpt_path",
    ),
    **_each(
        "interrupted received_sigterm",
        "write on_exception, which gets the KeyboardInterrupt of Ctrl-C and the SystemExit(143) of "
        "SIGTERM",
    ),
    # The machine.
    **_each(
        "accelerator devices device_ids data_parallel_device_ids gpus num_gpus root_gpu tpu_cores "
        "ipus",
        "each rank trains on one device: write trainer.device, or trainer.world_size",
    ),
    "should_rank_save_checkpoint": "write trainer.is_global_zero",
    **_each("num_devices num_processes", "write trainer.world_size"),
    **_each(
        "strategy training_type_plugin data_parallel distributed_backend "
        "distributed_sampler_kwargs",
        _LEAVE_OUT,
    ),
    **_each("precision precision_plugin amp_backend use_amp", "write trainer.settings.precision"),
    "scaler": "the loss scale is fixed, and a part of the compiled step: leave it out",
    # Arguments, and how they come in.
    **_each(
        "from_argparse_args add_argparse_args parse_argparser default_attributes "
        "match_env_arguments",
        "add the arguments that you need to a parser of your own, and give them by name, as in "
        "Trainer(max_epochs=parsed.max_epochs)",
    ),
    **{
        name: TRAINER_ARGUMENTS[name]
        for name in (
            *("barebones", "enable_autolog_hparams"),
            *("terminate_on_nan", "track_grad_norm", "weights_summary"),
        )
    },
}
"""Attributes and methods of Lightning's ``Trainer``."""

TASK_ATTRIBUTES: Mapping[str, str] = {
    # The steps.
    "automatic_optimization": _STEPS_ALONE,
    "manual_backward": _STEPS_ALONE,
    "clip_gradients": "write Trainer(gradient_clip_val=..., gradient_clip_algorithm=...)",
    **_each(
        "toggle_optimizer untoggle_optimizer toggled_optimizer",
        "of several optimizers each trains its own parameters alone, by itself; else freeze what "
        "is not to train with requires_grad_(False), or list "
        "a GradualUnfreezing in callbacks",
    ),
    "grad_norm": _GRAD_NORM,
    "truncated_bptt_steps": _SPLIT_SEQUENCES,
    # The weights.
    "strict_loading": "weights are loaded all or none: write "
    'load_weights(task.model, path, prefix="model.") for a part of them',
    **_each(
        "to_torchscript to_tensorrt",
        "write to_onnx(path), which other tools read, or ofengine.checkpoint.save_weights(task, "
        "path), which writes the weights for PyTorch",
    ),
    "dtype": "write next(self.parameters()).dtype",
    "model_size": "write sum(p.numel() * p.element_size() for p in self.parameters())",
    "summarize": "list a ModelSummary(max_depth=...) in callbacks, which prints it when fit starts",
    "hparams_initial": "write self.hparams, which holds what save_hyperparameters() was told",
    "remove_ignored_hparams": "write save_hyperparameters(ignore=[...])",
    # Logs and output.
    **_each(
        "write_prediction write_prediction_dict",
        "return it from predict_step: predict gives all of them back, and a PredictionWriter in "
        "callbacks writes them to files",
    ),
    # The data and the machine.
    "datamodule": "write self.trainer.datamodule",
    "prepare_data_per_node": _LEAVE_OUT,
    "allow_zero_length_dataloader_with_multiple_devices": "a dataloader without a batch is an "
    "error here: leave it out",
    "all_gather": "log the value, and that of all ranks counts; or write self.trainer.gather(...)",
    **_each("global_rank local_rank", "write self.trainer.global_rank or self.trainer.local_rank"),
    "on_gpu": 'write self.device.type == "cuda"',
    **_each("device_mesh fabric", _LEAVE_OUT),
}
"""Attributes and methods of ``LightningModule`` that a task might read, call or set."""

_ONE_DEVICE_END = "one device has the whole batch: write it at the end of"
_IN_THE_DATASET = "change batches in the dataset or in the DataLoader's collate_fn"
_EVAL_MODE = "the layers go into eval mode by themselves: write"

HOOKS: Mapping[str, str] = {
    # Outputs of steps and epochs.
    "training_epoch_end": "write on_train_epoch_end, and collect the outputs in on_train_batch_end",
    "validation_epoch_end": "write on_validation_epoch_end, and collect the outputs in "
    "on_validation_batch_end; what is logged is averaged over the epoch anyway",
    "test_epoch_end": "write on_test_epoch_end, and collect the outputs in on_test_batch_end; what "
    "is logged is averaged over the epoch anyway",
    "training_step_end": f"{_ONE_DEVICE_END} training_step",
    "validation_step_end": f"{_ONE_DEVICE_END} validation_step",
    "test_step_end": f"{_ONE_DEVICE_END} test_step",
    **_each("get_progress_bar_dict", "write self.log(name, value, prog_bar=True)"),
    "tbptt_split_batch": _SPLIT_SEQUENCES,
    # Backward and the update.
    "backward": "the Trainer calls backward itself: change the loss in training_step, or write "
    "on_before_backward or on_after_backward (eager mode)",
    "optimizer_step": "the Trainer makes the update itself: write on_after_optimizer_step, or "
    "on_before_optimizer_step (eager mode), and return a warm-up as the lr_scheduler of "
    "configure_optimizers",
    "optimizer_zero_grad": "gradients are set to None after each update: write "
    "on_before_zero_grad (eager mode)",
    "lr_scheduler_step": "rates are planned ahead: return any function of the step as the "
    "lr_scheduler of configure_optimizers, or call trainer.set_lr(group, lr)",
    "configure_gradient_clipping": "write Trainer(gradient_clip_val=..., "
    "gradient_clip_algorithm=...), or change gradients in on_before_optimizer_step (eager mode)",
    "log_grad_norm": _GRAD_NORM,
    # What is made at the beginning.
    **_each(
        "configure_model configure_sharded_model",
        "make all layers in the task's __init__: the Trainer moves them to its device",
    ),
    "prepare_data": "write it on the task, or in an ofengine.DataModule",
    **_each("on_configure_sharded_model on_before_accelerator_backend_setup", "write setup(stage)"),
    **_each(
        "on_init_start on_init_end", "write setup(stage), or __init__ where no Trainer is needed"
    ),
    **_each(
        "on_pretrain_routine_start on_pretrain_routine_end on_post_move_to_device",
        "write on_fit_start, which fires once the task is on its device",
    ),
    # Batches and dataloaders.
    "transfer_batch_to_device": "tensors in tuples, lists and dicts are moved by the Trainer: let "
    "the DataLoader's collate_fn return these",
    "on_before_batch_transfer": _IN_THE_DATASET,
    "on_after_batch_transfer": f"{_IN_THE_DATASET}, or at the beginning of training_step, where "
    "they are on the device",
    "on_train_dataloader": "write it into train_dataloader()",
    "on_val_dataloader": "write it into val_dataloader()",
    "on_test_dataloader": "write it into test_dataloader()",
    "on_predict_dataloader": "write it into predict_dataloader()",
    # Other names for what there is.
    "on_batch_start": "write on_train_batch_start",
    "on_batch_end": "write on_train_batch_end",
    "on_epoch_start": "write on_train_epoch_start, on_validation_epoch_start or "
    "on_test_epoch_start",
    "on_epoch_end": "write on_train_epoch_end, on_validation_epoch_end or on_test_epoch_end",
    "on_keyboard_interrupt": "write on_exception, which gets the KeyboardInterrupt",
    # Training mode and eval mode.
    "on_validation_model_eval": f"{_EVAL_MODE} on_validation_start",
    "on_test_model_eval": f"{_EVAL_MODE} on_test_start",
    "on_predict_model_eval": f"{_EVAL_MODE} on_predict_start",
    **_each(
        "on_validation_model_train on_test_model_train",
        "the layers that were in training mode before go back to it by themselves, and no others: "
        "leave it out",
    ),
    "on_validation_model_zero_grad": "gradients are set to None after each update, and validation "
    "makes none: leave it out",
    # Checkpoints.
    "on_hpc_save": "write on_save_checkpoint on the task",
    "on_hpc_load": "write on_load_checkpoint on the task",
    "on_save_checkpoint": "write state_dict(), which returns what a checkpoint keeps of a callback",
    "on_load_checkpoint": "write load_state_dict(state), which gets what state_dict() returned",
}
"""Methods that users of Lightning override, in a module, a callback or a data module.

``on_save_checkpoint`` and ``on_load_checkpoint`` are hooks of a task here as well; of a
``Callback`` they are not.
"""

LOG_ARGUMENTS: Dict[str, str] = {
    **_each("sync_dist_group rank_zero_only", "the values of all ranks count: leave it out"),
    "reduce_fx": "an epoch's value is the mean, weighted by batch_size: for another, log an object "
    "of ofengine.metrics",
    "add_dataloader_idx": "a name ends in /dataloader_idx_N where there are several loaders",
    "enable_graph": "what is logged is always detached: leave it out",
    "metric_attribute": "log the metric object itself, as in log(name, self.acc)",
}
"""Arguments of ``self.log``."""

STEP_ARGUMENTS: Mapping[str, str] = {
    "optimizer_idx": "of several optimizers each has a name: write optimizer_name as the third "
    "argument, a text, and compare it with the names that configure_optimizers returns",
    "optimizer_closure": "the Trainer calls the step of the optimizer: leave it out",
    "hiddens": _SPLIT_SEQUENCES,
    "dataloader_idx": "a step has one batch of all its loaders: leave it out",
}
"""Arguments of ``training_step``."""
