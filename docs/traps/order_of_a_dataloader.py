"""`DataLoader(shuffle=True)` does not follow `manual_seed`, unless it has an own generator."""

import oneflow as flow
from oneflow.utils.data import DataLoader, TensorDataset

dataset = TensorDataset(flow.arange(100))


def order(**options):
    flow.manual_seed(0)
    loader = DataLoader(dataset, batch_size=100, shuffle=True, **options)
    return next(iter(loader))[0].numpy().tolist()


def generator():
    own = flow.Generator()
    own.manual_seed(0)
    return own


print("the same twice:", order() == order())
assert order() != order()
assert order(generator=generator()) == order(generator=generator())
