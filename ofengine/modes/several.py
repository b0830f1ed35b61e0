"""Several optimizers: a mode of its own for each, all of one kind, stepping one after another."""

from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator, List, Sequence, Set, Tuple

from oneflow import nn

from ofengine.errors import ConfigurationError, OFEngineError, quoted
from ofengine.modes.eager import EagerMode
from ofengine.modes.graph import GraphMode
from ofengine.modes.steps import trained_parameters
from ofengine.run.mode import HookCalls, Mode, ParameterStates
from ofengine.run.state import Run


class SeveralMode:
    """Runs the training steps of a run with several optimizers. See :class:`~.run.mode.Mode`.

    Each part of the run has a mode as a run with that optimizer alone would have; graph mode
    compiles graphs of its own for each. Where the steps of one run, the parameters of the others
    have no gradient: in eager mode they are frozen for its time, a graph is traced as if they were.
    One whose parameters are all frozen makes no step as long; its schedule goes on.

    Args:
        run: the run, with its parts.
        evaluation: evaluates.
        calls: the hooks.
    """

    def __init__(self, run: Run, evaluation: Mode, calls: HookCalls) -> None:
        self._run = run
        self._evaluation = evaluation
        self._is_eager = run.settings.mode == "eager"
        self._parts: List[Tuple[str, int, Run, List[Any]]] = []
        for name, part in run.parts.items():
            kind = EagerMode if self._is_eager else GraphMode
            part.mode = kind(part, run.task, calls)
            if run.profile is not None:
                own: Any = part.mode
                own.train_step = run.profile.wrap(f"step: training {name}", own.train_step)
            groups = part.made.optimizer.param_groups
            own_parameters = [each for group in groups for each in group.parameters]
            self._parts.append((name, part.every_n_batches, part, own_parameters))
        self._frozen: Set[str] = set()
        """The optimizers whose newest step was left out, for all their parameters are frozen."""
        self._stepping = self._parts[0][2]
        self.losses: List[Dict[str, Any]] = []
        """That of each optimizer, by batch; whoever watches the losses takes them out."""

    def _modes(self) -> Iterator[Mode]:
        return (part.training_mode for _, _, part, _ in self._parts)

    def start(self) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""
        for mode in self._modes():
            mode.start()

    def train_step(self, batch: Any, batch_idx: int, window: int, closes: bool) -> Dict[str, Any]:
        """The steps of all optimizers whose turn it is; what each returned, by its name.

        The "loss" is the sum of theirs.
        """
        outputs: Dict[str, Any] = {}
        losses: Dict[str, Any] = {}
        total: Any = None
        for name, every, part, own in self._parts:
            if batch_idx % every:
                continue
            mode = part.training_mode
            for parameter in own:
                if parameter.requires_grad:
                    break
            else:
                self._frozen.add(name)
                part.progress.global_step += 1
                continue
            if name in self._frozen:
                self._frozen.remove(name)
                mode.rebuild(f"optimizer {name!r} steps again")  # rates go by the steps made
            self._stepping = part
            try:
                with frozen(part.others if self._is_eager else ()):
                    outputs[name] = returned = mode.train_step(batch, batch_idx, 1, True)
            except OFEngineError as error:
                error.args = (f"in the step of optimizer {name!r}: {error}",)
                raise
            part.progress.global_step += 1
            loss = losses[name] = returned["loss"]
            returned["loss"] = loss.clone()  # hooks may write into it
            total = loss if total is None else total + loss
        if total is None:
            raise _nobody_steps(self._run, batch_idx)
        self.losses.append(losses)
        return {**outputs, "loss": total}

    def eval_step(self, step: str, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """See :class:`~ofengine.run.mode.Mode`."""
        return self._evaluation.eval_step(step, batch, batch_idx, dataloader_idx)

    def evaluated(self, step: str, dataloader_idx: int) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""

    def optimizer_state(self) -> Tuple[int, ParameterStates]:
        """There is none of all: each part's mode has its own."""
        raise ConfigurationError("there are several optimizers: each part has its own state.")

    def load_optimizer_state(self, steps: int, states: ParameterStates) -> None:
        """As :meth:`optimizer_state`."""
        self.optimizer_state()

    def gradients(self) -> Dict[str, Any]:
        """None: batches are not accumulated."""
        return {}

    def load_gradients(self, gradients: Dict[str, Any]) -> None:
        """Nothing: batches are not accumulated."""

    def rebuild(self, reason: str) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""
        for mode in self._modes():
            mode.rebuild(reason)

    def settle(self) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""
        for mode in self._modes():
            mode.settle()

    def close(self) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""
        for mode in self._modes():
            mode.close()

    def default_train_graph(self) -> nn.Graph:
        """Of the optimizer whose step is going on."""
        return self._stepping.training_mode.default_train_graph()

    def lower_rates(self, graph: nn.Graph) -> None:
        """Of the optimizer whose step is going on."""
        self._stepping.training_mode.lower_rates(graph)


def stepping(run: Run, batch_idx: int) -> List[Run]:
    """The parts of ``run`` whose optimizers are to step in a batch.

    Raises :class:`ConfigurationError` where there is none.
    """
    turns = [part for part in run.parts.values() if batch_idx % part.every_n_batches == 0]
    found = [part for part in turns if trained_parameters(part)]
    if not found:
        raise _nobody_steps(run, batch_idx)
    return found


def _nobody_steps(run: Run, batch_idx: int) -> ConfigurationError:
    every = run.parts.items()
    rare = [name for name, part in every if batch_idx % part.every_n_batches]
    held = [name for name, part in every if name not in rare and not trained_parameters(part)]
    others = f", and the turn of {quoted(rare, most=8)} comes in other batches" if rare else ""
    return ConfigurationError(
        f"no optimizer steps in batch {batch_idx}: all parameters of {quoted(held, most=8)} are "
        f"frozen, by requires_grad or a callback such as GradualUnfreezing{others}: let those of "
        "one that steps in every batch train."
    )


@contextlib.contextmanager
def frozen(parameters: Sequence[Any]) -> Iterator[None]:
    """Those of ``parameters`` that train do not, in the block."""
    training = [each for each in parameters if each.requires_grad]
    for each in training:
        each.requires_grad = False
    try:
        yield
    finally:
        for each in training:
            each.requires_grad = True
