"""Static graphs: tracing, compiling and running one, and what it was given."""

from __future__ import annotations

import os
from typing import Any, Dict, List, Sequence

import oneflow as flow
from oneflow import nn
from oneflow.nn.optimizer.lr_scheduler import LRScheduler
from oneflow.optim import Optimizer

from ofengine._oneflow.consecutive_adds import put_back
from ofengine._oneflow.optimizer_state import clipped_in_build, leaving_out
from ofengine._oneflow.tracing import module_of

# What each step of a graph calls: a name costs less than a look into four modules.
_TensorTuple = flow._oneflow_internal.TensorTuple
_run = flow._oneflow_internal.nn.graph.RunLazyNNGraph
_soft_sync = flow._oneflow_internal.nn.graph.SoftSyncNNGraphBuffers
_to = flow._C.to


def mute(graph: nn.Graph) -> None:
    """Keep ``graph`` from printing ``[ERROR]`` lines to stdout; its exceptions say the same."""
    graph._debug_min_s_level = 3


def allow_backward(graph: nn.Graph) -> None:
    """Let ``build`` call ``backward`` although the graph has no optimizer."""
    graph.config._train(True)


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

    ``as_eager``: add tensors up in the order in which they are added in eager mode, leave the
    clipping of groups to ``build``, and leave out parameters that are in no module of the graph.
    """
    optimizers = optimizers_of(graph) if as_eager else []
    parameters = parameter_names(graph).values() if optimizers else ()
    try:
        with clipped_in_build(optimizers), leaving_out(optimizers, parameters):
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
    tensors, depth first and contiguous; so are the outputs.
    """
    state = vars(graph)  # nn.Graph looks at every attribute that is set
    turn = state["_cur_index_of_ouputs_buffer"]
    buffers = state["_outputs_tensor_tuple_buffer"]
    buffer = buffers[turn]
    _run(_TensorTuple(tensors), buffer, state["_state_tensor_tuple"], graph._c_nn_graph)
    state["_cur_index_of_ouputs_buffer"] = (turn + 1) % len(buffers)
    outputs = [_to(tensor, copy=True) for tensor in buffer]
    _soft_sync(buffer, graph._c_nn_graph)
    return outputs


def depend_on(graph: nn.Graph, tensors: Sequence[Any]) -> None:
    """Let each run of ``graph``, which is compiled, wait for what is done to ``tensors``.

    OneFlow does so for the parameters and buffers of a graph's modules only: any other tensor that
    a trace reads is read while an eager operation may still be writing it. It takes no more of them
    than the graph has variables of its own: where there are more, what the graph does not read is
    left out.
    """
    state, own = vars(graph), graph._c_nn_graph
    if len(tensors) > len(own.additional_var_names):
        free = {*map(id, own.additional_var_tensors)}
        tensors = [each for each in tensors if id(each) in free]
    together = [*state["_state_tensor_tuple"], *tensors]
    state["_state_tensor_tuple"] = _TensorTuple(together)


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


def proxies_in(graph: nn.Graph) -> List[Any]:
    """The proxies of the modules of ``graph``."""
    return list(graph._blocks.values())


def optimizers_of(graph: nn.Graph) -> List[Optimizer]:
    """The optimizers that ``graph`` was given by ``add_optimizer``."""
    return [entry["optim"] for entry in graph._opts]


def schedulers_of(graph: nn.Graph) -> List[LRScheduler]:
    """The schedulers that ``graph`` was given by ``add_optimizer``."""
    return [entry["lr_sch"] for entry in graph._opts if "lr_sch" in entry]


def micro_batches(graph: nn.Graph) -> int:
    """Into how many parts ``graph`` is to cut each batch (``set_gradient_accumulation_steps``)."""
    return int(graph.config.proto.num_gradient_accumulation_steps or 1)


def splits_optimizer_state(graph: nn.Graph) -> bool:
    """True where each rank is to keep a part of the optimizer's state (``enable_zero``)."""
    return graph.config.proto.optimizer_placement_optimization_mode not in ("", "none")


_HALVES = {"16-mixed": flow.float16, "bf16-mixed": flow.bfloat16}


def mix_precision(graph: nn.Graph, precision: str) -> None:
    """Let ``graph`` compute what it can in the half ``precision``, "16-mixed" or "bf16-mixed"."""
    graph.config.enable_amp(True, dtype=_HALVES[precision])


def precision_of(graph: nn.Graph) -> str:
    """The same name of what ``graph`` is set to (``enable_amp``); "32-true" where that is off."""
    proto = graph.config.proto
    if not proto.enable_auto_mixed_precision:
        return "32-true"
    number_of = flow._oneflow_internal.deprecated.GetProtoDtype4OfDtype
    names = {int(number_of(dtype)): name for name, dtype in _HALVES.items()}
    return names[proto.mixed_precision_data_type]


def in_full_precision(tensor: Any) -> Any:
    """``tensor`` of a trace as one that no half precision goes beyond; what comes after is float32.

    Of a chain of products, square roots and the like behind a matrix product, the compiler makes
    all of half precision.
    """
    return flow._C.amp_black_identity(tensor)


def updates_many_tensors_at_once(graph: nn.Graph) -> bool:
    """True where ``graph`` is to use the multi-tensor update, which knows no ``lr_scale``."""
    switch = os.environ.get("ONEFLOW_ENABLE_MULTI_TENSOR_MODEL_UPDATE", "0").lower()
    asked = bool(getattr(graph.config.proto, "enable_multi_tensor_update", False))
    return asked or switch not in ("", "0", "false", "off")
