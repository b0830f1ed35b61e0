"""What OneFlow's switches for threads and graphs do to a step on the CPU.

Switches that must be set before OneFlow is imported, and the number of threads, are compared
process by process in turns; those of ``nn.Graph`` within one process, block by block, over the same
first weights, so that the weights after training tell whether a switch changes any bit::

    python benchmarks/threads.py
"""

from __future__ import annotations

import json
import os
import statistics
import time
from functools import partial
from typing import Any, Callable, Dict, List, Tuple

from _measure import Report, alternate, child, parser, show, tell

NETWORKS = ("mlp", "small_cnn", "mobilenet_v2")
BATCHES = {"mlp": 32, "small_cnn": 8, "mobilenet_v2": 2}
BLOCKS = {"mlp": 40, "small_cnn": 15, "mobilenet_v2": 3}
ENVIRONMENTS: Dict[str, Tuple[Dict[str, str], int]] = {
    "as it is": ({}, 0),
    "set_num_threads(1)": ({}, 1),
    "OMP_NUM_THREADS=1": ({"OMP_NUM_THREADS": "1"}, 0),
    "OPENBLAS_NUM_THREADS=1": ({"OPENBLAS_NUM_THREADS": "1"}, 0),
    "VM_COMPUTE_ON_WORKER_THREAD=0": ({"ONEFLOW_VM_COMPUTE_ON_WORKER_THREAD": "0"}, 0),
}


SWITCHES: Dict[str, Callable[[Any], None]] = {
    "as it is": lambda config: None,
    "allow_fuse_add_to_output": lambda config: config.allow_fuse_add_to_output(True),
    "allow_fuse_cast_scale": lambda config: config.allow_fuse_cast_scale(True),
    "allow_fuse_model_update_ops": lambda config: config.allow_fuse_model_update_ops(True),
    "set_outputs_buffer_size(1)": lambda config: config.set_outputs_buffer_size(1),
    "straighten, memory": lambda config: config.enable_straighten_algorithm("MemoryFirst"),
    "straighten, speed": lambda config: config.enable_straighten_algorithm("SpeedFirst"),
    "enable_multi_tensor_update": lambda config: config.enable_multi_tensor_update(True),
    "as it is, once more": lambda config: None,
}


def _prepared(network: str, mode: str, configure: Any = lambda config: None) -> Any:
    import _cases
    import oneflow as flow
    from oneflow import nn

    from ofengine._oneflow.launch_race import mend_launch_race

    mend_launch_race()  # or a process with small graphs may die of OneFlow's race
    flow.manual_seed(0)
    model = getattr(_cases, network)()
    size = BATCHES[network]
    batch = flow.randn(size, 3, 32, 32), flow.randint(0, 10, (size,))
    step = _cases.hand_step(mode, model, nn.CrossEntropyLoss(), batch, configure=configure)
    return model, step


def _timed(step: Callable[[], Any], steps: int) -> float:
    from ofengine._oneflow.session import synchronize

    synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    return (time.perf_counter() - began) / steps * 1e6


def environment_child(threads: int) -> Dict[str, Any]:
    """Microseconds a step of each network and mode in this process; threads that live in it."""
    import oneflow as flow

    if threads:
        flow.set_num_threads(threads)
    found: Dict[str, Any] = {}
    for network in NETWORKS:
        for mode in ("eager", "graph"):
            _, step = _prepared(network, mode)
            _timed(step, 5)
            cpu, wall = time.process_time(), time.perf_counter()
            blocks = [_timed(step, BLOCKS[network]) for _ in range(8)]
            busy = (time.process_time() - cpu) / (time.perf_counter() - wall)
            found[f"{network}|{mode}"] = [statistics.median(blocks), busy]
    found["threads"] = len(os.listdir("/proc/self/task"))
    return found


def switches_child(network: str, rounds: int) -> Dict[str, Any]:
    """Microseconds a step under each switch, block by block; whether the weights are equal."""
    prepared: Dict[str, Any] = {}
    found: Dict[str, Any] = {}
    for name, configure in SWITCHES.items():
        try:
            model, step = _prepared(network, "graph", configure)
            _timed(step, 3)
            prepared[name] = (model, step)
        except Exception as error:  # a switch that this OneFlow does not have
            found[name] = [[], f"failed: {type(error).__name__}"]
    runs = {name: partial(_timed, step, BLOCKS[network]) for name, (_, step) in prepared.items()}
    seen = alternate(runs, rounds)
    plain = prepared["as it is"][0].state_dict()
    for name, (model, _) in prepared.items():
        state = model.state_dict()
        same = all(state[key].numpy().tobytes() == plain[key].numpy().tobytes() for key in plain)
        found[name] = [seen[name], "equal" if same else "differ"]
    return found


def main() -> None:
    """Run the processes and report."""
    options = parser(__doc__).parse_args()
    if options.child:
        what, argument = options.child.split("|")
        rounds = 3 if options.quick else 10
        result: Any = (
            environment_child(int(argument))
            if what == "environment"
            else switches_child(argument, rounds)
        )
        print(json.dumps(result))
        return
    rounds = 1 if options.quick else 3
    report = Report("threads", "Threads and graph switches")
    runs = {
        name: partial(child, [__file__, "--child", f"environment|{threads}"], env)
        for name, (env, threads) in ENVIRONMENTS.items()
    }
    seen = alternate(runs, rounds, tell)
    report.raw["environments"] = seen
    keys = [f"{network}|{mode}" for network in NETWORKS for mode in ("eager", "graph")]
    rows: List[List[str]] = []
    for name, found in seen.items():
        row = [f"`{name}`" if name != "as it is" else name]
        row.append(show([each["threads"] for each in found], 0))
        for key in keys:
            ratios = [b[key][0] / a[key][0] for a, b in zip(seen["as it is"], found)]
            row.append(f"{show(ratios, 2)}; {statistics.median(e[key][1] for e in found):.2f}")
        rows.append(row)
    report.note(
        f"""Loops by hand, {rounds} process(es) of each kind in turns, MLP at batch 32, small CNN at
        8, MobileNetV2 at 2. Each cell: wall time of a step as a ratio to "as it is" of the same
        round (median and quartiles), then how many cores were busy. "Threads" are those alive at
        the end. `OMP_NUM_THREADS` and `ONEFLOW_VM_COMPUTE_ON_WORKER_THREAD` are set before OneFlow
        is imported."""
    )
    report.table(["switch", "threads", *(key.replace("|", ", ") for key in keys)], rows)

    rows = []
    for network in NETWORKS:
        found = child([__file__, "--child", f"switches|{network}"] + ["--quick"] * options.quick)
        report.raw[f"switches {network}"] = found
        tell(f"switches, {network}")
        plain = found["as it is"][0]
        for name, (values, weights) in found.items():
            ratios = [b / a for a, b in zip(plain, values)]
            rows.append([network, f"`{name}`", show(ratios, 3) if ratios else "--", weights])
    report.note(
        """Switches of `nn.Graph.config`: graphs by hand in one process, blocks in turns. The ratio
        is to the graph as it is, which is compiled first, and "once more" last; the last column
        compares the weights after training, bit by bit."""
    )
    report.table(["network", "switch", "ratio", "weights"], rows)
    report.save(options.json)


if __name__ == "__main__":
    main()
