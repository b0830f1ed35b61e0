"""Graph mode on several ranks: each step is a static graph over global tensors.

The batches of all ranks in one round are one batch, whose rows lie on the ranks that loaded them;
parameters and buffers are on all ranks whole. OneFlow's compiler puts the exchange of gradients
into the graph. Before each step the ranks tell each other what they have come with, for a graph
that one rank runs alone, or compiles alone, would wait for the others for ever.
"""

from __future__ import annotations

import contextlib
import hashlib
from functools import partial
from typing import Any, Callable, Dict, Hashable, Iterator, List, Optional, Sequence, Tuple

import attrs
import oneflow as flow
from oneflow import nn

from ofengine._oneflow import graphs
from ofengine._oneflow.global_tensors import Ranks, Twins, answering_as_local, let_go, local
from ofengine.data.structure import KIND, Structure, flatten
from ofengine.errors import RankError
from ofengine.launch.heartbeat import exchange
from ofengine.modes.batch_norms import BatchNorms, BatchNormsOfAll
from ofengine.modes.compiled import Compilations, Compiled
from ofengine.modes.compiling import refuse_what_graphs_ignore
from ofengine.modes.graph import USED_UP, GraphMode
from ofengine.modes.own_graphs import has_own_graph, loss_of
from ofengine.modes.shared_state import StateOfRanks
from ofengine.modes.spread import Round, Spread
from ofengine.modes.step_graphs import EvalGraph, GradientGraph, StepGraph, TrainGraph
from ofengine.ranks.meetings import Meetings, same_everywhere
from ofengine.ranks.messages import pack, unpack
from ofengine.ranks.shares import ABSENT
from ofengine.ranks.statistics import refuse_averages
from ofengine.ranks.synced_norms import norms_of
from ofengine.run.mode import HookCalls
from ofengine.run.state import Run
from ofengine.task import TaskModule

_LEFT: List[nn.Graph] = []
"""Graphs of ranks that have failed: to delete one is to wait for the others."""

LineUp = Callable[[Sequence[int]], Any]


class GlobalGraphMode(GraphMode):
    """Runs the steps of one task as static graphs of all ranks."""

    def __init__(self, run: Run, task: TaskModule, calls: HookCalls, meetings: Meetings) -> None:
        super().__init__(run, task, calls)
        self._meetings = meetings
        self._ranks = Ranks(run.settings.device, meetings.size)
        self._twins = Twins(self._ranks)
        self._state: StateOfRanks = StateOfRanks(run, task, self.rebuild, self._ranks, self._twins)
        self._gradients: Dict[int, Any] = {}
        """What a window has added up, by the number of the parameter; global tensors."""
        self._graphs: List[nn.Graph] = []
        """All that were compiled, which are deleted together."""
        self._digests: Dict[Hashable, int] = {}
        self._scales: Dict[Tuple[int, int], Any] = {}
        self._syncs_norms = run.settings.sync_batchnorm
        self._spread: Optional[Spread] = None
        """How the batch lies that a step is compiled for."""

    # ------------------------------------------------------------------ training

    def start(self) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""
        super().start()
        refuse_averages(self.task)
        if self._syncs_norms and norms_of(self.task) and has_own_graph(self.task):
            raise RankError(
                f"sync_batchnorm=True does not reach into {type(self.task).__name__}.build_graph(),"
                " whose batch norms see the rows of their rank alone: leave out one of the two."
            )

    def train_step(self, batch: Any, batch_idx: int, window: int, closes: bool) -> Dict[str, Any]:
        """See :class:`~ofengine.run.mode.Mode`."""
        if self._barrier.hit:
            self._look_again()
        run, train = self._run, self._run.train
        check = 0 if train is None else train.check_of(run.progress.batch_idx)
        share = (window if train is None else train.in_round), window
        line_up = partial(self._meetings.line_up, train=True, check=check)
        structure, tensors, spread = self._gather(batch, self._steps, line_up)
        accumulates = self._accumulates or share[0] != window or bool(self._gradients)
        key = (accumulates, structure, spread.round.is_cut, *map(KIND, tensors))
        compiled = self._steps.get(key)
        if compiled is not None and run.progress.global_step >= compiled.rates_until:
            self.rebuild(USED_UP)
            compiled = None
        if compiled is None:
            self._spread = spread
            with self._over_global_tensors("training_step"):
                compiled, updates = self._trace_step(structure, tensors, accumulates)
            self._watch(compiled, updates)
            self._keep_step(key, compiled)
        graph = compiled.graph
        inputs = tensors
        if accumulates:
            inputs = [*inputs, self._scale(*share)]
        self._tells = spread.round.teller == self._meetings.rank
        if isinstance(graph, StepGraph):
            outputs = graphs.run_compiled(graph, [*inputs, *compiled.draws.draw()])
            result = self._take(graph, outputs, spread.round, share[0])
        else:
            result = {"loss": local(self._ranks.whole(loss_of(graph, graph(*inputs))))}
        if accumulates and closes:
            self._apply(window, self._gradients)
        self._state.steps += closes
        compiled.batch_norms.exchange(self._meetings, spread.round.is_cut)
        return result

    def _take(
        self, graph: StepGraph, outputs: List[Any], round_: Round, batches: int
    ) -> Dict[str, Any]:
        """What a step of so many batches gave on this rank; gradients are added up."""
        stop = 1
        if isinstance(graph, GradientGraph):
            stop += len(graph.having)
            total = self._gradients
            if graph.weighs:
                self._run.weighing.add(local(outputs[stop]), batches)
            for index, gradient in zip(graph.having, outputs[1:stop]):
                total[index] = total[index] + gradient if index in total else gradient
            stop += graph.weighs
        rest = self._take_outputs(graph, _own(graph, outputs, round_)[stop:])
        return {**(rest or {}), "loss": local(outputs[0])}

    def _apply(self, window: int, total: Dict[int, Any]) -> None:
        if self._run.weighing.batches:
            self._run.weighing.place(self._ranks.whole)
        self._gradients = {}
        super()._apply(window, total)

    def _window_scale(self, window: int) -> Any:
        return self._scale(1, window)

    def _scale(self, batches: int, window: int) -> Any:
        """The weight of a round of so many batches in a window, as a global tensor."""
        key = (batches, window)
        if key not in self._scales:
            scale = flow.tensor(batches / window, dtype=flow.float32, device=self._ranks.device)
            self._scales[key] = self._ranks.whole(scale)
        return self._scales[key]

    # ------------------------------------------------------------------ the batch of all

    def _gather(
        self, batch: Any, kept: Compilations, line_up: LineUp
    ) -> Tuple[Structure, List[Any], Spread]:
        """The batch of all ranks in this round, as global tensors.

        Raises :class:`RankError` where the ranks cannot go on together with what they have.
        """
        tensors: List[Any] = []
        structure = flatten(None if batch is ABSENT else batch, tensors)
        rows = 0 if batch is ABSENT else _rows_of(tensors)
        kind = self._digest(structure, tensors) if rows else 0
        told = line_up([rows, kind, sum(map(_stands, kept.active.values()))])
        counts, kinds, standing = told.T.tolist()
        if not same_everywhere(standing):
            raise RankError(
                "something that the compiled step has read is changed on some ranks alone, which "
                "cannot compile it without the others: what a hook changes of the task must not "
                "depend on the rank."
            )
        round_ = Round(tuple(counts), self._meetings.rank)
        spread = Spread(self._ranks, round_)
        if not same_everywhere([kind for count, kind in zip(counts, kinds) if count] or [0]):
            raise RankError(
                "the ranks have batches of other shapes, types or constants in this round, and "
                "graph mode takes them as one: make them alike in all but their first dimension, "
                'or use mode="eager".'
            )
        if round_.total and not round_.is_cut:
            structure, tensors = self._put_together(batch, structure)
        place = self._ranks.rows if round_.is_cut else self._ranks.whole
        return structure, [place(each.contiguous()) for each in tensors], spread

    def _put_together(self, batch: Any, structure: Structure) -> Tuple[Structure, List[Any]]:
        """The rows of all ranks on each of them."""
        told = self._meetings.talk([] if batch is ABSENT else [pack(batch)])
        parts: List[List[Any]] = []
        for message in told:
            for each in message:
                parts.append([])
                found = flatten(unpack(each, self._ranks.device), parts[-1])
                structure = found if batch is ABSENT else structure
        return structure, [flow.cat(list(each)) for each in zip(*parts)]

    def _digest(self, structure: Structure, tensors: Sequence[Any]) -> int:
        """A number below 2**24 that tells what batches may be taken as one, the same everywhere."""
        kind = (structure, *[(tuple(each.shape[1:]), each.dtype) for each in tensors])
        if kind not in self._digests:
            digest = hashlib.blake2b(repr(kind).encode(), digest_size=3).digest()
            self._digests[kind] = int.from_bytes(digest, "big")
        return self._digests[kind]

    # ------------------------------------------------------------------ evaluation

    def eval_step(self, step: str, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """See :class:`~ofengine.run.mode.Mode`."""
        return self._evaluate(step, batch, dataloader_idx)[0]

    def evaluated(self, step: str, dataloader_idx: int) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""
        while self._evaluate(step, ABSENT, dataloader_idx)[1]:
            pass

    def _evaluate(self, step: str, batch: Any, dataloader_idx: int) -> Tuple[Any, bool]:
        """What the step gives on this rank, and whether any rank had a batch."""
        if self._barrier.hit:
            self._look_again()
        line_up = partial(self._meetings.line_up, train=False)
        structure, tensors, spread = self._gather(batch, self._evals, line_up)
        if not spread.round.total:
            return None, False
        key = (step, dataloader_idx, structure, spread.round.is_cut, *map(KIND, tensors))
        compiled = self._evals.get(key)
        if compiled is None:
            with self._over_global_tensors(step):
                refuse_what_graphs_ignore(self.task)
                graph = EvalGraph(self.task, step, structure, (dataloader_idx,))
                graph.spread = spread
                compiled = Compiled(graph)
                self._compile(compiled, [tensors], step, updates=False)
            self._watch(compiled, updates=False)
            self._tell_change(self._evals.add(key, compiled))
        self._tells = spread.round.teller == self._meetings.rank
        outputs = graphs.run_compiled(compiled.graph, [*tensors, *compiled.draws.draw()])
        own = _own(compiled.graph, outputs, spread.round)
        return self._take_outputs(compiled.graph, own), True

    # ------------------------------------------------------------------ compiling

    @contextlib.contextmanager
    def _over_global_tensors(self, what: str) -> Iterator[None]:
        """In the block, which compiles, the task and the optimizer have global tensors."""
        kept = {id(e.graph) for each in (self._steps, self._applies, self._evals) for e in each}
        old = [each for each in self._graphs if id(each) not in kept]
        said = self._meetings.talk(f"compiles {what} ({len(kept)} graphs)")
        if not same_everywhere(said):
            raise RankError(
                f"the ranks of this run do different things: {', '.join(said)}. What a hook "
                "changes of the task must not depend on the rank."
            )
        self._delete(old)
        run, optimizers = self._run, []
        for tensor in (*self.task.parameters(), *self.task.buffers()):
            self._twins.add(tensor)
        self._barrier.take()  # that gave them other memory
        parameters: List[Any] = []
        if run.optimization is not None:
            optimizers.append(run.optimization.optimizer)
            parameters = run.parameters
            run.parameters = [self._twins.of(each) for each in parameters]
        try:
            with self._twins.in_place(self.task, optimizers), answering_as_local(self._ranks):
                yield
        finally:
            if run.optimization is not None:
                run.parameters = parameters

    def _trace_apply(self, having: Tuple[int, ...], gradients: Sequence[Any]) -> Compiled:
        with self._over_global_tensors("the optimizer step"):
            return super()._trace_apply(having, gradients)

    def _gradient_graph(self, structure: Structure) -> GradientGraph:
        if has_own_graph(self.task):
            raise RankError(
                f"this run was saved when some of the {self._meetings.size} batches of a step were "
                f"done, and {type(self.task).__name__}.build_graph() takes them as one: go on from "
                "a checkpoint between two steps."
            )
        graph = super()._gradient_graph(structure)
        graph.spread = self._spread
        return graph

    def default_train_graph(self) -> nn.Graph:
        """See :class:`~ofengine.run.mode.Mode`."""
        graph = TrainGraph(self._run, self._structure)
        graph.spread = self._spread
        return graph

    def _batch_norms(self) -> BatchNorms:
        return BatchNormsOfAll(self._ranks) if self._syncs_norms else BatchNorms(apart=True)

    def _check(self, inputs: Any, what: str) -> None:
        """Nothing: they were made here."""

    def _compile(self, compiled: Compiled, inputs: Sequence[Any], what: str, updates: bool) -> None:
        # Kept even where it fails: collected as garbage, it would wait for the other ranks.
        self._graphs.append(compiled.graph)
        super()._compile(compiled, inputs, what, updates)

    def _watch(self, compiled: Compiled, updates: bool) -> None:
        graph = compiled.graph
        if isinstance(graph, StepGraph):
            local_of = self._twins.local_of
            graph.written = [attrs.evolve(w, tensor=local_of(w.tensor)) for w in graph.written]
        super()._watch(compiled, updates)

    def _let_go_of(self, replaced: Sequence[str], name: str) -> None:
        named = {**dict(self.task.named_parameters()), **dict(self.task.named_buffers())}
        for each in replaced:
            self._twins.forget(named[each])
        kept = self.gradients()
        self.load_gradients({n: g for n, g in kept.items() if n not in replaced})
        super()._let_go_of(replaced, name)

    # ------------------------------------------------------------------ the end, and checkpoints

    def gradients(self) -> Dict[str, Any]:
        """See :class:`~ofengine.run.mode.Mode`."""
        names = {id(p): name for name, p in self.task.named_parameters()}
        named = ((names.get(id(self._run.parameters[i])), g) for i, g in self._gradients.items())
        return {name: local(each) for name, each in named if name is not None}

    def load_gradients(self, gradients: Dict[str, Any]) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""
        names = {id(p): name for name, p in self.task.named_parameters()}
        trained = enumerate(names.get(id(p), "") for p in self._run.parameters)
        whole = {name: self._ranks.whole(each) for name, each in gradients.items()}
        self._gradients = {i: whole[name] for i, name in trained if name in whole}

    def close(self) -> None:
        """See :class:`~ofengine.run.mode.Mode`."""
        super().close()
        if self._meetings.over:
            _LEFT.extend(self._graphs)
            return
        if self._graphs:
            self._meetings.talk("ends")  # rank 0 may be saving, and ask for the metrics of all
            self._delete(list(self._graphs))

    def _delete(self, old: Sequence[nn.Graph]) -> None:
        """Let go of these graphs, as all ranks do now."""
        for graph in old:
            with exchange:
                let_go(graph)
            self._graphs.remove(graph)


def _stands(compiled: Compiled) -> bool:
    """True where what the trace has read is so now."""
    watch = compiled.watch
    return not (compiled.looks and watch.may_differ() and watch.changed() is not None)


def _own(graph: StepGraph, outputs: Sequence[Any], round_: Round) -> List[Any]:
    """This rank's part of what a graph has put out."""
    own = [local(each) for each in outputs]
    if graph.spread is not None and not round_.is_cut and round_.rows[round_.rank]:
        for number in graph.spread.cut:
            own[number] = own[number][round_.own]
    return own


def _rows_of(tensors: Sequence[Any]) -> int:
    """How many rows all tensors of a batch have."""
    rows = {int(each.shape[0]) if each.ndim else 0 for each in tensors}
    if len(rows) != 1 or rows == {0}:
        shapes = ", ".join(str(tuple(each.shape)) for each in tensors) or "no tensor"
        raise RankError(
            "graph mode on several ranks puts the batches of all together along their first "
            f"dimension, which must be the samples of each tensor, and a batch has {shapes}: make "
            'a constant a buffer of the task, or use mode="eager".'
        )
    return rows.pop()
