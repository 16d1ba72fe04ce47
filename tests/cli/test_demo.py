"""`rlhf demo`: what it refuses, that what it writes is a whole pipeline, and what it shows of it."""

import re
from pathlib import Path

import pytest

from rlhf.cli.demo import write_demo
from rlhf.cli.main import main
from rlhf.cli.run import DEMO
from rlhf.cluster.session import Session


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


def test_what_demo_writes_is_a_whole_pipeline_and_stays(here: Path, capsys: pytest.CaptureFixture[str]):
    """Every stage can be planned from its records; a pipeline file that was edited is the one that is run."""
    write_demo(DEMO.parent)
    assert main(["plan", "--config", str(DEMO)]) == 0
    (DEMO.parent / "comparisons.jsonl").unlink()
    assert main(["demo"]) == 2
    assert "there is no file or folder rlhf-demo/comparisons.jsonl" in capsys.readouterr().err
    DEMO.write_text("ppo: wrong")
    assert main(["demo"]) == 2
    assert DEMO.read_text() == "ppo: wrong"


SHORT = ("sft.epochs=0.5", "rm.epochs=0.5", "ppo.iterations=3", "ppo.rollouts=16", "evaluate.prompts=8")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_demo_learns_and_shows_it(
    session: Session, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A ranking, the curve, replies before and after, by how much, the report; by a Ray that was started elsewhere."""
    monkeypatch.setattr(Session, "start", lambda _: None)  # it attaches to that of the tests
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["demo", *SHORT]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"One ranking, by \w+, of replies to: .*\n  1\. .*\n  2\. ", shown)
    *_, end = shown.partition("ppo, 3 iterations")
    assert re.search(r"  score .*[▁-█].* from -?\d.*\n  KL +[▁-█]{3} ", end, re.DOTALL)
    prompts = [row for row in re.findall(r"^\S.*[.!]$", end, re.MULTILINE) if "  " not in row]
    scores = re.findall(r"^[+-]\d\.\d\d  \S.* [+-]\d\.\d\d  ", end, re.MULTILINE)
    assert (len(prompts), len(scores)) == (3, 3)
    interval = r": -?\d\.\d\d → -?\d\.\d\d, by [+-]\d\.\d\d \(95 % interval -?\d\.\d\d to -?\d\.\d\d\)"
    assert re.search(f"score of the reward model{interval}", end)
    assert re.search(f"rating by a judge that no stage trained against{interval}", end)
    (report,) = re.findall("^report: (.*)$", end, re.MULTILINE)
    assert "<html" in (here / report).read_text()
    assert "rlhf demo ppo.kl.coef=0.5" in end

    assert main(["demo", *SHORT]) == 0
    again = capsys.readouterr().out
    assert "nothing had to run: all 7 results were in the store" in again
    assert again.partition("ppo, 3 iterations")[2].partition("report: ")[0] == end.partition("report: ")[0]
