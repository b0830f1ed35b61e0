"""Tensor and pipeline parallel training on two ranks, in a graph of one's own.

    python examples/model_parallel.py --kind tensor
    python examples/model_parallel.py --kind pipeline
    python examples/model_parallel.py --devices 1        # what both must compute

``build_graph`` gets the batches of both ranks as one, split by rows, and parameters that each rank
has whole: ``to_global`` says who computes what. So checkpoints, hooks and validation are those of
any other task; the price is that no rank saves the memory of the parameters.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Dict, List, Optional, Type

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.nn import functional

from ofengine import TaskModule, Trainer, rank_zero_only

WHOLE, ROWS, COLUMNS = flow.sbp.broadcast, flow.sbp.split(0), flow.sbp.split(1)
MICRO_BATCHES = 2


class Net(TaskModule):
    """Two layers, and the graph that spreads them over the ranks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(16, 64)
        self.second = nn.Linear(64, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return functional.cross_entropy(self.second(self.first(x).relu()), y)

    def configure_optimizers(self) -> Any:
        return flow.optim.AdamW(self.parameters(), lr=0.01)

    def build_graph(self) -> nn.Graph:
        if self.trainer.world_size == 1:
            return super().build_graph()
        return GRAPHS[self.kind](self)


class TensorParallel(nn.Graph):
    """Each rank computes half of the hidden units, of all samples."""

    def __init__(self, task: Net) -> None:
        super().__init__()
        self.task = task
        self.add_optimizer(task.optimizer)

    def build(self, x: Any, y: Any) -> Any:
        ranks, first, second = x.placement, self.task.first, self.task.second
        x, y = x.to_global(ranks, WHOLE), y.to_global(ranks, WHOLE)
        weight, bias = first.weight.to_global(ranks, ROWS), first.bias.to_global(ranks, ROWS)
        hidden = functional.linear(x, weight, bias).relu()  # columns of it on each rank
        scores = functional.linear(hidden, second.weight.to_global(ranks, COLUMNS))  # summands
        loss = functional.cross_entropy(scores.to_global(ranks, WHOLE) + second.bias, y)
        loss.backward()
        return loss


class Pipeline(nn.Graph):
    """Rank 0 computes the first layer, rank 1 the second, of one part of a batch after another."""

    def __init__(self, task: Net) -> None:
        super().__init__()
        self.task = task
        self.add_optimizer(task.optimizer)
        self.config.set_gradient_accumulation_steps(MICRO_BATCHES)
        for stage, layer in enumerate((self.task.first, self.task.second)):
            layer.to(nn.graph.GraphModule).set_stage(stage)

    def build(self, x: Any, y: Any) -> Any:
        ranks, task = x.placement, self.task
        begin, end = flow.placement("cpu", [0]), flow.placement("cpu", [1])
        x, y = x.to_global(ranks, WHOLE), y.to_global(ranks, WHOLE)
        hidden = self.layer(task.first, x, begin).relu()
        scores = self.layer(task.second, hidden, end)
        loss = functional.cross_entropy(scores, y.to_global(end, WHOLE)).to_global(ranks, WHOLE)
        # OneFlow aborts where a rank that has a parameter does nothing with it.
        parameters = [task.first.weight, task.first.bias, task.second.weight, task.second.bias]
        loss = loss + 0.0 * sum(each.sum() for each in parameters)
        loss.backward()
        return loss  # of each part; the engine takes their mean

    def layer(self, layer: Any, x: Any, where: Any) -> Any:
        weight, bias = (each.to_global(where, WHOLE) for each in (layer.weight, layer.bias))
        return functional.linear(x.to_global(where, WHOLE), weight, bias)


GRAPHS: Dict[str, Type[nn.Graph]] = {"tensor": TensorParallel, "pipeline": Pipeline}


def batches(rows: int) -> List[Any]:
    """Ten batches of so many rows, whose classes a linear map tells."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((160, 16)).astype(np.float32)
    y = (x @ rng.standard_normal((16, 4))).argmax(axis=1)
    return [
        (flow.tensor(x[i : i + rows]), flow.tensor(y[i : i + rows])) for i in range(0, 160, rows)
    ]


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=sorted(GRAPHS), default="tensor")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--save", type=Path, help="where the weights go, as a file of numpy")
    options = parser.parse_args(arguments)
    trainer = Trainer(
        mode="graph",
        devices=options.devices,
        device="cpu",
        max_epochs=2,
        seed=3,
        logger=False,
        enable_checkpointing=False,
    )
    flow.manual_seed(3)
    task = Net(options.kind)
    trainer.fit(task, batches(16 // options.devices))
    rank_zero_only(print)(f"loss {trainer.callback_metrics['loss']:.5f}")
    if options.save is not None and trainer.is_global_zero:
        np.savez(options.save, **{name: each.numpy() for name, each in task.state_dict().items()})


if __name__ == "__main__":
    main()
