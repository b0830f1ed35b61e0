"""Every use of OneFlow's private API, and nothing else. Seen working with OneFlow 0.9.0.

If a new version of OneFlow breaks ofengine, the place to mend is here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import glob
import io
import math
import mmap
import os
import platform
import struct
import sys
import threading
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import oneflow as flow
from oneflow import nn
from oneflow.framework import session_context
from oneflow.nn.optimizer.lr_scheduler import LRScheduler
from oneflow.optim import Optimizer

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
    return proxy if isinstance(proxy, nn.Module) else proxy.to(nn.Module)


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
        for name, _ in self._origin.named_parameters(prefix="", recurse=recurse):
            lazy = functools.reduce(getattr, name.split("."), self._proxy)
            yield (f"{prefix}.{name}" if prefix else name), lazy

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        return (lazy for _, lazy in self.named_parameters(recurse=recurse))


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


# ---------------------------------------------------------------------- graphs


def mute(graph: nn.Graph) -> None:
    """Keep ``graph`` from printing ``[ERROR]`` lines to stdout; its exceptions say the same."""
    graph._debug_min_s_level = 3


def allow_backward(graph: nn.Graph) -> None:
    """Let ``build`` call ``backward`` although the graph has no optimizer."""
    graph.config._train(True)


@contextlib.contextmanager
def no_garbage_collected() -> Iterator[None]:
    """Keep the garbage collector from deleting an old graph while a new one is compiled.

    ``nn.Graph.__del__`` resets a table of variables that all graphs share. Where that happens
    in the middle of a compilation, it fails: "must be a variable created in nn.Graph".
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def compile_quietly() -> Iterator[None]:
    """Hold back the copy of an exception's text that ``nn.Graph`` prints to stderr."""
    held, stderr = io.StringIO(), sys.stderr
    sys.stderr = held
    text = ""
    try:
        yield
    except BaseException as error:
        text = f"{error}\n" if str(error) else ""
        raise
    finally:
        sys.stderr = stderr
        stderr.write(held.getvalue().replace(text, "") if text else held.getvalue())


def trace_and_compile(graph: nn.Graph, inputs: Sequence[Any]) -> None:
    """What the first call of ``graph`` does, without running it."""
    graph._compile(*inputs)


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
    graph.build_graph(*inputs)


def is_compiled(graph: nn.Graph) -> bool:
    """True once ``graph`` has been compiled."""
    return bool(graph._is_compiled)


def optimizer_states(graph: nn.Graph) -> Dict[str, Any]:
    """The optimizer's tensors in ``graph`` by name, the step counter among them; live memory."""
    return {
        name: value
        for name, value in graph.state_dict().items()
        if isinstance(value, flow.Tensor) and "-FreeEagerTensor-" not in name
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


# ---------------------------------------------------------------------- the launch race


# OneFlow 0.9.0 notes that a graph's run is in flight (EnqueueNNGraph) after it has started the
# run. Where the run ends before that, DequeueNNGraph pops from an empty std::queue, and the
# process dies of it sooner or later. Below, the run is counted before it is started instead:
# the three functions of the queue are replaced in memory by the same logic over a counter.
# Each of them is called from one place, through the PLT, and there is one queue a process.
_QUEUE = "_ZN7oneflow2vm19LazyJobStreamPolicy"
_WAIT = _QUEUE + "42WaitUntilQueueEmptyIfFrontNNGraphNotEqualsERKSt10shared_ptrINS_9NNGraphIfEE"
_ENQUEUE = _QUEUE + "14EnqueueNNGraphERKSt10shared_ptrINS_9NNGraphIfEE"
_DEQUEUE = _QUEUE + "14DequeueNNGraphEv"
_EXPECTED = {  # how each begins in the wheels that were looked at
    _WAIT: bytes.fromhex("41574156415541544989f555534889fb4883c7584883ec18"),
    _ENQUEUE: bytes.fromhex("41574156415541544c8d6f5855534989f44889fb4883ec18"),
    _DEQUEUE: bytes.fromhex("4154554c8d6758488b2d"),
}
_PAGE = mmap.PAGESIZE
_DEQUEUE_AT = 0x80
_launch_race: Optional[str] = None
_launch_race_lock = threading.Lock()


def mend_launch_race() -> str:
    """Mend the race of OneFlow 0.9.0 at the start of a graph's run; "mended", or why not.

    Done once a process, and only to the very binary it was written for: Linux on x86-64,
    OneFlow 0.9.0, functions that begin as expected. ``OFENGINE_MEND_LAUNCH=0`` leaves it out.
    """
    global _launch_race
    with _launch_race_lock:
        if _launch_race is None:
            if os.environ.get("OFENGINE_MEND_LAUNCH") == "0":
                _launch_race = "left out by OFENGINE_MEND_LAUNCH=0"
            elif flow.__version__ != "0.9.0" or (sys.platform, platform.machine()) != (
                "linux",
                "x86_64",
            ):
                _launch_race = "not for this version of OneFlow or this machine"
            else:
                try:
                    _launch_race = _mend_launch_race()
                except (OSError, AttributeError) as error:
                    _launch_race = f"not possible here: {error}"
        return _launch_race


def _mend_launch_race() -> str:
    folder = os.path.join(os.path.dirname(flow.__file__), os.pardir, "oneflow.libs")
    paths = glob.glob(os.path.join(glob.escape(folder), "liboneflow-*.so"))
    if len(paths) != 1:
        return "not possible here: liboneflow was not found"
    library = ctypes.CDLL(paths[0])
    at: Dict[str, int] = {}
    for name, expected in _EXPECTED.items():
        at[name] = ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
        if ctypes.string_at(at[name], len(expected)) != expected:
            return "not possible here: liboneflow is not the one this was written for"
    wait, dequeue = _load_queue_code()
    synchronize()  # no run may be in flight
    _overwrite({at[_WAIT]: _jump_to(wait), at[_DEQUEUE]: _jump_to(dequeue), at[_ENQUEUE]: _RETURN})
    return "mended"


def _load_queue_code() -> Tuple[int, int]:
    """Put :func:`_queue_code` into memory; the addresses of its two functions."""
    # Not shared: a forked process must not count the runs of this one.
    page = mmap.mmap(-1, 2 * _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Kept for ever: OneFlow's threads may run it when Python has already cleared its modules.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(page))
    base = ctypes.addressof(ctypes.c_char.from_buffer(page))
    wait, dequeue = _queue_code()
    page[: len(wait)] = wait
    page[_DEQUEUE_AT : _DEQUEUE_AT + len(dequeue)] = dequeue
    _protect(base, _PAGE, mmap.PROT_READ | mmap.PROT_EXEC)
    return base, base + _DEQUEUE_AT


def _queue_code() -> Tuple[bytes, bytes]:
    """x86-64 code of "wait for the other graph's runs, then count mine" and "count it off".

    The second page holds the graph launched last (8 bytes), the runs in flight (4 bytes) and
    whether somebody sleeps until there are none (4 bytes). The code uses only registers that a
    function may use freely, r8 and r9 because a system call leaves them alone. Each sleeper
    says so before the kernel compares the count, each run is counted off before it looks for
    sleepers, both by locked instructions: a sleeper is woken, or the kernel lets it not sleep.
    """

    def data_from(offset: int) -> bytes:
        return struct.pack("<i", _PAGE - offset)

    sleep = b"\xb8\x01\x00\x00\x00\x41\x87\x41\x0c"  # mov eax, 1; xchg [r9+12], eax
    sleep += b"\x49\x8d\x79\x08"  # lea rdi, [r9+8]
    sleep += b"\xbe\x80\x00\x00\x00"  # mov esi, 128         FUTEX_WAIT_PRIVATE
    sleep += b"\x45\x31\xd2"  # xor r10d, r10d        no timeout
    sleep += b"\xb8\xca\x00\x00\x00\x0f\x05"  # mov eax, 202; syscall while [rdi] is edx
    wait = b"\x4c\x8b\x06"  # mov r8, [rsi]          the graph to launch
    wait += b"\x4c\x8d\x0d" + data_from(len(wait) + 7)  # lea r9, [data]
    loop = len(wait)
    wait += b"\x4d\x3b\x01"  # cmp r8, [r9]
    wait += b"\x74" + struct.pack("b", 10 + len(sleep))  # je ready     launched last as well
    wait += b"\x41\x8b\x51\x08\x85\xd2"  # mov edx, [r9+8]; test edx, edx
    wait += b"\x7e" + struct.pack("b", 2 + len(sleep))  # jle ready    none in flight
    wait += sleep
    wait += b"\xeb" + struct.pack("b", loop - len(wait) - 2)  # jmp loop
    wait += b"\x4d\x89\x01"  # ready: mov [r9], r8
    wait += b"\x41\xc7\x41\x0c\x00\x00\x00\x00"  # mov dword [r9+12], 0
    wait += b"\xf0\x41\xff\x41\x08\xc3"  # lock inc dword [r9+8]; ret
    wake = b"\x49\x8d\x79\x08"  # lea rdi, [r9+8]
    wake += b"\xbe\x81\x00\x00\x00\xba\x01\x00\x00\x00"  # mov esi, 129 (WAKE_PRIVATE); mov edx, 1
    wake += b"\xb8\xca\x00\x00\x00\x0f\x05"  # mov eax, 202; syscall
    dequeue = b"\x4c\x8d\x0d" + data_from(_DEQUEUE_AT + 7)  # lea r9, [data]
    dequeue += b"\xf0\x41\xff\x49\x08"  # lock dec dword [r9+8]
    dequeue += b"\x75" + struct.pack("b", 7 + len(wake))  # jnz done    others are in flight
    dequeue += b"\x41\x83\x79\x0c\x00"  # cmp dword [r9+12], 0
    dequeue += b"\x74" + struct.pack("b", len(wake))  # je done     nobody sleeps
    dequeue += wake + _RETURN
    return wait, dequeue


_RETURN = b"\xc3"  # ret


def _jump_to(address: int) -> bytes:
    return b"\x48\xb8" + struct.pack("<Q", address) + b"\xff\xe0"  # mov rax, address; jmp rax


def _overwrite(codes: Dict[int, bytes]) -> None:
    """Write each code to its address: all of them, or none where an OSError is raised."""
    start = min(codes) // _PAGE * _PAGE
    length = max(address + len(code) for address, code in codes.items()) - start
    _protect(start, length, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    for address, code in codes.items():
        ctypes.memmove(address, code, len(code))
    with contextlib.suppress(OSError):  # it works all the same
        _protect(start, length, mmap.PROT_READ | mmap.PROT_EXEC)


def _protect(start: int, length: int, protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(length), protection):
        raise OSError(ctypes.get_errno(), "memory protection cannot be changed")
