from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.cluster.session import Session
from rlhf.config.pipeline import ClusterSettings
from tests.pipeline.helpers import install_toys


@pytest.fixture(scope="session")
def session() -> Iterator[Session]:
    """One Ray session of two cores for all tests here: to start one takes seconds."""
    with Session(ClusterSettings(cpus=2, gpus=0)) as session:
        session.start()
        yield session


@pytest.fixture(scope="session")
def cluster(session: Session) -> str:
    """The address at which other processes attach to that session."""
    import ray

    return ray.get_runtime_context().gcs_address


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder that makes the toy stages known to a program that has it on its path."""
    return install_toys(tmp_path / "site")
