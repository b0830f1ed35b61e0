"""Configurations drawn from a seed, and the task and data that they describe."""

from __future__ import annotations

import random
from typing import Any, Callable, Dict, Iterator, List, Tuple

import attrs
import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.utils.data import DataLoader, Dataset, RandomSampler

from ofengine import TaskModule

Groups = List[Dict[str, Any]]

OPTIMIZERS: Dict[str, Callable[[Groups], Any]] = {
    "sgd": lambda g: flow.optim.SGD(g, lr=0.05),
    "momentum": lambda g: flow.optim.SGD(g, lr=0.05, momentum=0.9, weight_decay=0.01),
    "dampened": lambda g: flow.optim.SGD(g, lr=0.05, momentum=0.9, dampening=0.5),
    "nesterov": lambda g: flow.optim.SGD(g, lr=0.05, momentum=0.9, nesterov=True),
    "maximize": lambda g: flow.optim.SGD(g, lr=0.01, maximize=True),
    "adam": lambda g: flow.optim.Adam(g, lr=0.01),
    "adam, decay": lambda g: flow.optim.Adam(g, lr=0.01, weight_decay=0.1),
    "adam, amsgrad": lambda g: flow.optim.Adam(g, lr=0.01, amsgrad=True),
    "adam, uncorrected": lambda g: flow.optim.Adam(g, lr=0.01, do_bias_correction=False),
    "adamw": lambda g: flow.optim.AdamW(g, lr=0.01, weight_decay=0.1),
    "adamw, amsgrad": lambda g: flow.optim.AdamW(g, lr=0.01, weight_decay=0.1, amsgrad=True),
    "lamb": lambda g: flow.optim.LAMB(g, lr=0.01, weight_decay=0.1),
    "lamb, penalty": lambda g: flow.optim.LAMB(g, 0.01, weight_decay=0.1, adam_w_mode=False),
    "rmsprop": lambda g: flow.optim.RMSprop(g, lr=0.01, alpha=0.9, weight_decay=0.1),
    "rmsprop, centered": lambda g: flow.optim.RMSprop(g, lr=0.01, alpha=0.9, centered=True),
    "adagrad": lambda g: flow.optim.Adagrad(g, lr=0.05, lr_decay=0.1, weight_decay=0.1),
    "adadelta": lambda g: flow.optim.Adadelta(g, lr=1.0, weight_decay=0.1),
}
SCHEDULES: Dict[str, Callable[[Any], Any]] = {
    "none": lambda o: None,
    "step": lambda o: flow.optim.lr_scheduler.StepLR(o, 3, gamma=0.5),
    "cosine": lambda o: flow.optim.lr_scheduler.CosineAnnealingLR(o, 6, eta_min=0.001),
    "exponential": lambda o: flow.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "lambda": lambda o: flow.optim.lr_scheduler.LambdaLR(o, lambda step: 1.0 / (1.0 + step)),
    "linear": lambda o: flow.optim.lr_scheduler.LinearLR(o, 0.25, 1.0, total_iters=4),
    "polynomial": lambda o: flow.optim.lr_scheduler.PolynomialLR(o, 8, power=2.0),
}
BLOCKS = ("linear", "bn", "dropout", "shared", "relu", "tanh", "residual", "layernorm", "gelu")
VERBS = ("validate", "test", "predict", "fit")
HOOKS = (
    "none", "none", "none", "number", "entry", "dropout.p", "weight_decay", "freeze", "unfreeze",
    "set_lr", "bn.eval",
)  # fmt: skip


@attrs.frozen
class Configuration:
    """All that is drawn."""

    seed: int
    stem: str
    blocks: Tuple[str, ...]
    loss: str
    returned: str
    batch: str
    sizes: Tuple[int, ...]
    loader: str
    workers: int
    optimizer: str
    groups: str
    scale: float
    decay_scale: float
    every: int
    schedule: str
    interval: str
    accumulate: int
    clip: str
    hook: str
    hook_at: int
    save_at: int
    saves: str
    """The mode of the run that is saved."""
    resumes: str
    graph: str
    """Whether ``build_graph`` is the task's own."""
    validation: str
    validates_every: int
    """After so many batches of an epoch, 0 for its end."""
    evaluates: str
    """In which mode."""
    stops_early: bool
    verbs: Tuple[str, ...]
    """What follows the run, on the same Trainer and task."""

    def __str__(self) -> str:
        """The parts that a reader wants to know."""
        return ", ".join(f"{k}={v}" for k, v in attrs.asdict(self).items() if k != "seed")

    @property
    def monitor(self) -> str:
        """The metric that is monitored."""
        return "monitored/dataloader_idx_0" if self.validation == "two" else "monitored"

    @property
    def total(self) -> int:
        """The batches of a run of two epochs."""
        return 2 * len(self.sizes)


_OTHERWISE_IN_OWN = ("dropout", "shared", "residual", "layernorm")


def draw(seed: int) -> Configuration:
    """The configuration of a seed; the same for the same seed, whatever ran before."""
    r = random.Random(seed)
    stem = r.choice(["linear", "linear", "conv", "embedding", "attention"])
    blocks = tuple(r.choice(BLOCKS) for _ in range(r.randint(0, 4)))
    loader = r.choice(["list", "list", "shuffle", "sampler", "iterable", "unknown length"])
    count = r.randint(3, 5)
    sizes = (4,) * (count - 1) + (r.choice([4, 4, 3, 2]),)
    hook = r.choice(HOOKS)
    if hook == "dropout.p":
        blocks = (*blocks, "dropout")
    if hook == "bn.eval":
        blocks = (*blocks, "bn")
    shaped = loader in ("shuffle", "sampler")
    later = random.Random(f"{seed}, later")  # what was drawn before is drawn as ever
    validation = later.choice(["none", "none", "list", "shuffle", "own generator", "two"])
    own_graph = later.random() < 0.15
    if own_graph:
        # Such a graph clips by itself and draws numbers of its own. And OneFlow's compiler adds up
        # three tensors and more, and a layer norm's gradient to another, otherwise than eager mode.
        blocks = tuple(k for k in blocks if k not in _OTHERWISE_IN_OWN)
        stem = "embedding" if stem == "attention" else stem
        hook = "none" if hook in ("dropout.p", "number", "entry") else hook
    schedule = r.choice([*SCHEDULES, "none"])
    if later.random() < 0.15 and not (own_graph and validation == "none"):  # it logs nothing
        schedule = "plateau"
    drawn = Configuration(
        seed=seed,
        stem=stem,
        blocks=blocks,
        loss=r.choice(["mse", "l1", "three terms", "entropy", "weights twice"]),
        returned=r.choice(["loss", "dict", "logged"]),
        batch="pair" if shaped else r.choice(["pair", "dict", "constant", "view", "list"]),
        sizes=sizes,
        loader=loader,
        workers=1 if shaped and r.random() < 0.15 else 0,
        optimizer=r.choice(list(OPTIMIZERS)),
        groups=r.choice(["one", "two", "scaled", "own clip"]),
        scale=r.choice([0.5, 0.3, 2.0]),
        decay_scale=r.choice([1.0, 0.5, 0.9]),
        every=r.randint(1, 3),
        schedule=schedule,
        interval=r.choice(["step", "step", "epoch"]),
        accumulate=r.choice([1, 1, 2, 3]),
        clip=r.choice(["none", "none", "norm", "value"]),
        hook=hook,
        hook_at=r.randint(1, 2 * count - 1),
        save_at=r.randint(1, 2 * count - 1),
        saves=r.choice(["eager", "graph"]),
        resumes=r.choice(["eager", "graph"]),
        graph="own" if own_graph else "default",
        validation=validation,
        validates_every=later.choice([0, 0, 1, 2]),
        evaluates=later.choice(["eager", "graph"]),
        stops_early=validation != "none" and later.random() < 0.25,
        verbs=tuple(later.choice(VERBS) for _ in range(later.choice([0, 0, 1, 2, 3]))),
    )
    if own_graph:
        drawn = attrs.evolve(
            drawn, loss="mse", returned="loss", accumulate=1, clip="none",
            batch="pair" if drawn.batch in ("dict", "constant") else drawn.batch,
            groups="one" if drawn.groups == "own clip" else drawn.groups,
        )  # fmt: skip
    if schedule == "plateau":
        drawn = attrs.evolve(drawn, interval="epoch")
    return drawn


class Attention(nn.Module):
    """One head over the tokens of a sample, with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.width = width

    def forward(self, x: Any) -> Any:
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        weights = flow.softmax(flow.matmul(q, k.transpose(1, 2)) * self.width**-0.5, dim=-1)
        return x + self.out(flow.matmul(weights, v))


class OwnGraph(nn.Graph):
    """What a user writes where ``build_graph`` is overridden."""

    def __init__(self, task: Subject) -> None:
        super().__init__()
        self.task = task
        self.add_optimizer(task.optimizer)

    def build(self, x: Any, y: Any) -> Any:
        """Forward, loss and backward."""
        loss = ((self.task(x) - y) ** 2).mean()
        loss.backward()
        return loss


class Subject(TaskModule):
    """The network of a configuration; its weights are those of ``start``."""

    def __init__(self, drawn: Configuration, start: int = 0) -> None:
        super().__init__()
        self.drawn = drawn
        if drawn.stem == "linear":
            self.stem: nn.Module = nn.Linear(6, 8)
        elif drawn.stem == "conv":
            self.stem = nn.Conv2d(2, 4, 3, stride=2)
            self.flat = nn.Linear(16, 8)
        else:
            self.stem = nn.Embedding(11, 8)
            if drawn.stem == "attention":
                self.attention = Attention(8)
        self.shared = nn.Linear(8, 8)
        kinds: Dict[str, Callable[[], nn.Module]] = {
            "linear": lambda: nn.Linear(8, 8),
            "bn": lambda: nn.BatchNorm1d(8),
            "dropout": lambda: nn.Dropout(0.25),
            "relu": nn.ReLU,
            "tanh": nn.Tanh,
            "gelu": nn.GELU,
            "layernorm": lambda: nn.LayerNorm(8),
            "residual": lambda: nn.Linear(8, 8),
            "shared": nn.Identity,
        }
        self.blocks = nn.ModuleList([kinds[kind]() for kind in drawn.blocks])
        self.head = nn.Linear(8, 3)
        self.factor = 1.0
        self.weights = {"loss": 1.0}
        numbers = np.random.RandomState(1000 + drawn.seed + start)
        with flow.no_grad():
            for parameter in self.parameters():
                values = numbers.standard_normal(tuple(parameter.shape)) * 0.3
                parameter.copy_(flow.tensor(values.astype("float32")))

    def forward(self, x: Any) -> Any:
        """Three numbers for each sample."""
        x = self.stem(x)
        if self.drawn.stem == "conv":
            x = self.flat(x.relu().reshape(x.shape[0], -1))
        elif self.drawn.stem in ("embedding", "attention"):
            x = (self.attention(x) if self.drawn.stem == "attention" else x).mean(dim=1)
        for kind, block in zip(self.drawn.blocks, self.blocks):
            if kind == "shared":
                x = self.shared(self.shared(x).tanh())
            else:
                x = x + block(x) if kind == "residual" else block(x)
        return self.head(x + self.shared(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss in one of the forms that a step may return."""
        if isinstance(batch, dict):
            x, y, constant = batch["x"], batch["y"], batch.get("weight", 1.0)
        else:
            x, y, constant = batch[0], batch[1], batch[2] if len(batch) > 2 else 1.0
        out = self(x)
        loss = self._loss(out, y) * constant * self.factor * self.weights["loss"]
        if self.drawn.returned == "logged":
            self.log("twice", loss * 2, on_step=True, on_epoch=True)
        if self.drawn.schedule == "plateau" and self.drawn.validation == "none":
            self.log("monitored", loss, on_step=False, on_epoch=True)
        return {"loss": loss, "mean": out.mean()} if self.drawn.returned == "dict" else loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Logs how far off it is."""
        x, y = batch
        self.log("monitored", ((self(x) - y) ** 2).mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs how far off it is."""
        self.log("error", (self(batch[0]) - batch[1]).abs().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Three numbers for each sample."""
        return self(batch[0])

    def _loss(self, out: Any, y: Any) -> Any:
        kind = self.drawn.loss
        if kind == "entropy":
            return nn.functional.cross_entropy(out, y.argmax(dim=1))
        if kind == "l1":
            return (out - y).abs().mean()
        loss = ((out - y) ** 2).mean()
        if kind == "three terms":
            loss = loss + out.abs().mean() * 0.1 + (out * y).mean() * 0.01
        if kind == "weights twice":
            weight = self.head.weight
            loss = loss + (weight**2).sum() * 0.01 + weight.abs().mean() * 0.1
        return loss

    def param_groups(self) -> Groups:
        """One group, or the head apart from the rest."""
        groups = self.drawn.groups
        head = list(self.head.parameters())
        inside = {id(p) for p in head}
        rest = [p for p in self.parameters() if id(p) not in inside]
        if groups == "one":
            return [{"name": "all", "params": [*rest, *head]}]
        first: Dict[str, Any] = {"name": "rest", "params": rest}
        second: Dict[str, Any] = {"name": "head", "params": head, "lr": 0.02}
        if groups == "scaled":
            first.update(lr_scale=self.drawn.scale, lr_decay_scale=self.drawn.decay_scale)
        if groups == "own clip":
            second.update(clip_grad_max_norm=0.5, clip_grad_norm_type=2.0)
        return [first, second]

    def configure_optimizers(self) -> Any:
        """The optimizer, with the schedule where there is one."""
        optimizer = OPTIMIZERS[self.drawn.optimizer](self.param_groups())
        if self.drawn.schedule == "plateau":
            plateau = flow.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            how = {"scheduler": plateau, "monitor": self.drawn.monitor, "interval": "epoch"}
            return {"optimizer": optimizer, "lr_scheduler": how}
        schedule = SCHEDULES[self.drawn.schedule](optimizer)
        if schedule is None:
            return optimizer
        how = {"scheduler": schedule, "interval": self.drawn.interval}
        return {"optimizer": optimizer, "lr_scheduler": how}


class SubjectWithGraph(Subject):
    """The same with a graph of its own."""

    def build_graph(self) -> nn.Graph:
        """One more for each shape of batch."""
        return OwnGraph(self)


def subject_of(drawn: Configuration, start: int = 0) -> Subject:
    """The task of a configuration."""
    return (SubjectWithGraph if drawn.graph == "own" else Subject)(drawn, start)


def change(task: Subject, groups: Any, seen: int) -> None:
    """What a hook does before the batch with ``seen`` others before it, but for ``set_lr``."""
    drawn, late = task.drawn, seen >= task.drawn.hook_at
    if drawn.hook == "number":
        task.factor = 0.5 if late else 1.0
    elif drawn.hook == "entry":
        task.weights["loss"] = 2.0 if late else 1.0
    elif drawn.hook == "dropout.p":
        for block in task.blocks:
            if isinstance(block, nn.Dropout):
                block.p = 0.5 if late else 0.25
    elif drawn.hook == "weight_decay" and "weight_decay" in groups[0]:
        if groups[0]["weight_decay"] != (0.2 if late else 0.1):
            groups[0]["weight_decay"] = 0.2 if late else 0.1
    elif drawn.hook in ("freeze", "unfreeze"):
        wanted = late == (drawn.hook == "unfreeze")
        for parameter in task.stem.parameters():
            if parameter.requires_grad != wanted:
                parameter.requires_grad = wanted
    elif drawn.hook == "bn.eval":
        for block in task.blocks:
            if isinstance(block, nn.BatchNorm1d) and block.training == late:
                block.train(not late)


# ---------------------------------------------------------------------- data


def samples(drawn: Configuration) -> Tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of an epoch."""
    numbers, count = np.random.RandomState(drawn.seed), sum(drawn.sizes)
    shape = {"linear": (6,), "conv": (2, 6, 6)}.get(drawn.stem)
    if shape is None:
        inputs = numbers.randint(0, 11, (count, 5)).astype("int64")
    else:
        inputs = numbers.standard_normal((count, *shape)).astype("float32")
    return inputs, numbers.standard_normal((count, 3)).astype("float32")


class Rows(Dataset):
    """The samples one by one."""

    def __init__(self, drawn: Configuration) -> None:
        self.inputs, self.targets = samples(drawn)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index], self.targets[index]


class Again:
    """Batches that each pass makes anew, of a known length or not."""

    def __init__(self, batches: List[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches


class Counted(Again):
    """The same with a length."""

    def __len__(self) -> int:
        return len(self.batches)


def batches_of(drawn: Configuration) -> List[Any]:
    """The batches of an epoch, in the form that was drawn."""
    inputs, targets = samples(drawn)
    whole, batches, at = flow.tensor(inputs), [], 0
    for number, size in enumerate(drawn.sizes):
        x, y = flow.tensor(inputs[at : at + size]), flow.tensor(targets[at : at + size])
        if drawn.batch == "view":
            columns = flow.tensor(np.repeat(targets[at : at + size], 2, axis=1))
            batches.append((whole[at : at + size], columns[:, ::2]))
        elif drawn.batch == "dict":
            batches.append({"x": x, "y": y, "weight": 0.5})
        elif drawn.batch == "constant":
            batches.append((x, y, 1.0 if number % 2 else 0.5))
        else:
            batches.append([x, y] if drawn.batch == "list" else (x, y))
        at += size
    return batches


def validation_of(drawn: Configuration) -> Any:
    """What ``fit`` is given to validate on."""
    inputs, targets = samples(drawn)
    whole = list(zip(np.split(inputs[:6], 3), np.split(targets[:6], 3)))
    batches = [(flow.tensor(x), flow.tensor(y)) for x, y in whole]
    if drawn.validation == "shuffle":
        return DataLoader(Rows(drawn), batch_size=2, shuffle=True)
    if drawn.validation == "own generator":
        generator = flow.Generator("cpu")
        generator.manual_seed(drawn.seed)
        return DataLoader(Rows(drawn), batch_size=3, shuffle=True, generator=generator)
    return {
        "none": None,
        "list": batches,
        "two": [DataLoader(Rows(drawn), batch_size=size) for size in (2, 4)],
    }[drawn.validation]


def data_of(drawn: Configuration) -> Any:
    """What ``fit`` is given."""
    if drawn.loader in ("shuffle", "sampler"):
        rows = Rows(drawn)
        sampler = RandomSampler(rows) if drawn.loader == "sampler" else None
        shuffle = None if sampler else True
        return DataLoader(
            rows, batch_size=4, shuffle=bool(shuffle), sampler=sampler, num_workers=drawn.workers
        )
    kinds = {"iterable": Counted, "unknown length": Again}
    return kinds.get(drawn.loader, list)(batches_of(drawn))
