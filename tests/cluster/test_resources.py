from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.cluster.session import Resources
from rlhf.config.stages import WorkerSettings
from rlhf.errors import PreflightError

nodes = st.lists(st.tuples(st.integers(0, 16), st.integers(0, 8)), min_size=1, max_size=4)


def resources(*nodes: tuple[int, int]) -> Resources:
    return Resources([cpus for cpus, _ in nodes], [gpus for _, gpus in nodes])


def places(nodes: list[tuple[int, int]], share: int, gpu: bool) -> int:
    """Put ranks on nodes one by one, as slowly as can be."""
    found = 0
    for cpus, gpus in nodes:
        while cpus >= share and (gpus >= 1 or not gpu):
            cpus, gpus, found = cpus - share, gpus - 1, found + 1
    return found


@given(
    nodes=nodes,
    count=st.integers(1, 9),
    cpus=st.none() | st.integers(1, 8),
    gpu=st.none() | st.booleans(),
)
def test_a_group_is_granted_exactly_when_its_ranks_find_places(
    nodes: list[tuple[int, int]], count: int, cpus: int | None, gpu: bool | None
):
    """What is granted fits the nodes, so Ray never waits for ever; what is refused does not fit."""
    use_gpu = any(gpus for _, gpus in nodes) if gpu is None else gpu
    try:
        granted = resources(*nodes).per_rank("ppo", count, cpus, gpu)
    except PreflightError:
        assert places(nodes, cpus or 1, use_gpu) < count
    else:
        assert (granted.count, granted.gpu) == (count, use_gpu)
        assert granted.cpus >= 1
        assert places(nodes, granted.cpus, use_gpu) >= count
        if cpus is not None:
            assert granted.cpus == cpus
        elif not use_gpu:
            assert places(nodes, granted.cpus + 1, use_gpu) < count, "a larger share would have fitted too"


def test_one_rank_on_a_cpu_takes_all_cores_of_the_largest_node():
    """The default on a laptop: one rank with every thread; two ranks share them."""
    assert resources((2, 0)).per_rank("sft", 1, None, None).cpus == 2
    assert resources((4, 0), (16, 0)).per_rank("sft", 1, None, None).cpus == 16
    assert resources((8, 0)).per_rank("sft", 3, None, None).cpus == 2


def test_a_refusal_names_what_is_asked_for_what_there_is_and_what_would_fit():
    """The override that it suggests is one that is granted."""
    with pytest.raises(PreflightError) as caught:
        resources((2, 0)).per_rank("ppo", 3, None, None)
    assert caught.value.what == "ppo asks for 3 ranks of 1 CPU cores, and the cluster has 2 cores on 1 node(s)"
    assert caught.value.next_step == "ppo.workers.count=2"

    with pytest.raises(PreflightError, match="asks for 4 GPUs, one for each rank, and the cluster has 2") as caught:
        resources((8, 2)).per_rank("ppo", 4, None, None)
    assert caught.value.next_step == "ppo.workers.count=2"

    with pytest.raises(PreflightError, match="the cluster has 0") as caught:
        resources((8, 0)).per_rank("ppo", 1, None, True)
    assert "ppo.workers.gpu=false" in caught.value.next_step

    with pytest.raises(PreflightError, match="not all beside a GPU"):
        resources((8, 0), (1, 4)).per_rank("ppo", 4, None, None)


def test_a_task_takes_the_smallest_node_that_has_cores():
    """A head node without cores is no place for a task; a cluster without any is refused."""
    assert resources((0, 0), (8, 0), (4, 0)).for_task() == 4
    with pytest.raises(PreflightError, match="no CPU core"):
        resources((0, 0), (0, 2)).for_task()


AUTO = WorkerSettings(count="auto")


@given(
    nodes=nodes,
    cpus=st.none() | st.integers(1, 8),
    gpu=st.none() | st.booleans(),
    least=st.integers(1, 4),
    more=st.none() | st.integers(0, 4),
    batch=st.lists(st.integers(1, 24), max_size=2),
)
def test_auto_takes_the_most_ranks_that_find_places_and_share_the_batch(
    nodes: list[tuple[int, int]], cpus: int | None, gpu: bool | None, least: int, more: int | None, batch: list[int]
):
    """Within its limits; no larger number would do, and none is taken where there is room for too few."""
    most = None if more is None else least + more
    workers = WorkerSettings(count="auto", min=least, max=most, cpus=cpus, gpu=gpu)
    use_gpu = any(gpus for _, gpus in nodes) if gpu is None else gpu
    room = places(nodes, cpus or 1, use_gpu)
    # On CPUs that nothing divides, a rank on each node.
    wanted = room if use_gpu or cpus else max(least, sum(cores > 0 for cores, _ in nodes))
    allowed = [
        count for count in range(least, min(wanted, most or wanted) + 1) if all(number % count == 0 for number in batch)
    ]
    if room < least or not allowed:
        with pytest.raises(PreflightError, match=r"asks for at least|none of these numbers divides"):
            resources(*nodes).ranks("ppo", workers, batch)
    else:
        assert resources(*nodes).ranks("ppo", workers, batch) == max(allowed)


def test_what_auto_refuses_names_the_limit_and_what_there_is():
    """A fixed number is left as it is, and refused elsewhere."""
    assert resources((2, 0)).ranks("ppo", WorkerSettings(count=5), [4]) == 5
    with pytest.raises(PreflightError) as caught:
        resources((8, 2)).ranks("ppo", AUTO.model_copy(update={"min": 4}), [])
    assert caught.value.what == "ppo asks for at least 4 ranks, and the cluster has room for 2"
    assert (caught.value.where, caught.value.next_step) == ("ppo.workers.min", "add nodes, or ppo.workers.min=2")
    with pytest.raises(PreflightError, match="may have 3 to 4 ranks, and none of these numbers divides 10, which"):
        resources((8, 4)).ranks("ppo", AUTO.model_copy(update={"min": 3}), [10])
    with pytest.raises(
        PreflightError, match=r"none of these numbers that zero\.secondary_partition 4 allows divides 6, "
    ):
        resources((8, 4), (8, 3)).ranks("ppo", AUTO.model_copy(update={"min": 5}), [6], together=4)


@pytest.mark.parametrize(("gpus", "taken"), [((4, 4), 8), ((4, 3), 4), ((4, 2), 4), ((3,), 3)])
def test_auto_fills_nodes_that_keep_weights_twice(gpus: tuple[int, ...], taken: int):
    """Whole ones, or a part of one alone."""
    assert resources(*((8, count) for count in gpus)).ranks("ppo", AUTO, [24], together=4) == taken


def test_what_auto_deals_out_is_shared_by_ranks_that_are_not_set_apart():
    """Of five ranks with one apart four share eight rows; with two apart three cannot, and of four two can.

    Where pairs keep weights a second time, of eight with one apart seven cannot train, and of seven six can.
    """
    least = AUTO.model_copy(update={"min": 3})
    assert resources((8, 5)).ranks("ppo", least, [8], set_apart=1) == 5
    assert resources((8, 5)).ranks("ppo", least, [8], set_apart=2) == 4
    assert resources((8, 8)).ranks("ppo", least, [420], together=2, set_apart=1) == 7
    with pytest.raises(PreflightError, match="may have 3 to 3 ranks, 1 of which do not train, and none of these"):
        resources((8, 3)).ranks("ppo", least, [7], set_apart=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min": 2}, "min and max are for count: auto, and count is 1"),
        ({"count": 4, "max": 8}, "min and max are for count: auto, and count is 4"),
        ({"count": "auto", "min": 4, "max": 2}, "max 2 is below min 4"),
    ],
)
def test_limits_without_auto_or_upside_down_are_refused(values: dict[str, Any], message: str):
    """They would do nothing, or leave no number."""
    with pytest.raises(ValueError, match=message):
        WorkerSettings.model_validate(values)
