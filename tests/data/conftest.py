from pathlib import Path

import pytest

from rlhf.data.downloads import MOVIE_SNIPPETS_SDIST, fetch

CACHE = Path(__file__).parents[2] / "downloads"


@pytest.fixture(scope="session")
def sdist() -> Path:
    """The source distribution with the movie snippets, fetched once and kept in the checkout's ignored folder."""
    return fetch(MOVIE_SNIPPETS_SDIST, None, CACHE)
