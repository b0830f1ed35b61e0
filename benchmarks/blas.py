"""What the kernels that ofengine lets OneFlow's OpenBLAS take do on this machine.

Processes take turns: one with ``OFENGINE_BLAS=as-is``, which leaves OneFlow's own choice, one with
the kernels that ofengine takes, named to OpenBLAS and left as they are (they slow whatever comes
after a product), and one as it is with ofengine::

    python benchmarks/blas.py
"""

from __future__ import annotations

import json
import os
import statistics
import time
from functools import partial
from typing import Any, Callable, Dict, List, Tuple

from _measure import Report, alternate, child, parser, show, tell

PRODUCTS: Dict[str, Tuple[int, int, int]] = {
    "1024 x 1024 x 1024": (1024, 1024, 1024),
    "64 x 256 x 256, an MLP's": (64, 256, 256),
    "64 x 1024 x 576, a 3x3 convolution's": (64, 1024, 576),
    "197 x 192 x 192, a ViT-tiny's": (197, 192, 192),
}
STEPS: Dict[str, Tuple[str, int, int, str]] = {
    "ResNet-18, batch 8 of 3x32x32": ("resnet18", 8, 32, "SGD"),
    "ViT-tiny, batch 1 of 3x224x224": ("vit_tiny", 1, 224, "SGD"),
    "MLP, batch 32 of 3x32x32": ("mlp", 32, 32, "SGD"),
    "MLP with Adam": ("mlp", 32, 32, "Adam"),
}


def _vit_tiny() -> Any:
    from flowvision.models import vit_tiny_patch16_224

    return vit_tiny_patch16_224(num_classes=10)


def _medians(call: Callable[[], Any], blocks: int, seconds: float) -> List[float]:
    """Microseconds a call, by the clock and of all the process's threads: medians of the blocks.

    Each block has as many calls as take about so many seconds. A busy machine disturbs the second
    number far less.
    """
    from ofengine._oneflow.session import synchronize

    def block(calls: int) -> Tuple[float, float]:
        synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            call()
        synchronize()
        return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls

    block(1)
    calls = max(1, int(seconds / block(1)[0]))
    measured = [block(calls) for _ in range(blocks)]
    return [statistics.median(each) * 1e6 for each in zip(*measured)]


def kernels_child(blocks: int) -> Dict[str, Any]:
    """Microseconds of each product and step in this process, and whose kernels it had."""
    from ofengine._oneflow.blas import kernels
    from ofengine._oneflow.launch_race import mend_launch_race

    mend_launch_race()  # or a process with small graphs may die of OneFlow's race
    import _cases
    import oneflow as flow
    from oneflow import nn

    found: Dict[str, Any] = {"core": kernels().core}
    for name, (m, n, k) in PRODUCTS.items():
        product = partial(flow.matmul, flow.randn(m, k), flow.randn(k, n))
        found[name] = _medians(product, blocks, 0.1)
    for name, (network, images, size, optimizer) in STEPS.items():
        for mode in ("eager", "graph"):
            flow.manual_seed(0)
            model = _vit_tiny() if network == "vit_tiny" else getattr(_cases, network)()
            batch = flow.randn(images, 3, size, size), flow.randint(0, 10, (images,))
            adam = flow.optim.Adam(model.parameters(), lr=1e-9) if optimizer == "Adam" else None
            step = _cases.hand_step(mode, model, nn.CrossEntropyLoss(), batch, adam)
            found[f"{name}, {mode}"] = _medians(step, blocks, 0.3)
    return found


def main() -> None:
    """Run the processes and report."""
    options = parser(__doc__).parse_args()
    if options.child:
        print(json.dumps(kernels_child(int(options.child))))
        return
    os.environ.pop("OPENBLAS_CORETYPE", None)  # ofengine would leave what it names
    rounds, blocks = (1, 1) if options.quick else (5, 3)
    runs = {
        kind: partial(child, [__file__, "--child", str(blocks)], variables, timeout=1800)
        for kind, variables in (
            ("as it is", {"OFENGINE_BLAS": "as-is"}),
            ("newer alone", {"OFENGINE_BLAS": "as-is", "OPENBLAS_CORETYPE": "Haswell"}),
            ("with ofengine", {"OFENGINE_BLAS": ""}),
        )
    }
    seen = alternate(runs, rounds, tell)
    before, alone, after = seen["as it is"], seen["newer alone"], seen["with ofengine"]
    report = Report("blas", "BLAS kernels")
    report.raw = seen
    report.note(
        f"""OneFlow's own OpenBLAS took the kernels for {before[0]["core"]} on this processor, and
        computes with those for {after[0]["core"]} once ofengine was imported; "alone": with these
        left as OpenBLAS has them, so that they slow whatever comes after a product. {rounds}
        process(es) of each kind, in turns; in each the median of {blocks} blocks. Loops by hand,
        SGD with momentum where nothing else is said. Median and quartiles; ratios round by round,
        of the time by the clock and of what all threads of the process have computed, which a
        busy machine disturbs less."""
    )
    rows: List[List[str]] = []
    for name in [key for key in before[0] if key != "core"]:
        digits = 3 if name in PRODUCTS else 1
        cells = [
            show([each[name][0] / 1000 for each in found], digits)
            for found in (before, alone, after)
        ]
        for clock in (0, 1):
            cells.append(show([b[name][clock] / a[name][clock] for a, b in zip(before, after)], 2))
        rows.append([name, *cells])
    old, new = before[0]["core"], after[0]["core"]
    header = ["what", f"{old}, ms", f"{new} alone, ms", f"{new}, ms", "ratio"]
    report.table([*header, "of the processor's time"], rows)
    report.save(options.json)


if __name__ == "__main__":
    main()
