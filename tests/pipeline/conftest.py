from pathlib import Path

import pytest

from tests.pipeline.helpers import install_toys


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder that makes the toy stages known to a program that has it on its path."""
    return install_toys(tmp_path / "site")
