from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from rlhf.cluster.session import Session
from rlhf.config.pipeline import ClusterSettings
from rlhf.data.downloads import MOVIE_SNIPPETS_SDIST, fetch

# A deadline measures the machine, not the code; the same examples every time make a failure repeatable.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

DOWNLOADS = Path(__file__).parents[1] / "downloads"


@pytest.fixture(scope="session")
def sdist() -> Path:
    """The source distribution with the movie snippets, fetched once and kept in the checkout's ignored folder."""
    return fetch(MOVIE_SNIPPETS_SDIST, None, DOWNLOADS)


@pytest.fixture(scope="session")
def session() -> Iterator[Session]:
    """One Ray session of two cores for all tests: to start one takes seconds."""
    with Session(ClusterSettings(cpus=2, gpus=0)) as session:
        session.start()
        yield session
