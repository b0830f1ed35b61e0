"""The hooks of a task: those of :class:`ofengine.Callback`, without its first two arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oneflow import nn
    from oneflow.optim import Optimizer


class TaskHooks:
    """Methods that a task may override; each is told in :class:`ofengine.Callback`."""

    def prepare_data(self) -> None:
        """Download and unpack: of several ranks on a machine, one does it and the others wait."""

    def setup(self, stage: str) -> None:
        """See :meth:`ofengine.Callback.setup`."""

    def teardown(self, stage: str) -> None:
        """See :meth:`ofengine.Callback.teardown`."""

    def on_exception(self, exception: BaseException) -> None:
        """See :meth:`ofengine.Callback.on_exception`."""

    def on_fit_start(self) -> None:
        """See :meth:`ofengine.Callback.on_fit_start`."""

    def on_fit_end(self) -> None:
        """See :meth:`ofengine.Callback.on_fit_end`."""

    def on_sanity_check_start(self) -> None:
        """See :meth:`ofengine.Callback.on_sanity_check_start`."""

    def on_sanity_check_end(self) -> None:
        """See :meth:`ofengine.Callback.on_sanity_check_end`."""

    def on_train_start(self) -> None:
        """See :meth:`ofengine.Callback.on_train_start`."""

    def on_train_end(self) -> None:
        """See :meth:`ofengine.Callback.on_train_end`."""

    def on_train_epoch_start(self) -> None:
        """See :meth:`ofengine.Callback.on_train_epoch_start`."""

    def on_train_epoch_end(self) -> None:
        """See :meth:`ofengine.Callback.on_train_epoch_end`."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """See :meth:`ofengine.Callback.on_train_batch_start`."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """See :meth:`ofengine.Callback.on_train_batch_end`."""

    def on_after_optimizer_step(self) -> None:
        """See :meth:`ofengine.Callback.on_after_optimizer_step`."""

    def on_before_backward(self, loss: Any) -> None:
        """See :meth:`ofengine.Callback.on_before_backward`."""

    def on_after_backward(self) -> None:
        """See :meth:`ofengine.Callback.on_after_backward`."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """See :meth:`ofengine.Callback.on_before_optimizer_step`."""

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """See :meth:`ofengine.Callback.on_before_zero_grad`."""

    def on_before_graph_compile(self, graph: nn.Graph) -> None:
        """See :meth:`ofengine.Callback.on_before_graph_compile`."""

    def on_validation_start(self) -> None:
        """See :meth:`ofengine.Callback.on_validation_start`."""

    def on_validation_end(self) -> None:
        """See :meth:`ofengine.Callback.on_validation_end`."""

    def on_validation_epoch_start(self) -> None:
        """See :meth:`ofengine.Callback.on_validation_epoch_start`."""

    def on_validation_epoch_end(self) -> None:
        """See :meth:`ofengine.Callback.on_validation_epoch_end`."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """See :meth:`ofengine.Callback.on_validation_batch_start`."""

    def on_validation_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        """See :meth:`ofengine.Callback.on_validation_batch_end`."""

    def on_test_start(self) -> None:
        """See :meth:`ofengine.Callback.on_test_start`."""

    def on_test_end(self) -> None:
        """See :meth:`ofengine.Callback.on_test_end`."""

    def on_test_epoch_start(self) -> None:
        """See :meth:`ofengine.Callback.on_test_epoch_start`."""

    def on_test_epoch_end(self) -> None:
        """See :meth:`ofengine.Callback.on_test_epoch_end`."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """See :meth:`ofengine.Callback.on_test_batch_start`."""

    def on_test_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        """See :meth:`ofengine.Callback.on_test_batch_end`."""

    def on_predict_start(self) -> None:
        """See :meth:`ofengine.Callback.on_predict_start`."""

    def on_predict_end(self) -> None:
        """See :meth:`ofengine.Callback.on_predict_end`."""

    def on_predict_epoch_start(self) -> None:
        """See :meth:`ofengine.Callback.on_predict_epoch_start`."""

    def on_predict_epoch_end(self) -> None:
        """See :meth:`ofengine.Callback.on_predict_epoch_end`."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """See :meth:`ofengine.Callback.on_predict_batch_start`."""

    def on_predict_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        """See :meth:`ofengine.Callback.on_predict_batch_end`."""
