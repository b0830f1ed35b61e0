"""Every use of OneFlow's private API, and nothing else. Seen working with OneFlow 0.9.0.

If a new version of OneFlow breaks ofengine, the place to mend is here.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import oneflow as flow
from oneflow import nn
from oneflow.framework import session_context
from oneflow.nn.graph.proxy import Proxy, ProxyParameterList
from oneflow.nn.optimizer.lr_scheduler import LRScheduler
from oneflow.optim import Optimizer

from ofengine._consecutive_adds import put_back
from ofengine._startup import without_known_noise

# ---------------------------------------------------------------------- devices and waiting


def synchronize() -> None:
    """Wait until everything that was handed to OneFlow has been computed."""
    flow._oneflow_internal.eager.Sync()


_session_started = False


def start_session() -> None:
    """Start what the first graph would start, without the line it prints where there is no GPU."""
    global _session_started
    if _session_started:
        return
    _session_started = True
    with without_known_noise():
        session_context.GetDefaultSession().TryInit()


# ---------------------------------------------------------------------- tracing


def module_of(proxy: Any) -> Any:
    """The module that stands behind ``proxy`` inside ``build`` (a module stands for itself)."""
    return proxy.to(nn.Module) if isinstance(proxy, Proxy) else proxy


def has_forward_hooks(module: nn.Module) -> bool:
    """True where somebody registered a hook of ``module``'s forward, which no graph calls."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def build_parameters(proxy: Any) -> List[Any]:
    """Put every parameter of a module's proxy into the graph being traced; the lazy tensors."""
    return [
        getattr(module, name) for module in proxy.modules() for name in list(module._parameters)
    ]


class _LazyStates(Dict[str, Any]):
    """A module's own parameters or buffers, by name; in a trace their lazy tensors."""

    def __init__(self, states: Dict[str, Any], proxy: Any) -> None:
        super().__init__(states)
        self._proxy = proxy
        self.written: List[str] = []

    def __getitem__(self, name: str) -> Any:
        return None if super().__getitem__(name) is None else getattr(self._proxy, name)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self.written.append(name)


class _Traced:
    """What a module does differently while it stands in for its proxy."""

    _origin: nn.Module
    _proxy: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)  # type: ignore[attr-defined]

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[Any]:
        return _lazy_parameters(self._proxy, prefix, recurse)

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        return (lazy for _, lazy in _lazy_parameters(self._proxy, "", recurse))


class _Answers:
    """What the proxy of a module answers as the module does; its parameters are lazy tensors."""

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[Any]:
        return _lazy_parameters(self, prefix, recurse)

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        return (lazy for _, lazy in _lazy_parameters(self, "", recurse))


def _lazy_parameters(proxy: Any, prefix: str, recurse: bool) -> Iterator[Any]:
    """``named_parameters`` of the module behind ``proxy``, each with its lazy tensor."""
    for name, _ in module_of(proxy).named_parameters(prefix="", recurse=recurse):
        lazy = functools.reduce(getattr, name.split("."), proxy)
        yield (f"{prefix}.{name}" if prefix else name), lazy


class _AnswersOfList(_Answers):
    """The same of a ``ParameterList``, which can be gone through."""

    def __iter__(self) -> Iterator[Any]:
        values: Any = self
        return (values[index] for index in range(len(values)))


def _always(value: Any) -> property:
    return property(lambda self: value)


_CLASS: Any = object.__dict__["__class__"]  # sets an object's class, whatever it calls its own


@contextlib.contextmanager
def answering_as_modules(proxy: Any) -> Iterator[None]:
    """While tracing, let the proxies within ``proxy`` pass for instances of their modules' classes.

    ``isinstance(self.layer, nn.Linear)`` would be False in a graph, without a word.
    """
    proxies = [(each, type(each)) for each in proxy.modules()]
    for each, kind in proxies:
        cls = type(module_of(each))
        answers = _AnswersOfList if isinstance(each, ProxyParameterList) else _Answers
        _CLASS.__set__(each, type(cls.__name__, (answers, kind), {"__class__": _always(cls)}))
    try:
        yield
    finally:
        for each, kind in proxies:
            _CLASS.__set__(each, kind)


def instance_in_trace(proxy: Any) -> Any:
    """An instance of the class of the module behind ``proxy``, to be used while tracing.

    Its submodules are proxies and its parameters and buffers lazy tensors, as the proxy's
    are; but being an instance, its methods may call ``super()``, which a proxy's cannot.
    """
    origin = module_of(proxy)
    cls = type(origin)
    traced: Any = object.__new__(type(cls.__name__, (_Traced, cls), {"__module__": cls.__module__}))
    traced.__dict__.update(origin.__dict__)
    traced.__dict__.update(
        _origin=origin,
        _proxy=proxy,
        _parameters=_LazyStates(origin._parameters, proxy),
        _buffers=_LazyStates(origin._buffers, proxy),
        _modules=dict(proxy._modules),
    )
    return traced


def assignments_in_trace(traced: Any) -> List[str]:
    """The attributes that were set on what :func:`instance_in_trace` returned."""
    origin = traced.__dict__["_origin"].__dict__
    apart = ("_origin", "_proxy", "_parameters", "_buffers", "_modules")
    changed = [
        name
        for name, value in traced.__dict__.items()
        if name not in apart and (name not in origin or origin[name] is not value)
    ]
    return [*changed, *traced._parameters.written, *traced._buffers.written]


def identity(tensor: Any) -> Any:
    """The same values as another tensor of the graph being traced."""
    return flow._C.identity(tensor)


# ---------------------------------------------------------------------- eager steps


_TensorTuple = flow._oneflow_internal.TensorTuple
_backward = flow._oneflow_internal.autograd.backward
_OF_ONE = _TensorTuple()
"""No gradient to begin with: that of a single element is 1."""


def backward_of(loss: Any) -> None:
    """``loss.backward()`` of an eager loss of one element, without the calls on the way to it."""
    _backward(_TensorTuple([loss]), _OF_ONE, False, False)


# ---------------------------------------------------------------------- graphs


def mute(graph: nn.Graph) -> None:
    """Keep ``graph`` from printing ``[ERROR]`` lines to stdout; its exceptions say the same."""
    graph._debug_min_s_level = 3


def allow_backward(graph: nn.Graph) -> None:
    """Let ``build`` call ``backward`` although the graph has no optimizer."""
    graph.config._train(True)


def functions_by_name(name: str) -> List[Tuple[Any, Any]]:
    """Where OneFlow's function ``name`` is looked up when it is called: (holder, function)."""
    holders = (flow, flow._C, nn.functional)
    return [(each, getattr(each, name)) for each in holders if hasattr(each, name)]


_RANDOM = ("bernoulli", "exponential", "normal", "randperm", "uniform", "uniform_int")


def random_operations(graph: nn.Graph) -> List[str]:
    """The kinds of operations in ``graph``, which is compiled, that draw random numbers."""
    kinds = {each.user_conf.op_type_name for each in graph._full_job_proto.net.op}
    return sorted(kind for kind in kinds if kind in _RANDOM or kind.endswith("dropout"))


MOST_GRAPHS = 1_300
"""How many graphs a process may compile, of any kind and alive or not.

Each takes three of 4,096 stream numbers, which are never given back (``task_stream_index_manager``
and ``kStreamIndexBits`` in OneFlow 0.9.0): at about the 1,365th graph the process is aborted.
"""


class _Graphs:
    """How many graphs this process has compiled, at most: OneFlow numbers its traces."""

    newest = -1
    traced_only = 0


def graphs_compiled() -> int:
    """The graphs that this process has compiled, those of others up to our last one included."""
    return _Graphs.newest + 1 - _Graphs.traced_only


def trace_and_compile(graph: nn.Graph, inputs: Sequence[Any], as_eager: bool = True) -> None:
    """What the first call of ``graph`` does, without running it.

    ``as_eager``: add tensors up in the order in which they are added in eager mode.
    """
    try:
        graph.build_graph(*inputs)
        if as_eager and put_back(graph._forward_job_proto, graph._full_job_proto):
            graph._full_graph_proto = graph._full_job_proto
        graph.finish_complie_and_init_runtime()
    except BaseException:
        _Graphs.traced_only += 1
        raise
    _Graphs.newest = graph._job_id


def run_compiled(graph: nn.Graph, tensors: List[Any]) -> List[Any]:
    """What a call of ``graph``, compiled before, does; all tensors in and out in one list.

    ``nn.Graph.__call__`` walks over its nested arguments and outputs four times, in a hundred
    Python calls and more: on small networks that is most of a step. ``tensors`` are the arguments'
    tensors, depth first; so are the outputs.
    """
    for tensor in tensors:
        if not tensor.is_contiguous():
            tensor.contiguous_()
    state = vars(graph)  # nn.Graph looks at every attribute that is set
    turn = state["_cur_index_of_ouputs_buffer"]
    buffers = state["_outputs_tensor_tuple_buffer"]
    buffer = buffers[turn]
    internal = flow._oneflow_internal
    internal.nn.graph.RunLazyNNGraph(
        internal.TensorTuple(tensors), buffer, state["_state_tensor_tuple"], graph._c_nn_graph
    )
    state["_cur_index_of_ouputs_buffer"] = (turn + 1) % len(buffers)
    outputs = [flow._C.to(tensor, copy=True) for tensor in buffer]
    internal.nn.graph.SoftSyncNNGraphBuffers(buffer, graph._c_nn_graph)
    return outputs


def trace_only(graph: nn.Graph, inputs: Sequence[Any]) -> None:
    """Run ``build`` on lazy tensors, compile nothing. ``graph`` cannot be used afterwards."""
    _Graphs.traced_only += 1
    graph.build_graph(*inputs)


def is_compiled(graph: nn.Graph) -> bool:
    """True once ``graph`` has been compiled."""
    return bool(graph._is_compiled)


def optimizer_states(graph: nn.Graph) -> Dict[str, Any]:
    """The optimizer's tensors in ``graph`` by name, the step counter among them; live memory."""
    return {
        name: value
        for name, value in graph.state_dict().items()
        if isinstance(value, flow.Tensor) and "FreeEagerTensor-" not in name
    }


def share_optimizer_states(graph: nn.Graph, states: Dict[str, Any]) -> None:
    """Let ``graph``, not compiled yet, use ``states`` as its own memory."""
    graph.load_state_dict(states, strict=False)


def parameter_names(graph: nn.Graph) -> Dict[str, Any]:
    """The parameters of all modules of ``graph`` by the names they have in it."""
    return {
        f"{block}.{name}": parameter
        for block, proxy in graph._blocks.items()
        for name, parameter in module_of(proxy).named_parameters()
    }


def optimizers_of(graph: nn.Graph) -> List[Optimizer]:
    """The optimizers that ``graph`` was given by ``add_optimizer``."""
    return [entry["optim"] for entry in graph._opts]


def schedulers_of(graph: nn.Graph) -> List[LRScheduler]:
    """The schedulers that ``graph`` was given by ``add_optimizer``."""
    return [entry["lr_sch"] for entry in graph._opts if "lr_sch" in entry]


def micro_batches(graph: nn.Graph) -> int:
    """Into how many parts ``graph`` is to cut each batch (``set_gradient_accumulation_steps``)."""
    return int(graph.config.proto.num_gradient_accumulation_steps or 1)


def updates_many_tensors_at_once(graph: nn.Graph) -> bool:
    """True where ``graph`` is to use the multi-tensor update, which knows no ``lr_scale``."""
    switch = os.environ.get("ONEFLOW_ENABLE_MULTI_TENSOR_MODEL_UPDATE", "0").lower()
    asked = bool(getattr(graph.config.proto, "enable_multi_tensor_update", False))
    return asked or switch not in ("", "0", "false", "off")


# ---------------------------------------------------------------------- rates


_LONG_TABLE = 1024
RateTable = Tuple[List[int], List[float]]
"""The steps at which a rate takes a new value (the first is 0 or less), and the values."""


class _TableLR(LRScheduler):
    """Lowers one table of absolute rates for each parameter group, in the groups' order."""

    def __init__(
        self, graph: nn.Graph, tables: Sequence[RateTable], scales: Sequence[float]
    ) -> None:
        # LRScheduler.__init__ would write into the groups.
        (entry,) = graph._opts
        self.optimizer = entry["optim"]
        self.verbose = False
        self._train_conf = graph.config.proto.train_conf
        self._rates = iter(list(enumerate(zip(tables, scales))))

    def _generate_conf_for_graph(self, lr_conf: Any) -> None:
        group, ((starts, values), scale) = next(self._rates)
        self._train_conf.optimizer_conf[group].lr_scale = scale
        _fill(lr_conf, starts, values)


def _fill(lr_conf: Any, starts: Sequence[int], values: Sequence[float]) -> None:
    """Write a table into ``lr_conf``; a long one as a table of tables.

    The kernel searches a table from its start at every step.
    """
    if len(values) <= _LONG_TABLE:
        conf = lr_conf.piecewise_constant_conf
        conf.SetInParent()
        conf.values.extend(values)
        # The kernel takes the first value whose boundary is not below the step.
        conf.boundaries.extend(start - 1 for start in starts[1:])
        return
    conf = lr_conf.sequential_scheduler_conf
    size = math.isqrt(len(values))
    for first in range(0, len(values), size):
        part = slice(first, first + size)
        _fill(conf.schedulers.add(), starts[part], values[part])
        if first:
            conf.milestones.append(starts[first])
            conf.interval_rescaling.append(False)


def lower_rates(graph: nn.Graph, tables: Sequence[RateTable], scales: Sequence[float]) -> None:
    """Make ``graph``, not compiled yet, take its groups' rates from ``tables`` times ``scales``."""
    graph._opts[0]["lr_sch"] = _TableLR(graph, tables, scales)


# ---------------------------------------------------------------------- dataloaders


def open_with_indices(loader: Any, wrap: Callable[[Any], Any]) -> Iterator[Any]:
    """``iter(loader)`` of a DataLoader whose (batch) sampler is ``wrap`` of its own, this once."""
    name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
    own = vars(loader)[name]
    wrapped = wrap(own)
    vars(loader)[name] = wrapped  # the class forbids it by setattr
    kept = loader._iterator  # persistent workers' iterator has noted its sampler
    if kept is not None:
        kept._index_sampler = wrapped
    try:
        return iter(loader)
    finally:
        vars(loader)[name] = own
        if loader._iterator is not None:
            loader._iterator._index_sampler = own


# ---------------------------------------------------------------------- optimizers


def default_options(optimizer: Optimizer) -> Dict[str, Any]:
    """The options that every group of ``optimizer`` has."""
    return optimizer._default_options


def restore_exit_code() -> None:
    """Undo OneFlow's excepthook, with which an exception after a compilation ends in SIGABRT."""
    if getattr(sys.excepthook, "__module__", "") == "oneflow":
        owner = getattr(sys.excepthook, "__closure__", None)
        original = getattr(owner[0].cell_contents, "_orig_excepthook", None) if owner else None
        sys.excepthook = original or sys.__excepthook__


TRAIN_STEP = "System-Train-TrainStep"
"""The name of the step counter among the states of a graph."""

_SUFFIX_OF_KEY = {
    "momentum_buf": "momentum",
    "exp_avg": "m",
    "exp_avg_sq": "v",
    "max_exp_avg_sq": "max_v",
    "square_avg": "mean_square",
    "grad_avg": "mean_gradient",
    "sum": "sum",
    "square_avgs": "square_avgs",
    "acc_deltas": "acc_deltas",
}
"""How a graph calls what an optimizer keeps of a parameter in eager mode."""
_KEY_OF_SUFFIX = {suffix: key for key, suffix in _SUFFIX_OF_KEY.items()}

ParameterStates = Dict[str, Dict[str, Any]]
"""What an optimizer keeps of each parameter: tensors by eager mode's names."""


def optimizer_state(optimizer: Optimizer, names: Dict[int, str]) -> Tuple[int, ParameterStates]:
    """The steps that ``optimizer`` made and what it keeps, in eager mode; live memory.

    ``names`` are the parameters' names by their ``id``.
    """
    states = {
        names[id(parameter)]: dict(kept)
        for parameter, kept in optimizer._state.items()
        if not isinstance(parameter, str) and kept and id(parameter) in names
    }
    return int(optimizer._state.get("step", 0)), states


def load_optimizer_state(
    optimizer: Optimizer, parameters: Dict[str, Any], steps: int, states: ParameterStates
) -> None:
    """The inverse of :func:`optimizer_state`; ``parameters`` by name."""
    optimizer._state["step"] = steps
    for name, kept in states.items():
        optimizer._state.setdefault(parameters[name], {}).update(kept)


def split_graph_state(key: str) -> Tuple[str, str]:
    """The parameter's name in the graph, and eager mode's name of what is kept of it."""
    parameter, _, suffix = key.rpartition("-")
    return parameter, _KEY_OF_SUFFIX.get(suffix, suffix)


def graph_state_name(parameter: str, key: str) -> str:
    """The inverse of :func:`split_graph_state`."""
    return f"{parameter}-{_SUFFIX_OF_KEY.get(key, key)}"
