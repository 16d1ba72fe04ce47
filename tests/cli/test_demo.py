"""`rlhf demo`: it writes its records and its pipeline once, runs, and shows what was learned."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.cli.main import main
from rlhf.config.yaml_tree import read_tree
from rlhf.data.records import read_rows

ROOT = Path(__file__).parents[2]
SHORT = (
    *("sft.epochs=0.1", "rm.epochs=0.1", "ppo.iterations=2", "ppo.rollouts=8", "evaluate.prompts=8"),
    "model.scratch={vocabulary: 512, hidden_size: 32, layers: 1, heads: 2, context: 256}",
)


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


@pytest.mark.slow
def test_demo_runs_and_then_has_nothing_to_run(here: Path, cluster: str):
    """Every stage, the curve, three prompts, figures with intervals, the report; edited settings stay."""
    # Ray's processes of the shared cluster have another working folder.
    kinds = ("demonstrations", "comparisons", "prompts", "judge")
    sources = [f"data.{kind}={here / 'rlhf-demo' / kind}.jsonl" for kind in kinds]
    words = [sys.executable, "-m", "rlhf", "demo", *SHORT, *sources, f"cluster.address={cluster}"]
    surroundings = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    first, second = (
        subprocess.run(words, env=surroundings, capture_output=True, text=True, timeout=200) for _ in range(2)
    )
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    for out in (first.stdout, second.stdout):
        assert "Three customers, who are simulated" in " ".join(out.split())
        assert "ppo, 2 iterations" in out
        assert re.search(r"^  score +\S+ +-?[\d.]+$", out, re.MULTILINE)
        assert re.search(
            r"stage trained against: -?[\d.]+ → .* \(95 % interval -?[\d.]+ to -?[\d.]+\)$", out, re.MULTILINE
        )
        prompts = {row["prompt"] for row in read_rows(here / "rlhf-demo" / "prompts.jsonl")}
        assert len([line for line in out.splitlines() if line in prompts]) == 3
        (report,) = re.findall(r"^report: (.*)$", out, re.MULTILINE)
        assert (here / report).is_file()
    assert "evaluate  done" in first.stdout
    assert "nothing had to run: all 7 results were in the store" not in first.stdout
    assert "nothing had to run: all 7 results were in the store" in second.stdout
    assert "running" not in second.stdout

    assert read_tree(here / "rlhf-demo" / "demo.yaml").values == read_tree(ROOT / "configs" / "demo.yaml").values
    (here / "rlhf-demo" / "demo.yaml").write_text("ppo: wrong")
    assert main(["demo"]) == 2
