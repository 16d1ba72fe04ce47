"""Stages that need nothing of each other run at the same time where there is room."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from rlhf.cluster.session import RankResources, Resources, Session
from rlhf.config.pipeline import PipelineConfig, load_pipeline
from rlhf.errors import RecordError
from rlhf.pipeline.plan import plan
from rlhf.pipeline.runner import Runner
from rlhf.store import Store
from rlhf.terminal import Display
from tests.pipeline.helpers import states, write_pipeline
from tests.pipeline.toys import MEET

KNOWN = {"meet": MEET}
RAY_NOISE = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def two_that_meet(folder: Path, one: str = "", other: str = "") -> Path:
    def section(mine: str, its: str, more: str) -> str:
        return f"{mine}: {{uses: meet, mine: {folder / mine}, other: {folder / its}{more}}}\n"

    return write_pipeline(folder, section("one", "other", one) + section("other", "one", other))


def load(path: Path) -> PipelineConfig:
    return load_pipeline(path, [], {"meet": MEET.settings})


def run(session: Session, path: Path) -> None:
    config = load(path)
    display = Display(Console(file=io.StringIO(), width=200), list(config.instances))
    Runner(config, KNOWN, Store.open(config.store.uri), session, display).run(())


def states_of(path: Path) -> dict[str, str]:
    config = load(path)
    return states(plan(config, KNOWN, Store.open(config.store.uri, create=False)))


@pytest.mark.slow
class TestOnRay:
    pytestmark = RAY_NOISE

    def test_stages_that_wait_for_each_other_both_end(self, session: Session, path_of_two: Path) -> None:
        """Each ends only while the other runs: one after the other they never would."""
        run(session, path_of_two)
        assert states_of(path_of_two) == {"one": "cached", "other": "cached"}

    def test_a_failure_leaves_the_other_stage_its_result(self, session: Session, tmp_path: Path) -> None:
        """What runs when a stage fails is finished and committed; then the run ends with the failure."""
        path = two_that_meet(tmp_path, ", fails: true", ", seconds: 1")
        with pytest.raises(RecordError, match="the first of two fails"):
            run(session, path)
        assert states_of(path) == {"one": "missing", "other": "cached"}


@pytest.fixture
def path_of_two(tmp_path: Path) -> Path:
    return two_that_meet(tmp_path)


def group(count: int, cpus: int, *, gpu: bool = False) -> RankResources:
    return RankResources(count, cpus, gpu)


@pytest.mark.parametrize(
    ("wanted", "beside", "room"),
    [
        (group(4, 1, gpu=True), [group(4, 1, gpu=True)], True),
        (group(5, 1, gpu=True), [group(4, 1, gpu=True)], False),
        (group(1, 16), [group(4, 1, gpu=True)], False),
        (group(1, 12), [], True),
        (group(1, 4), [group(1, 12)], True),
        (group(2, 4), [group(1, 12)], False),
        (group(8, 1, gpu=True), [group(1, 9)], False),
        (group(7, 1, gpu=True), [group(1, 1)], True),
    ],
)
def test_room_is_what_is_left_at_worst(wanted: RankResources, beside: list[RankResources], room: bool) -> None:
    """One node of 16 cores and 8 GPUs: a stage is started only where Ray is sure to find it places."""
    assert Resources(cpus=[16], gpus=[8]).have_room(wanted, beside) is room


def test_what_two_nodes_have_in_pieces_is_no_room() -> None:
    """Two nodes of 8 cores: a running rank of 5 may be on either, and 8 are then free on one alone."""
    nodes = Resources(cpus=[8, 8], gpus=[0, 0])
    assert nodes.have_room(group(1, 8), [group(1, 5)])
    assert not nodes.have_room(group(2, 8), [group(1, 5)])
