from pathlib import Path

import pytest

from rlhf.cluster.session import Session
from tests.pipeline.helpers import install_toys


@pytest.fixture(scope="session")
def cluster(session: Session) -> str:
    """The address at which other processes attach to that session."""
    import ray

    return ray.get_runtime_context().gcs_address


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder that makes the toy stages known to a program that has it on its path."""
    return install_toys(tmp_path / "site")
