"""What a compiled step may read of a run: what stays the same."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Iterator

from ofengine.run.view import RunView
from ofengine.tracing import forbid_in_trace

_CONSTANTS = """
    settings mode eval_mode device seed max_epochs max_steps min_epochs min_steps fast_dev_run
    accumulate_grad_batches gradient_clip_val gradient_clip_algorithm log_every_n_steps
    check_val_every_n_epoch num_sanity_val_steps default_root_dir restart_on_crash world_size
    global_rank local_rank node_rank num_nodes is_global_zero has_validation num_training_batches
    total_steps estimated_stepping_batches run_id resumed_from task log_dir metrics print
"""
CONSTANTS = frozenset(_CONSTANTS.split())
"""What a compiled step may read: it stays the same as long as the step is compiled, or tells."""


@contextlib.contextmanager
def constants_only() -> Iterator[None]:
    """In the block, which traces a step in this thread, let nothing be read of a view that changes.

    Raises :class:`GraphModeError` at such a read.
    """
    thread = threading.get_ident()

    def read(view: Any, name: str) -> Any:
        changes = name not in CONSTANTS and name[0] != "_"
        # Of a name that there is not, __getattr__ tells.
        if changes and hasattr(type(view), name) and threading.get_ident() == thread:
            forbid_in_trace(f"trainer.{name}")
        return object.__getattribute__(view, name)

    view_class: Any = RunView
    view_class.__getattribute__ = read
    try:
        yield
    finally:
        del view_class.__getattribute__
