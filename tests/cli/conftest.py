import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rlhf.cli.main import main
from tests.pipeline.helpers import install_toys, make, write_pipeline


class Answer(NamedTuple):
    """What the program answered."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on standard output."""
        return json.loads(self.out)


Ask = Callable[..., Answer]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A pipeline of toy stages in an empty store."""
    return write_pipeline(tmp_path)


@pytest.fixture
def made(path: Path) -> Path:
    """The same with all results."""
    make(path)
    return path


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: Path) -> Ask:
    """The program, in this process, with the toy stages known as those of an installed package are."""
    monkeypatch.syspath_prepend(install_toys(tmp_path / "site"))
    monkeypatch.setenv("COLUMNS", "160")

    def ask(*words: str) -> Answer:
        capsys.readouterr()
        status = main([*words, "--config", str(path)])
        said = capsys.readouterr()
        return Answer(status, said.out, said.err)

    return ask
