"""Stage select with rewards whose scores are known."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.attempt.context import Context
from rlhf.config.collect import SelectSettings
from rlhf.data.records import read_rows
from rlhf.errors import StageError
from rlhf.zero import group
from tests.collect.program import write_rows


class Reward:
    """A point for each letter a."""

    def score(self, prompts: list[Any], texts: list[str]) -> torch.Tensor:
        assert len(prompts) == len(texts)
        return torch.tensor([float(text.count("a")) for text in texts])


def selected(
    folder: Path, sets: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, float], Path]:
    """Metrics, and the folder of what was written."""
    from rlhf.stages import select

    write_rows(folder / "train.jsonl", sets)
    write_rows(folder / "heldout.jsonl", [])
    monkeypatch.setattr(select, "load_rewards", lambda *_: Reward())
    monkeypatch.setattr(group, "is_main", lambda: True)
    monkeypatch.setattr(group, "barrier", lambda: None)
    out = folder / "out"
    return select.run(Context("select", "key", SelectSettings(), {"responses": folder}, out, folder, folder)), out


def test_the_best_response_of_each_set_is_a_demonstration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal ones the first; sets may have different numbers of responses, and none need be held out. Where all are
    empty there is nothing to imitate.
    """
    sets = [
        {"prompt": "p", "responses": ["b", "aa", "a"]},
        {"prompt": "q", "responses": ["ab", "ba"]},
        {"prompt": "r", "responses": ["", "b", "b", "aab"]},
        {"prompt": "s", "responses": [" ", ""]},
    ]
    metrics, out = selected(tmp_path, sets, monkeypatch)
    chosen = [(row["prompt"], row["completion"]) for row in read_rows(out / "train.jsonl")]
    assert chosen == [("p", "aa"), ("q", "ab"), ("r", "aab")]
    assert read_rows(out / "heldout.jsonl") == []
    assert metrics == pytest.approx({"sets": 3, "sets/left_out": 1, "score/best": 5 / 3, "score/all": 7 / 11})


def test_an_empty_response_is_no_demonstration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the rewards say of it; without any other there is an error."""
    monkeypatch.setattr(Reward, "score", lambda _, __, texts: torch.tensor([-float(len(text)) for text in texts]))
    _, out = selected(tmp_path, [{"prompt": "p", "responses": ["bb", "", "b"]}], monkeypatch)
    assert [row["completion"] for row in read_rows(out / "train.jsonl")] == ["b"]
    with pytest.raises(StageError, match="empty"):
        selected(tmp_path, [{"prompt": "p", "responses": ["", "\n"]}], monkeypatch)
