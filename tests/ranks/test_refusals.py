"""What several ranks do not do is refused in one sentence, before anything begins."""

from __future__ import annotations

from typing import Any, Dict

import numpy as np
import oneflow as flow
import pytest
from helpers import Line, quiet_trainer
from oneflow.utils.data import DataLoader, DistributedSampler, TensorDataset

from ofengine import ConfigurationError, DataError, RankError, Trainer, rank_zero_only
from ofengine.data.batches import Batches
from ofengine.launch.environment import read
from ofengine.metrics import Mean
from ofengine.ranks.meetings import Meetings
from ofengine.ranks.messages import decode, encode, pack, unpack
from ofengine.ranks.sharded_state import ShardedState, owners
from ofengine.ranks.shares import OTHERS, Share
from ofengine.run.progress import Progress
from ofengine.shared_metrics import SharedMetrics


class OwnUpdate(flow.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_an_update_of_one_s_own_is_not_shared_out(second_of_two: None) -> None:
    world = read()
    assert world is not None
    parameters = [flow.nn.Parameter(flow.ones(2))]
    ShardedState(Meetings(world), flow.optim.SGD(parameters, lr=0.1))
    with pytest.raises(RankError, match=r"and OwnUpdate\.step may read others too"):
        ShardedState(Meetings(world), OwnUpdate(parameters, lr=0.1))


def test_a_state_that_is_out_of_reach(second_of_two: None) -> None:
    world = read()
    assert world is not None
    meetings = Meetings(world)
    meetings.over = True
    with pytest.raises(RankError, match="go on from a checkpoint of before it"):
        ShardedState(meetings, flow.optim.SGD([flow.nn.Parameter(flow.ones(2))], lr=0.1)).whole()


def test_each_parameter_is_of_one_rank_and_no_rank_has_much_more_than_another() -> None:
    assert owners([5, 1, 3, 3, 2], 2) == [0, 1, 1, 1, 0]
    assert owners([1, 1, 1], 5) == [0, 1, 2]
    assert owners([], 2) == []
    sizes = [int(size) for size in np.random.RandomState(0).randint(1, 1000, 200)]
    for ranks in (2, 3, 7):
        found = owners(sizes, ranks)
        loads = [sum(s for s, o in zip(sizes, found) if o == rank) for rank in range(ranks)]
        assert max(loads) - min(loads) < 50 and sum(loads) == sum(sizes)


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the second of two ranks, as far as the environment goes."""
    world = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"strategy": "zero"}, "write devices=2 or more"),
        ({"strategy": "zero", "devices": 2, "mode": "graph"}, 'write mode="eager"'),
        ({"strategy": "fsdp"}, 'write "zero"'),
        ({"strategy": "deepspeed_stage_2"}, 'write "zero"'),
        ({"strategy": "ddp_spawn"}, 'write "ddp"'),
        ({"strategy": "dp"}, "use one of"),
        ({"strategy": None}, "use one of"),
        ({"devices": 0}, "devices=0"),
        ({"devices": "2"}, "devices='2'"),
        ({"num_nodes": 0}, "num_nodes=0"),
        ({"sync_batchnorm": 1}, "sync_batchnorm=1"),
    ],
)
def test_an_argument(arguments: Dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        Trainer(**arguments)
    assert says in str(error.value)


def test_a_proof_of_synchronized_batch_norms(second_of_two: None) -> None:
    with pytest.raises(ConfigurationError, match="leave out sync_batchnorm"):
        quiet_trainer(sync_batchnorm=True).prove(Line(), [flow.ones(1, 1)])


def test_ranks_of_other_machines_are_not_started() -> None:
    with pytest.raises(ConfigurationError, match="start the script on each machine"):
        quiet_trainer(num_nodes=2).fit(Line(), [flow.ones(1, 1)])


def test_a_metric_that_the_others_could_not_find(second_of_two: None) -> None:
    world = read()
    assert world is not None
    task, metrics = Line(), SharedMetrics(Meetings(world), Progress())
    metrics.attach(task, [])
    metrics.begin(per_step=False)
    with pytest.raises(ConfigurationError, match="make it in the task's __init__"):
        metrics.log("mean", Mean())
    task.mean = Mean()
    metrics.log("mean", task.mean)


def test_another_number_of_ranks_than_were_started(second_of_two: None) -> None:
    for arguments in ({"devices": 1}, {"devices": 3}, {"devices": 2, "num_nodes": 2}):
        with pytest.raises(ConfigurationError, match="was started as one of 2"):
            quiet_trainer(**arguments)


def test_a_rank_knows_which_it_is(second_of_two: None) -> None:
    trainer = quiet_trainer()
    assert (trainer.world_size, trainer.global_rank, trainer.local_rank) == (2, 1, 1)
    assert not trainer.is_global_zero
    assert rank_zero_only(lambda: 1)() is None


def test_a_process_that_is_alone_is_rank_zero() -> None:
    trainer = quiet_trainer()
    assert (trainer.world_size, trainer.global_rank, trainer.num_nodes) == (1, 0, 1)
    assert trainer.is_global_zero
    assert rank_zero_only(lambda: 1)() == 1


def test_a_sampler_that_repeats_samples() -> None:
    data = TensorDataset(flow.ones(6, 1))
    loader = DataLoader(data, sampler=DistributedSampler(data, 2, 0))
    with pytest.raises(DataError, match="repeats samples"):
        Batches(loader, None, flow.device("cpu"), "train_dataloader", share=Share(0, 2))


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("workers", [0, 1])
def test_each_batch_is_one_rank_s(size: int, workers: int) -> None:
    data = TensorDataset(flow.arange(23))
    seen = []
    for rank in range(size):
        loader = DataLoader(data, batch_size=3, num_workers=workers)
        share = Share(rank, size)
        batches = Batches(loader, None, flow.device("cpu"), "data", share=share)
        own = [tuple(each.numpy().tolist()) for (each,) in batches.first(None)]
        assert len(own) == len(range(rank, 8, size))
        seen += own
        rounds = list(batches.steps(1))
        assert [each[1] for each in rounds] == list(range(-(-8 // size)))
        assert [each[2] for each in rounds][-1] == (8 % size or size)
        assert OTHERS not in [each[0] for each in rounds]
    assert sorted(sum(seen, ())) == list(range(23))


def test_a_message_keeps_all_bits_and_runs_nothing() -> None:
    import numpy as np

    value = {"a": [0.1, float("inf"), 2**70, None, "x"], "b": np.array([1.5, -0.0], np.float32)}
    value["c"] = np.array(["x", "yz"])
    back = decode(encode(value))
    assert back["a"] == value["a"]
    assert back["b"].tobytes() == value["b"].tobytes()
    assert back["c"].tolist() == ["x", "yz"]
    with pytest.raises(TypeError):
        encode({"function": print})


def test_what_a_step_returns_comes_back_as_it_was() -> None:
    value = {1: (flow.ones(2, dtype=flow.int64), [None, True, "x"], {"a": 0.5})}
    back = unpack(decode(encode(pack(value))), flow.device("cpu"))
    assert list(back) == [1] and back[1][1:] == ([None, True, "x"], {"a": 0.5})
    assert isinstance(back[1], tuple) and back[1][0].dtype == flow.int64
    assert back[1][0].numpy().tolist() == [1, 1]
    with pytest.raises(RankError, match="this is a set: return one of those"):
        pack([{1}])
