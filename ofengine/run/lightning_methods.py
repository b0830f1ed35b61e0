"""What to write where a user gives an argument of Lightning's to a method that has it not.

As in :mod:`.lightning`: a value is the end of an error's sentence.
"""

from __future__ import annotations

from typing import Mapping

_TRIED_IS_FIT = "it is fit that is tried: leave it out"
_NO_ATTRIBUTE_IS_SET = "no attribute is set: write"

METHOD_ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "load_from_checkpoint": {
        "checkpoint_path": "give the path first, as in load_from_checkpoint(path)",
        "map_location": "weights are read as they are, and a Trainer moves them to its device: "
        "leave it out",
        "hparams_file": "the hyper-parameters are in the checkpoint: leave it out, or give them by "
        "name",
        "strict": "all weights are loaded or none: make the task yourself, and write "
        "ofengine.load_weights(task, path, strict=False)",
        "weights_only": "no checkpoint here can run code: leave it out",
    },
    "save_hyperparameters": {
        "logger": "what it was told goes to the loggers and into checkpoints: leave it out",
        "frame": "it looks at the __init__ that calls it: leave it out",
    },
    "save_checkpoint": {
        "weights_only": "write ofengine.checkpoint.save_weights(task, path), which writes the "
        "weights alone",
        "storage_options": "a path is that of a file on a disk: leave it out",
    },
    "lr_find": {
        "num_training": "write num_steps",
        "update_attr": f"{_NO_ATTRIBUTE_IS_SET} lr = trainer.lr_find(task, "
        "train_dataloader).suggestion(), and give it to a task",
        "attr_name": f"{_NO_ATTRIBUTE_IS_SET} lr = trainer.lr_find(task, "
        "train_dataloader).suggestion(), and give it to a task",
        "dataloaders": "give it second, as in lr_find(task, train_dataloaders)",
        "datamodule": "give it second, as in lr_find(task, datamodule)",
        "val_dataloaders": "nothing is validated in a sweep: leave it out",
        "method": _TRIED_IS_FIT,
    },
    "scale_batch_size": {
        "batch_arg_name": f"{_NO_ATTRIBUTE_IS_SET} rows = trainer.scale_batch_size(task, "
        "train_dataloader), and make a DataLoader with these",
        "dataloaders": "give it second, as in scale_batch_size(task, train_dataloaders)",
        "datamodule": "give it second, as in scale_batch_size(task, datamodule)",
        "val_dataloaders": "nothing is validated in a trial: leave it out",
        "method": _TRIED_IS_FIT,
    },
}
"""Arguments of other methods, by the method's name."""

CHECKPOINT_KEYS: Mapping[str, str] = {
    "state_dict": "all parameters and buffers are kept by themselves: leave it out, or ask "
    "self.state_dict()",
    "optimizer_states": "optimizers are kept by themselves: leave it out, or ask "
    "self.trainer.optimizers",
    "lr_schedulers": "schedules are kept by themselves: leave it out, or ask self.trainer.rates",
    "callbacks": "what a callback's state_dict() returns is kept by itself: leave it out",
    "hyper_parameters": "what save_hyperparameters() was told is kept by itself: ask self.hparams",
    "epoch": "where the run is, is kept by itself: ask self.current_epoch",
    "global_step": "where the run is, is kept by itself: ask self.global_step",
    "loops": "where the run is, is kept by itself: leave it out, or ask self.trainer.progress",
}
"""What Lightning's ``checkpoint`` has in ``on_save_checkpoint`` and ``on_load_checkpoint``."""
