"""DataModule: where the data of a task comes from, apart from the task."""

from __future__ import annotations

from typing import Any, Mapping

from ofengine.errors import UnknownAttributeError
from ofengine.run.lightning import HOOKS, mend_for

_OWN_ATTRIBUTES = "keep its arguments as attributes, or call save_hyperparameters() in the task"
_OWN_STATE = "write it on the sampler or dataset whose state a checkpoint is to keep"

DATA_MODULE_ATTRIBUTES: Mapping[str, str] = {
    "save_hyperparameters": _OWN_ATTRIBUTES,
    "hparams": _OWN_ATTRIBUTES,
    "from_datasets": "write a class whose loaders return DataLoaders over them",
    "load_from_checkpoint": "make it anew: a checkpoint keeps where its samplers and datasets are",
    "name": "write type(self).__name__",
}
"""Attributes of ``LightningDataModule``."""

DATA_MODULE_HOOKS: Mapping[str, str] = {
    **HOOKS,
    "state_dict": _OWN_STATE,
    "load_state_dict": _OWN_STATE,
    "on_exception": "write it on the task, or in a Callback",
}
"""Methods of ``LightningDataModule`` that nothing calls here."""


class DataModule:
    """The dataloaders of a task, and what it takes to have them; write what you need.

    ``fit(task, datamodule=...)``, ``validate``, ``test`` and ``predict`` call, in this order,
    ``prepare_data()``, ``setup(stage)``, the loaders of their stage, and at last
    ``teardown(stage)``. A loader that it does not have is asked of the task.
    """

    trainer: Any = None
    """The Trainer that uses it, or used it last."""

    def prepare_data(self) -> None:
        """Download and unpack: of several ranks on a machine, one does it and the others wait."""

    def setup(self, stage: str) -> None:
        """Make datasets, on every rank; ``stage`` is "fit", "validate", "test" or "predict"."""

    def teardown(self, stage: str) -> None:
        """Last of all, after an exception too. ``stage`` is as of :meth:`setup`."""

    def train_dataloader(self) -> Any:
        """The training data: a loader, or a dict or list of several."""
        return None

    def val_dataloader(self) -> Any:
        """The validation data: a loader, or several."""
        return None

    def test_dataloader(self) -> Any:
        """The data of ``test``."""
        return None

    def predict_dataloader(self) -> Any:
        """The data of ``predict``."""
        return None

    def __getattr__(self, name: str) -> Any:
        """Nothing is called ``name``: say what Lightning's name for it is here."""
        mend = mend_for(DATA_MODULE_ATTRIBUTES, name)
        if mend is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise UnknownAttributeError(f"self.{name} of a DataModule is Lightning's name: {mend}.")
