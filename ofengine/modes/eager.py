"""Eager mode: each operation runs as Python reaches it."""

from __future__ import annotations

from sys import getrefcount
from typing import Any, Callable, Dict, Optional, Tuple, Union

import oneflow as flow
from oneflow import Tensor, nn

from ofengine._oneflow import optimizer_state
from ofengine._oneflow.bias_correction import corrects_bias, let_optimizers_ask, step_as_graphs
from ofengine._oneflow.operators import backward_of
from ofengine._oneflow.optimizer_copies import replace_state
from ofengine._oneflow.quick_updates import quick_update_of
from ofengine._oneflow.watched_options import watch_options
from ofengine.errors import ConfigurationError
from ofengine.modes.steps import (
    clip,
    drop_gradients_of_frozen,
    split_outputs,
    step_arity,
)
from ofengine.ranks.gradients import GradientExchange
from ofengine.ranks.sharded_state import ShardedState
from ofengine.ranks.shares import ABSENT
from ofengine.ranks.statistics import RunningStatistics
from ofengine.ranks.synced_norms import SyncedNorms
from ofengine.run.mode import HookCalls, ParameterStates
from ofengine.run.state import Run
from ofengine.run.weighing import weight_of
from ofengine.task import TaskModule


class EagerMode:
    """Runs the steps of one task eagerly. See :class:`ofengine.run.mode.Mode`."""

    def __init__(self, run: Run, task: TaskModule, calls: HookCalls) -> None:
        self._run = run
        self._task = task
        self._before_backward = calls["on_before_backward"]
        self._after_backward = calls["on_after_backward"]
        self._before_update = calls["on_before_optimizer_step"]
        self._before_zero_grad = calls["on_before_zero_grad"]
        self._arity: Dict[str, int] = {}
        self._task_name = type(task).__name__
        self._exchange: Optional[GradientExchange] = None
        """Where there are several ranks: what the window has of all of them."""
        self._norms: Union[RunningStatistics, SyncedNorms, None] = None
        self._sharded: Optional[ShardedState] = None
        """Where each rank keeps a part of the optimizer's state."""
        self._step_of_all: Optional[Callable[[], None]] = None
        """How these are updated together, in the place of the optimizer's own step."""

    def start(self) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""
        self._optimizer = optimizer = self._run.made.optimizer
        self._named = (self._run.name,) if self._run.name else ()
        self._takes_both = step_arity(self._task, "training_step", 2 + len(self._named)) > 1
        optimizer.zero_grad(set_to_none=True)  # what a run that was cut off left behind
        let_optimizers_ask()
        self._corrects_bias = corrects_bias(optimizer)
        self._averages = self._run.settings.windows.most > 1
        self._clips = self._run.settings.gradient_clip_val is not None
        self._watch_groups()
        if self._run.ranks is not None:
            every = [each for group in optimizer.param_groups for each in group.parameters]
            kind = SyncedNorms if self._run.settings.sync_batchnorm else RunningStatistics
            self._norms = kind(self._run.ranks, self._task)
            # Of a batch its weight and 1, which travel as a gradient does.
            self._weights = nn.Parameter(flow.zeros(2, device=self._run.settings.device))
            every.append(self._weights)
            self._exchange = GradientExchange(self._run.ranks, every)
        self._shard()
        if self._sharded is not None:
            self._sharded.drop_others()
            self._step_of_all = self._sharded.step

    def _shard(self) -> None:
        run = self._run
        if run.settings.strategy == "zero" and run.ranks is not None and self._sharded is None:
            self._sharded = ShardedState(run.ranks, run.made.optimizer)

    def _watch_groups(self) -> None:
        self._groups = list(self._optimizer.param_groups)
        self._mark = watch_options(self._optimizer)
        self._quick: Any = quick_update_of(self._optimizer)
        # Somebody may put another step into the optimizer's place for it at any time.
        self._step_of_quick = self._optimizer.step if self._quick is not None else None

    def train_step(self, batch: Any, batch_idx: int, window: int, closes: bool) -> Dict[str, Any]:
        """See :class:`~ofengine.run.mode.Mode`."""
        rest: Dict[str, Any] = {}
        if batch is not ABSENT:
            if self._norms is not None:
                self._norms.begin()
            step: Callable[..., Any] = self._task.training_step
            loss = step(batch, batch_idx, *self._named) if self._takes_both else step(batch)
            if type(loss) is not Tensor or loss.dim() or not loss.requires_grad:
                loss, rest = split_outputs(loss, self._task_name)
            own = loss.detach()
            # Whoever else has it may write into it. A copy costs more than the rest of a step.
            rest["loss"] = own.clone() if getrefcount(loss) > 2 or self._before_backward else own
            for call in self._before_backward:
                call(loss)
            if self._averages and "weight" in rest:
                backward_of(self._weighed(loss, rest["weight"]))
            else:
                backward_of(loss if window == 1 else loss / window)
            for call in self._after_backward:
                call()
        if self._exchange is not None:
            self._exchange_gradients(self._exchange, closes)
        if closes:
            optimizer = self._optimizer
            if window > 1:
                drop_gradients_of_frozen(optimizer)
            if self._averages and self._run.weighing.batches:
                self._weigh(window)
            for call in self._before_update:
                call(optimizer)
            if optimizer.param_groups != self._groups:  # load_state_dict makes new ones
                self._watch_groups()
            if self._clips or self._mark.clips:
                clip(self._run)
            clears, step = False, self._step_of_all or optimizer.step
            if step is self._step_of_quick:
                clears = not self._before_zero_grad and "zero_grad" not in optimizer.__dict__
                self._quick(optimizer, clears)
            elif self._corrects_bias:
                step_as_graphs(step)  # Adam and its like
            else:
                step()
            if not clears:
                for call in self._before_zero_grad:
                    call(optimizer)
                optimizer.zero_grad(set_to_none=True)
            if batch is ABSENT:  # no hook of a batch writes the next step's rates
                self._run.rates.write(self._run.progress.global_step + 1)
        return rest

    def _weighed(self, loss: Any, weight: Any) -> Any:
        weight = weight_of(loss, weight)
        if self._exchange is None:
            self._run.weighing.add(weight)
        else:
            self._weights.grad = flow.stack([weight, weight * 0 + 1])
        return loss * weight

    def _weigh(self, window: int) -> None:
        parameters = [p for g in self._optimizer.param_groups for p in g.parameters]
        gradients = [each.grad for each in parameters]
        weighed = self._run.weighing.close(gradients, window, self._task_name)
        for parameter, gradient in zip(parameters, weighed):
            parameter.grad = gradient

    def _exchange_gradients(self, exchange: GradientExchange, closes: bool) -> None:
        """Add the gradients of all ranks; where the window ``closes``, they are in ``.grad``."""
        train = self._run.train
        check = 0 if train is None else train.check_of(self._run.progress.batch_idx)
        norms = self._norms
        if norms is None:
            exchange.add(check)
        else:
            norms.finish(exchange.add(check, norms.done, norms.body))
        if closes:
            exchange.put(kept=self._gradients_may_be_kept())
            self._take_weights(self._weights.grad)
            self._weights.grad = None

    def _gradients_may_be_kept(self) -> bool:
        """True where a hook or an optimizer's own code could keep a gradient beyond the update."""
        optimizer = self._optimizer
        hooks = self._before_update or self._before_zero_grad or "zero_grad" in optimizer.__dict__
        quick = self._step_of_all is None and optimizer.step is self._step_of_quick
        return bool(hooks) or not quick

    def _take_weights(self, sums: Any) -> None:
        """What the batches of all ranks weigh together, and how many of them said so."""
        if sums is not None:
            total, batches = sums.numpy().tolist()
            state = {"batches": int(batches), "total": total}
            self._run.weighing.load(state, next(self._task.parameters()))

    def eval_step(self, step: str, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """See :class:`~ofengine.run.mode.Mode`."""
        arity = self._arity.get(step)
        if arity is None:
            arity = self._arity[step] = step_arity(self._task, step, 3)
        with flow.no_grad():
            return getattr(self._task, step)(*(batch, batch_idx, dataloader_idx)[:arity])

    def evaluated(self, step: str, dataloader_idx: int) -> None:
        """Nothing: a rank evaluates its batches alone."""

    def optimizer_state(self) -> Tuple[int, ParameterStates]:
        """See :class:`~ofengine.run.mode.Mode`."""
        names = {id(p): name for name, p in self._task.named_parameters()}
        steps, states = optimizer_state.optimizer_state(self._run.made.optimizer, names)
        if self._sharded is not None:
            whole = self._sharded.whole()
            states = {names[key]: kept for key, kept in whole.items() if key in names}
        return steps, states

    def load_optimizer_state(self, steps: int, states: ParameterStates) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""
        parameters = dict(self._task.named_parameters())
        self._shard()
        if self._sharded is not None:
            states = self._sharded.without_others(states, parameters)
        replace_state(self._run.made.optimizer, parameters, steps, states)

    def gradients(self) -> Dict[str, Any]:
        """See :class:`~ofengine.run.mode.Mode`."""
        if self._exchange is not None:
            names = {id(p): n for n, p in self._task.named_parameters()}
            totals = self._exchange.totals({**names, id(self._weights): ""})
            self._take_weights(totals.pop("", None))
            return totals
        return {n: p.grad for n, p in self._task.named_parameters() if p.grad is not None}

    def load_gradients(self, gradients: Dict[str, Any]) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""
        if self._exchange is not None:
            named = dict(self._task.named_parameters())
            totals = {id(named[name]): each for name, each in gradients.items()}
            weighed = self._run.weighing.state()
            if weighed is not None:
                sums = flow.tensor([weighed["total"], float(weighed["batches"])])
                totals[id(self._weights)] = sums
                self._run.weighing.load(None, None)
            self._exchange.load(totals)
            return
        for name, parameter in self._task.named_parameters():
            parameter.grad = gradients.get(name)

    def rebuild(self, reason: str) -> None:
        """Write the rates into the groups now; all else is made anew at every step anyway."""
        self._run.rates.write(self._run.progress.global_step)

    def settle(self) -> None:
        """Nothing to bring up to date."""

    def close(self) -> None:
        """Let go of the batch norms, and let the optimizer keep the whole of its state again."""
        if self._norms is not None:
            self._norms.close()
        if self._sharded is not None and self._run.ranks is not None and not self._run.ranks.over:
            self._sharded.put_together()
        self._sharded = None

    def default_train_graph(self) -> nn.Graph:
        """There is none."""
        raise ConfigurationError('build_graph() is for Trainer(mode="graph").')

    def lower_rates(self, graph: nn.Graph) -> None:
        """There is no graph of this run."""
        raise ConfigurationError('lower_rates() is for Trainer(mode="graph").')
