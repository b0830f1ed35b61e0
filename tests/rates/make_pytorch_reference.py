"""Makes ``pytorch_reference.json``: what PyTorch's own loop, rates and optimizers give.

Needs PyTorch and nothing else, in an environment of its own (made with torch 2.13.0, CPU)::

    python make_pytorch_reference.py > pytorch_reference.json

Weights and data are small fractions with a power of two below, so that every library starts
from the same bits. ``test_against_pytorch.py`` has the same formula and trains the same runs.
"""

from __future__ import annotations

import json
import math
from typing import Any, Dict, List, Tuple

import torch

SIZES = [4, 6, 6, 3]
BATCHES = 5


def pattern(shape: Tuple[int, ...], seed: int) -> torch.Tensor:
    """Numbers in [-0.75, 0.75] that look irregular, each a multiple of 1/8."""
    count = math.prod(shape)
    values = [((7 * i * i + 5 * i * seed + 3 * seed * seed) % 13 - 6) / 8 for i in range(count)]
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


def make_net() -> torch.nn.Sequential:
    """Three linear layers with tanh between."""
    layers: List[torch.nn.Module] = []
    for before, after in zip(SIZES, SIZES[1:]):
        layers += [torch.nn.Linear(before, after), torch.nn.Tanh()]
    net = torch.nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for seed, parameter in enumerate(net.parameters(), 1):
            parameter.copy_(pattern(tuple(parameter.shape), seed))
    return net


def train(
    name: str,
    lrs: List[float],
    optimizer_class: Any,
    options: Dict[str, Any],
    schedule: Any,
    epochs: int,
    accumulate: int = 1,
    clip: float = 0.0,
) -> Dict[str, Any]:
    """A loop as PyTorch's users write it; one group for each linear layer."""
    net = make_net()
    linear = [layer for layer in net if isinstance(layer, torch.nn.Linear)]
    groups = [{"params": list(layer.parameters()), "lr": lr} for layer, lr in zip(linear, lrs)]
    optimizer = optimizer_class(groups, **options)
    scheduler = schedule(optimizer)
    batches = [(pattern((4, 4), 20 + i), pattern((4, 3), 40 + i)) for i in range(BATCHES)]
    rates: List[List[float]] = []
    losses: List[float] = []
    for _ in range(epochs):
        for start in range(0, BATCHES, accumulate):
            window = batches[start : start + accumulate]
            for inputs, targets in window:
                loss = ((net(inputs) - targets) ** 2).mean()
                losses.append(float(f"{loss.item():.9g}"))
                (loss / len(window)).backward()
            if clip:
                norm = torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
                assert norm > clip, f"{name} does not clip"
            rates.append([float(f"{group['lr']:.9g}") for group in optimizer.param_groups])
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    weights = {
        key: [float(f"{value:.9g}") for value in tensor.flatten().tolist()]
        for key, tensor in net.state_dict().items()
    }
    return {"rates": rates, "losses": losses, "weights": weights}


def warm_up(step: int) -> float:
    """Linear over 4 steps, then down as one over the root; above 1 for a while."""
    return (step + 1) / 4 if step < 4 else 1.5 / math.sqrt(step - 2)


def main() -> None:
    """Train all runs and print what they gave."""
    schedulers = torch.optim.lr_scheduler

    def cosine(optimizer: Any) -> Any:
        return schedulers.CosineAnnealingLR(optimizer, 12)

    def function(optimizer: Any) -> Any:
        return schedulers.LambdaLR(optimizer, warm_up)

    def stairs(optimizer: Any) -> Any:
        return schedulers.StepLR(optimizer, 2, 0.5)

    sgd, adam, adamw = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
    layerwise, alike = [0.1 * 0.25, 0.2 * 0.5, 0.1], [0.02, 0.02, 0.02]
    momentum = {"momentum": 0.9, "weight_decay": 0.01}
    nesterov = {"momentum": 0.9, "nesterov": True}
    runs = {
        "momentum, cosine, three groups": train("1", layerwise, sgd, momentum, cosine, 2),
        "nesterov, accumulation": train("2", layerwise, sgd, nesterov, cosine, 3, 2),
        "momentum, clipping": train("3", layerwise, sgd, momentum, stairs, 2, 1, 0.1),
        "AdamW, warm-up function": train(
            "4", [0.02 * 0.5, 0.02, 0.02], adamw, {"weight_decay": 0.1}, function, 2
        ),
        "Adam, accumulation and clipping": train("5", alike, adam, {}, function, 3, 2, 0.1),
        "AdamW, amsgrad, cosine": train("6", layerwise, adamw, {"amsgrad": True}, cosine, 2),
    }
    print(json.dumps({"torch": torch.__version__.split("+")[0], "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
