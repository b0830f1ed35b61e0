"""A generator's `get_state` does not tell how many numbers were drawn: it cannot be resumed."""

import oneflow as flow

generator = flow.Generator("cpu")
generator.manual_seed(3)
flow.rand(4, generator=generator)
before = generator.get_state()
first = flow.rand(4, generator=generator).numpy()
after = generator.get_state()
generator.set_state(before)
again = flow.rand(4, generator=generator).numpy()

print("the same state:", (before.numpy() == after.numpy()).all(), first, again)
assert (before.numpy() == after.numpy()).all()
assert (first != again).any()
