import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.cluster.session import Resources
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
