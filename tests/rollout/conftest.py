from pathlib import Path

import pytest

from tests.models.tiny import make_tiny_llama


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))
