"""Stage select with rewards whose scores are known."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.attempt.context import Context
from rlhf.config.collect import SelectSettings
from rlhf.data.records import read_rows
from rlhf.zero import group
from tests.collect.program import write_rows


class Reward:
    """A point for each letter a."""

    def score(self, prompts: list[Any], texts: list[str]) -> torch.Tensor:
        assert len(prompts) == len(texts)
        return torch.tensor([float(text.count("a")) for text in texts])


def test_the_best_response_of_each_set_is_a_demonstration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal ones the first; sets may have different numbers of responses, and none need be held out."""
    from rlhf.stages import select

    sets = [
        {"prompt": "p", "responses": ["b", "aa", "a"]},
        {"prompt": "q", "responses": ["ab", "ba"]},
        {"prompt": "r", "responses": ["", "b", "b", "aab"]},
    ]
    write_rows(tmp_path / "train.jsonl", sets)
    write_rows(tmp_path / "heldout.jsonl", [])
    monkeypatch.setattr(select, "load_rewards", lambda *_: Reward())
    monkeypatch.setattr(group, "is_main", lambda: True)
    monkeypatch.setattr(group, "barrier", lambda: None)
    out = tmp_path / "out"
    context = Context("select", "key", SelectSettings(), {"responses": tmp_path}, out, tmp_path, tmp_path)
    metrics = select.run(context)
    chosen = [(row["prompt"], row["completion"]) for row in read_rows(out / "train.jsonl")]
    assert chosen == [("p", "aa"), ("q", "ab"), ("r", "aab")]
    assert read_rows(out / "heldout.jsonl") == []
    assert metrics == pytest.approx({"sets": 3, "score/best": 5 / 3, "score/all": 7 / 9})
