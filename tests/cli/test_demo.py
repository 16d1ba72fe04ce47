"""`rlhf demo`: what it refuses, and that what it writes is a whole pipeline."""

from pathlib import Path

import pytest

from rlhf.cli.demo import write_demo
from rlhf.cli.main import main
from rlhf.cli.run import DEMO


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_demo_cannot_do_is_refused(here: Path, capsys: pytest.CaptureFixture[str]):
    """No stages, no other pipeline file, and a folder that cannot be written is named."""
    assert main(["demo", "ppo"]) == 2
    assert main(["demo", "--config", "mine.yaml"]) == 2
    assert not (here / "rlhf-demo").exists()
    (here / "rlhf-demo").write_text("a file")
    assert main(["demo"]) == 2
    assert "error: the demo's files cannot be written" in capsys.readouterr().err


def test_what_demo_writes_is_a_whole_pipeline_and_stays(here: Path):
    """Every stage can be planned from its records; a pipeline file that was edited is the one that is run."""
    write_demo(DEMO.parent)
    assert main(["plan", "--config", str(DEMO)]) == 0
    DEMO.write_text("ppo: wrong")
    assert main(["demo"]) == 2
    assert DEMO.read_text() == "ppo: wrong"
