"""TaskModule: the one class a user writes."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Dict,
    List,
    Mapping,
    Optional,
    Sequence,
    Type,
    TypeVar,
    Union,
)

import oneflow as flow
from oneflow import nn

from ofengine.checkpoint.file import read
from ofengine.checkpoint.hparams import HyperParameters
from ofengine.checkpoint.hparams_given import keep_arguments
from ofengine.checkpoint.made_again import made_again, refuse_unknown
from ofengine.checkpoint.of_task import take_checkpoint
from ofengine.errors import (
    ConfigurationError,
    UnknownArgumentError,
    UnknownAttributeError,
    warn,
)
from ofengine.onnx_model import write_onnx
from ofengine.run.arguments import check_takes
from ofengine.run.lightning import HOOKS, LOG_ARGUMENTS, TASK_ATTRIBUTES, mend_for
from ofengine.run.settings import refuse_arguments
from ofengine.run.view import RunView
from ofengine.task_attributes import Attached, error_within, of_class_alone, scheduler_of
from ofengine.task_hooks import TaskHooks
from ofengine.tracing import forbid_in_trace

if TYPE_CHECKING:
    from oneflow.nn.graph.graph_config import GraphConfig
    from oneflow.optim import Optimizer


T = TypeVar("T", bound="TaskModule")


class TaskModule(TaskHooks, nn.Module):
    """A model together with how it is trained: steps, parameter groups, optimizer, hooks.

    Write ``training_step`` and, as a rule, ``param_groups``; the rest has defaults. The same task
    runs unchanged in both modes. A step takes ``batch``, as the dataloader gave it, on the device,
    and ``batch_idx``, its number in the epoch, from 0. A step that a verb needs and that is not
    there is a ``ConfigurationError``, an argument that ``log`` has not an ``UnknownArgumentError``.

    Example::

        class Tutorial(TaskModule):
            def __init__(self):
                super().__init__()
                self.model = mobilenet_v2(num_classes=10)

            def training_step(self, batch, batch_idx):
                images, labels = batch
                return nn.functional.cross_entropy(self.model(images), labels)
    """

    hparams: HyperParameters
    """What :meth:`save_hyperparameters` was told: ``hparams["lr"]`` or ``hparams.lr``."""

    example_input_array: Any = None
    """An input of ``forward``, a tuple or dict of several, which ``ModelSummary`` tries."""

    def __getattr__(self, name: str) -> Any:
        """A submodule, parameter or buffer; submodules first, which every step asks for."""
        try:
            return self.__dict__["_modules"][name]
        except KeyError:
            pass  # not raised from here, where it would be told with the error
        if name == "hparams":  # nothing was told yet
            return self.__dict__.setdefault(name, HyperParameters())
        try:
            return super().__getattr__(name)
        except AttributeError:
            own = inspect.getattr_static(type(self), name, None)
            if isinstance(own, (property, functools.cached_property)):
                own_error = error_within(own, self)
                if own_error is not None:
                    raise own_error from None
            elif name in ("logger", "loggers"):  # no property: a user's own stands
                if self._trainer is None:
                    raise UnknownAttributeError(self._not_attached(name)) from None
                return getattr(self._trainer, name)
            mend = mend_for(TASK_ATTRIBUTES, name) or mend_for(HOOKS, name)
            if mend is None:
                raise
        raise UnknownAttributeError(f"self.{name} of a task is Lightning's name: {mend}.")

    # ------------------------------------------------------------------ what the user writes

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss (a tensor of one element), or a dict with the key ``"loss"``.

        Other tensors of the dict are handed to ``on_train_batch_end``. In graph mode this
        method is called once for each shape of batch and compiled: it cannot read tensors
        (``.item()``, ``.numpy()``, ``if tensor``) nor use ``batch_idx``. It is called for each of
        several optimizers, whose name is a third argument, ``optimizer_name``.
        """
        raise ConfigurationError(
            f"{type(self).__name__} has no training_step: write "
            "`def training_step(self, batch, batch_idx)` that returns the loss."
        )

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """Compute and ``log`` what validation should report. Runs without gradients."""
        raise ConfigurationError(
            f"{type(self).__name__} has no validation_step: write "
            "`def validation_step(self, batch, batch_idx)` that logs what validation reports."
        )

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        """As ``validation_step``, for ``Trainer.test``."""
        raise ConfigurationError(
            f"{type(self).__name__} has no test_step: write "
            "`def test_step(self, batch, batch_idx)` that logs what testing reports."
        )

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """What ``Trainer.predict`` collects. Default: ``self(batch)``.

        Of a tuple or list the first element, the inputs, is passed to ``forward``.
        """
        return self(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def param_groups(self) -> List[Dict[str, Any]]:
        """The parameter groups for the optimizer. Default: one of all trainable parameters.

        Each is a dict with ``params`` and any option of the optimizer (``lr``,
        ``weight_decay``, ...). Three more keys are the engine's:

        - ``name``: how logs, errors and tables call the group;
        - ``lr_scale`` (default 1): a constant multiplier of the rate, after the schedule;
        - ``lr_decay_scale`` (default 1): the factor multiplied in at each decay event.
        """
        return [{"name": "all", "params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> Any:
        """The optimizer, or a dict ``{"optimizer": ..., "lr_scheduler": ...}``.

        ``lr_scheduler`` is a scheduler or a dict with ``scheduler``, ``interval`` ("step", the
        default here, or "epoch") and ``frequency`` (default 1). Default: the cookbook's
        ``oneflow.optim.SGD(self.param_groups())``, whose rate is 1e-3 where a group has none.
        Several are returned by name, ``{"generator": ..., "critic": {"optimizer": ...}}``, see the
        page "Several optimizers".
        """
        check_takes(self, "param_groups")
        return flow.optim.SGD(self.param_groups())

    def build_graph(self) -> nn.Graph:
        """The graph that trains this task in graph mode. Default: ``training_step`` compiled.

        An override returns any ``oneflow.nn.Graph`` whose ``build`` takes the batch's
        elements, calls ``backward`` and returns the loss, with ``add_optimizer(self.optimizer)``
        called in its ``__init__``. It is called once for each shape of batch.
        """
        return self.trainer.default_train_graph()

    def configure_graph(self, config: GraphConfig) -> None:
        """Set OneFlow's own switches for this task's graphs; by default none is set.

        ``config`` is ``graph.config`` of a graph that is about to be compiled, be it of training,
        of the gradients or the update where batches are accumulated, or of evaluation. For example
        ``config.allow_fuse_add_to_output(True)`` or
        ``config.enable_cudnn_conv_heuristic_search_algo(False)``. Eager mode has no graph and
        does not call it.
        """

    def train_dataloader(self) -> Any:
        """The training data where ``fit`` is given none."""
        return None

    def val_dataloader(self) -> Any:
        """The validation data where ``fit`` or ``validate`` is given none."""
        return None

    def test_dataloader(self) -> Any:
        """The data of ``test`` where it is given none."""
        return None

    def predict_dataloader(self) -> Any:
        """The data of ``predict`` where it is given none."""
        return None

    def configure_callbacks(self) -> Any:
        """Callbacks that this task brings along, one or a list.

        They take the place of the Trainer's own of their classes, in every verb.
        """
        return []

    def on_save_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        """Put into the empty dict ``checkpoint`` what a checkpoint is to keep of this task.

        Parameters, buffers and hyper-parameters are kept anyway. What may be in it is as in
        :meth:`ofengine.Callback.state_dict`.
        """

    def on_load_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        """Take back what ``on_save_checkpoint`` put into ``checkpoint``.

        ``fit`` calls it last, when all else of the run is there again; ``load_from_checkpoint`` and
        ``validate``, ``test`` and ``predict`` with a ``ckpt_path`` before the weights are loaded.
        """

    # ------------------------------------------------------------------ what the user calls

    def save_hyperparameters(
        self, *names: str, ignore: Union[str, Sequence[str]] = (), **_unknown: Any
    ) -> None:
        """Keep the arguments of ``__init__``, from which it is called, in ``self.hparams``.

        Of a base class and a subclass, all that both were given: where both have a name, the
        subclass's value counts, with which the object can be made again. ``names``: only these;
        default: all but ``ignore``. ``self.hparams`` is a dict whose
        entries are attributes, too. Checkpoints keep, exactly: None, booleans, numbers (numpy's
        too), texts, bytes, paths, arrays, tensors, members of an Enum, and lists, tuples, sets,
        dicts and objects of attrs classes and dataclasses that hold such values; what they keep
        of them is a copy of this moment. ``load_from_checkpoint`` makes the task anew with them,
        and names what could not be kept, such as a function.

        Raises :class:`ConfigurationError` for a name that is no argument, and where ``__init__``
        was given ``*arguments``, which have no name to be kept by.
        """
        refuse_arguments("save_hyperparameters", _unknown)
        frame = inspect.currentframe()
        keep_arguments(self, None if frame is None else frame.f_back, names, ignore)

    @of_class_alone
    def load_from_checkpoint(
        cls: Type[T], path: Union[str, Path, None] = None, **arguments: Any
    ) -> T:
        """A task of this class with the weights of the checkpoint at ``path``.

        It is made with the hyper-parameters that ``save_hyperparameters`` kept, and with
        ``arguments``, which count first. An object comes back where its class is in the module
        of this class, or in an annotation or a default of its ``__init__``: a file names no
        class to import.

        Raises :class:`CheckpointError` where the file is missing, damaged or of another model,
        and where a hyper-parameter is in it that could not be kept, or cannot be made again, or
        one is not that ``__init__`` needs; :class:`UnknownArgumentError` for one of ``arguments``
        that it does not take.
        """
        refuse_unknown(cls, arguments)
        if path is None:
            raise ConfigurationError(
                f"{cls.__name__}.load_from_checkpoint() has no file: give its path first."
            )
        checkpoint = read(path)
        task = made_again(cls, checkpoint, arguments)
        take_checkpoint(task, checkpoint)
        unknown = [name for name in task.hparams if name not in arguments]
        if checkpoint.state is None and unknown:
            warn(
                f"{path} holds weights and no hyper-parameters: {cls.__name__} was made with its "
                f"defaults for {', '.join(unknown)}."
            )
        return task

    def log(
        self,
        name: str,
        value: Any,
        *,
        prog_bar: bool = False,
        logger: bool = True,
        on_step: Optional[bool] = None,
        on_epoch: Optional[bool] = None,
        batch_size: Optional[int] = None,
        sync_dist: bool = True,
        **_unknown: Any,
    ) -> None:
        """Record a metric. Works the same in both modes and never waits for the device.

        Args:
            name: the metric's name; with both ``on_step`` and ``on_epoch`` it is reported as
                ``name_step`` and ``name_epoch``.
            value: a tensor of one element, a number, or an object of :mod:`ofengine.metrics` that
                was updated: ``on_step`` reports its value of the last batch, ``on_epoch`` that of
                all the epoch, after which it is reset.
            prog_bar: show it in the progress bar.
            logger: send it to the loggers.
            on_step: report the value of single batches (default: in ``training_step``).
            on_epoch: report the mean over the epoch, weighted by ``batch_size``
                (default: everywhere else).
            batch_size: the samples the value is a mean of. Default: the first dimension of
                the batch's first tensor.
            sync_dist: taken, and without effect: the values of all ranks always count.
        """
        for given in _unknown:
            mend = mend_for(LOG_ARGUMENTS, given) or "see TaskModule.log"
            raise UnknownArgumentError(f"log has no argument {given!r}: {mend}.")
        record = self.trainer.metrics.log  # by position: a step may log hundreds of names
        record(name, value, prog_bar, logger, on_step, on_epoch, batch_size)

    def log_dict(self, metrics: Mapping[str, Any], **options: Any) -> None:
        """``log`` each entry of ``metrics`` with the same ``options``."""
        if not isinstance(metrics, Mapping):
            raise ConfigurationError(
                f"log_dict() got a {type(metrics).__name__}: give a dict of names and values, or "
                "use log(name, value)."
            )
        for name, value in metrics.items():
            self.log(name, value, **options)

    def print(self, *values: Any, **options: Any) -> None:
        """Python's ``print(*values, **options)``, on rank 0 alone."""
        self.trainer.print(*values, **options)

    def to_onnx(self, path: Union[str, Path], input_sample: Any = None) -> Path:
        """Write ``forward`` of ``input_sample`` to ``path``: ``ofengine.onnx_model.write_onnx``."""
        return write_onnx(self, path, input_sample)

    def freeze(self) -> None:
        """Let no parameter of this task train, and put it into eval mode."""
        self.requires_grad_(False)
        self.eval()

    def unfreeze(self) -> None:
        """Let all parameters of this task train, and put it into training mode."""
        self.requires_grad_(True)
        self.train()

    @property
    def _trainer(self) -> Optional[RunView]:
        attached = self.__dict__.get("_trainer")
        return None if attached is None else attached.trainer

    @_trainer.setter
    def _trainer(self, trainer: Optional[RunView]) -> None:
        self.__dict__["_trainer"] = Attached(trainer)

    @property
    def trainer(self) -> RunView:
        """The Trainer that runs this task."""
        attached = self.__dict__.get("_trainer")
        if attached is None or attached.trainer is None:
            raise ConfigurationError(self._not_attached("device"))
        return attached.trainer

    def _not_attached(self, name: str) -> str:
        return (
            f"{type(self).__name__} is not attached to a Trainer yet: `trainer`, `log`, "
            f"`optimizer` and `{name}` can be used from fit, validate, test or predict on."
        )

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that ``configure_optimizers`` returned; of several, an error."""
        return self.trainer.optimizer

    def optimizers(self) -> Optimizer:
        """As ``optimizer``; Lightning's name for it."""
        return self.trainer.optimizer

    def lr_schedulers(self) -> Any:
        """The scheduler that ``configure_optimizers`` returned, or None.

        Its ``get_last_lr()`` tells the rates of the step that was made last; not readable inside a
        compiled step.
        """
        return scheduler_of(self.trainer)

    @property
    def device(self) -> flow.device:
        """The device that training runs on."""
        return self.trainer.device

    @property
    def current_epoch(self) -> int:
        """The epoch being run, from 0. Not readable inside a compiled step."""
        forbid_in_trace("self.current_epoch")
        return self.trainer.current_epoch

    @property
    def global_step(self) -> int:
        """Optimizer steps done so far. Not readable inside a compiled step."""
        forbid_in_trace("self.global_step")
        return self.trainer.global_step
