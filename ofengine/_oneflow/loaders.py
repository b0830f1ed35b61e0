"""What a DataLoader keeps to itself: its sampler, its workers, how it collates."""

from __future__ import annotations

import contextlib
import inspect
import signal
import threading
import time
import weakref
from typing import Any, Callable, Dict, Iterator, List, Optional

import numpy as np
import oneflow as flow
from oneflow.multiprocessing import _prctl_pr_set_pdeathsig
from oneflow.utils.data import DataLoader
from oneflow.utils.data._utils.signal_handling import _remove_worker_pids
from oneflow.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ofengine._oneflow.handover import hands_over

SHARED_GENERATOR = inspect.signature(DataLoader.__init__).parameters["generator"].default
"""The one that all DataLoaders shuffle with that are given none."""


def open_with_indices(loader: Any, wrap: Callable[[Any], Any]) -> Iterator[Any]:
    """``iter(loader)`` of a DataLoader whose (batch) sampler is ``wrap`` of its own, this once."""
    name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
    own = vars(loader)[name]
    wrapped = wrap(own)
    vars(loader)[name] = wrapped  # the class forbids it by setattr
    kept = loader._iterator  # persistent workers' iterator has noted its sampler
    if _runs and kept is not None and kept not in _opened:  # they were started with the loader
        _end({kept: loader})
        kept = None
    if kept is not None:
        kept._index_sampler = wrapped
        kept._status_reset = False  # or its first pass gives what it loaded when it was made
        draw_as_begun(loader)
    try:
        return noted(iter(loader))
    finally:
        vars(loader)[name] = own
        if loader._iterator is not None:
            loader._iterator._index_sampler = own


def draw_as_begun(loader: Any) -> None:
    """Draw what an iterator draws when it is made, perhaps from the generator of the order."""
    flow.randint(0, np.iinfo(np.int64).max, (), generator=loader.generator)


def forget_workers(loader: Any) -> None:
    """Let go of the worker processes that ``loader`` keeps alive."""
    loader._iterator = None


_opened: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()
"""The iterators with worker processes that were used in a run, and their loaders."""
_SECONDS_TO_END = 1.0
_runs = 0
_runs_lock = threading.Lock()
_init_of_class = _MultiProcessingDataLoaderIter.__init__


_runs_of_thread = threading.local()
"""For each run of a thread, the iterators with workers that it went through by itself."""


def noted(iterator: Iterator[Any]) -> Iterator[Any]:
    """``iterator``, whose worker processes are the run's to end where they do not live on."""
    runs = getattr(_runs_of_thread, "all", None)
    if runs and isinstance(iterator, _MultiProcessingDataLoaderIter):
        runs[-1].append(weakref.ref(iterator))
    return iterator


@contextlib.contextmanager
def _ending_own_workers() -> Iterator[None]:
    """End the workers of the run's passes after it, and not when the garbage collector comes.

    After an error a pass is held by the traceback. Collected together with its queues, it could
    not tell its workers any more to end, and would wait five seconds for each.
    """
    runs = vars(_runs_of_thread).setdefault("all", [])
    runs.append([])
    try:
        yield
    finally:
        for reference in runs.pop():
            iterator = reference()
            if iterator is not None and not iterator._persistent_workers:
                iterator._shutdown_workers()


@contextlib.contextmanager
def workers_noted() -> Iterator[None]:
    """While it is entered, the workers of every DataLoader are known to :func:`end_workers`.

    That of a loader which a user's own iterable goes through, too. And signals that reach all
    processes of a terminal or of a group are the run's to answer: its workers work on meanwhile.
    """
    global _runs
    with _runs_lock:
        _runs += 1
        _MultiProcessingDataLoaderIter.__init__ = _init_noted
    try:
        with _ending_own_workers():
            yield
    finally:
        with _runs_lock:
            _runs -= 1
            if not _runs:
                _MultiProcessingDataLoaderIter.__init__ = _init_of_class


def _init_noted(iterator: Any, loader: Any) -> None:
    _opened[iterator] = weakref.ref(loader)
    own, collate_fn = loader.worker_init_fn, loader.collate_fn
    loader.worker_init_fn = _BeginsWorker(own)
    loader.collate_fn = iterator._hands_over = hands_over(loader)  # held as long as workers write
    try:
        _init_of_class(iterator, loader)
    finally:
        loader.worker_init_fn, loader.collate_fn = own, collate_fn


class _BeginsWorker:
    """What a worker process does first; a class, for a started Python is sent it by pickle."""

    def __init__(self, own: Optional[Callable[[int], None]]) -> None:
        self._own = own

    def __call__(self, worker_id: int) -> None:
        # OneFlow's own handler ends the worker, of which the run would die within a step. And it
        # has the kernel send SIGINT where the run is gone, which would be ignored now.
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        _prctl_pr_set_pdeathsig(signal.SIGTERM)
        if self._own is not None:
            self._own(worker_id)


def forgive_workers() -> None:
    """Have the end of a worker, of whatever kind, be no error from now on."""
    for iterator in list(_opened):
        _forgive(iterator)


def _forgive(iterator: Any) -> None:
    if getattr(iterator, "_worker_pids_set", False):
        iterator._worker_pids_set = False
        with contextlib.suppress(ValueError):  # the iterator itself was quicker
            _remove_worker_pids(id(iterator))


def end_workers() -> None:
    """End the worker processes of all runs of this process; those that hang, after a second.

    DataLoaders that keep theirs alive start new ones when they are gone through again.
    """
    _end({iterator: loader() for iterator, loader in list(_opened.items())})


def _end(iterators: Dict[Any, Any]) -> None:
    workers: List[Any] = []
    for iterator, loader in iterators.items():
        workers += getattr(iterator, "_workers", ())
        _let_go(iterator, loader)
    for worker in workers:
        worker.terminate()
    until = time.monotonic() + _SECONDS_TO_END
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
    for worker in workers:
        worker.kill()  # nothing where it has ended
        worker.join()


def _let_go(iterator: Any, loader: Any) -> None:
    """Have ``iterator`` do nothing more about its workers, as where it has ended them itself."""
    _opened.pop(iterator, None)
    _forgive(iterator)
    iterator._shutdown = True  # or it waits five seconds for each worker that hangs
    if hasattr(iterator, "_pin_memory_thread_done_event"):
        iterator._pin_memory_thread_done_event.set()
    for queue in getattr(iterator, "_index_queues", ()):
        queue.close()
    if loader is not None and loader._iterator is iterator:
        forget_workers(loader)


def collate(samples: List[Any]) -> Any:
    """What a DataLoader makes of a list of samples by default."""
    from oneflow.utils.data._utils.collate import default_collate

    return default_collate(samples)
