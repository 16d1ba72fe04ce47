import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from rlhf.cluster.session import Session
from rlhf.config.pipeline import ClusterSettings
from rlhf.data.downloads import MOVIE_SNIPPETS_SDIST, fetch
from tests import buckets
from tests.scheduler import Scheduler, order
from tests.small import pipeline, two_ranks, unbroken

__all__ = ["pipeline", "two_ranks", "unbroken"]  # fixtures for all

# A deadline measures the machine, not the code; the same examples every time make a failure repeatable.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

GROUP_OF_ONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_SIZE": "1",
    "DS_ACCELERATOR": "cpu",
    "TORCHDYNAMO_DISABLE": "1",
}

DOWNLOADS = Path(__file__).parents[1] / "downloads"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos", action="store_true", help="tests/faults: every round, except those passed before")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduler:
    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order(items)


@pytest.fixture(scope="session")
def sdist() -> Path:
    """The source distribution with the movie snippets, fetched once and kept in the checkout's ignored folder."""
    return fetch(MOVIE_SNIPPETS_SDIST, None, DOWNLOADS)


@pytest.fixture(scope="session")
def session() -> Iterator[Session]:
    """One Ray session of two cores for all tests: to start one takes seconds.

    A process of a task that has ended stays for the next one: to import what a preflight needs takes six seconds.
    """
    with Session(ClusterSettings(cpus=2, gpus=0)) as session:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("RAY_idle_worker_killing_time_threshold_ms", str(3_600_000))
            session.start()
        yield session


@pytest.fixture(scope="session")
def cluster(session: Session) -> str:
    """The address at which other processes attach to that session."""
    import ray

    return ray.get_runtime_context().gcs_address


@pytest.fixture(scope="session")
def endpoint() -> Iterator[buckets.Endpoint]:
    """One S3 endpoint for all tests."""
    with buckets.endpoint() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(endpoint: buckets.Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[buckets.Bucket]:
    """A bucket of its own for a test, which this process and its children find; faults of the endpoint end with it."""
    for name, value in buckets.environment(endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    endpoint.calm()
    yield buckets.Bucket(endpoint)
    endpoint.calm()


@pytest.fixture(scope="session")
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone, for all tests: DeepSpeed remembers the first that it saw."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in GROUP_OF_ONE.items():
            monkeypatch.setenv(name, value)
        import deepspeed
        import torch.distributed as dist
        from deepspeed.ops import __compatible_ops__

        # DeepSpeed would compile its shared-memory collectives, which takes half a minute.
        __compatible_ops__["deepspeed_shm_comm"] = False
        gc.freeze()  # as a worker does
        meeting = f"file://{tmp_path_factory.mktemp('group') / 'meeting'}"
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=meeting, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def new_accelerator() -> Iterator[None]:
    """Leave nothing of a trainer's to the tests after."""
    from tests import accelerator

    yield
    accelerator.forget()
    # A trainer under DeepSpeed sets it, and a plain one asks it.
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


@pytest.fixture
def group(group_of_one: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group of this process alone, with the environment that DeepSpeed wants."""
    # An engine collects garbage again and again, and would search all that the tests before have imported and kept.
    gc.collect()
    gc.freeze()
    for name, value in GROUP_OF_ONE.items():
        monkeypatch.setenv(name, value)
