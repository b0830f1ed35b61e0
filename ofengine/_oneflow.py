"""Every use of OneFlow's private API, and nothing else. Seen working with OneFlow 0.9.0.

If a new version of OneFlow breaks ofengine, the place to mend is here.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import oneflow as flow
from oneflow import nn
from oneflow.framework.graph_build_util import lazy_mode
from oneflow.nn.optimizer.lr_scheduler import LRScheduler
from oneflow.optim import Optimizer

# ---------------------------------------------------------------------- devices and waiting


def synchronize() -> None:
    """Wait until everything that was handed to OneFlow has been computed."""
    flow._oneflow_internal.eager.Sync()


# ---------------------------------------------------------------------- tracing


def is_tracing() -> bool:
    """True inside ``nn.Graph.build``."""
    return bool(lazy_mode.is_enabled())


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

    def __getitem__(self, name: str) -> Any:
        return None if super().__getitem__(name) is None else getattr(self._proxy, name)


class _Traced:
    """What a module does differently while it stands in for its proxy."""

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
    traced = object.__new__(type(cls.__name__, (_Traced, cls), {"__module__": cls.__module__}))
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
    return [
        name
        for name, value in traced.__dict__.items()
        if name not in apart and (name not in origin or origin[name] is not value)
    ]


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


def optimizers_of(graph: nn.Graph) -> List[Optimizer]:
    """The optimizers that ``graph`` was given by ``add_optimizer``."""
    return [entry["optim"] for entry in graph._opts]


def schedulers_of(graph: nn.Graph) -> List[LRScheduler]:
    """The schedulers that ``graph`` was given by ``add_optimizer``."""
    return [entry["lr_sch"] for entry in graph._opts if "lr_sch" in entry]


# ---------------------------------------------------------------------- rates


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
        conf = lr_conf.piecewise_constant_conf
        conf.SetInParent()
        conf.values.extend(values)
        # The kernel takes the first value whose boundary is not below the step.
        conf.boundaries.extend(start - 1 for start in starts[1:])


def lower_rates(graph: nn.Graph, tables: Sequence[RateTable], scales: Sequence[float]) -> None:
    """Make ``graph``, not compiled yet, take its groups' rates from ``tables`` times ``scales``."""
    graph._opts[0]["lr_sch"] = _TableLR(graph, tables, scales)


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
