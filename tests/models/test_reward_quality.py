"""What a reward model's folder says of it, out of scores that are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.config.stages import RmSettings
from rlhf.errors import StageError
from rlhf.models.reward_quality import QUANTILES, check_padding, write_quality
from rlhf.pipeline.context import NOTES, Context
from rlhf.ranking.quality import quality
from rlhf.zero import group


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context[RmSettings]:
    """The one rank of a group."""
    monkeypatch.setattr(group, "is_main", lambda: True)
    monkeypatch.setattr(group, "barrier", lambda: None)
    return Context("rm", "key", RmSettings(eval_pairs=500), {}, tmp_path, tmp_path, tmp_path)


def heldout(seed: int) -> tuple[list[dict[str, Any]], Tensor]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(30, 4))
    ratings = truth[:, :, None] + rng.normal(size=(30, 4, 5))
    sets = [{"responses": list("abcd"), "ratings": one.tolist(), "pool": n // 10} for n, one in enumerate(ratings)]
    sets = [one | {"responses": [f"{n} {text}" for text in "abcd"]} for n, one in enumerate(sets)]
    return sets, torch.tensor(truth.ravel() + rng.normal(size=120))


def test_final_metrics_are_the_figures_of_quality_json(context: Context[RmSettings]) -> None:
    """Each under its name, the human ones with ties as halves; quantiles on the demonstrations' scale."""
    sets, scores = heldout(0)
    texts = [[1] * (5 + index % 7) for index in range(120)]
    demonstrations = torch.tensor([1.0, 3.0, 5.0])
    metrics = write_quality(context, sets, scores, demonstrations, texts)
    written = json.loads((context.output / "quality.json").read_text())
    expected = quality(sets, scores.numpy(), [len(text) for text in texts], 500, 0)
    assert {name: value for name, value in written.items() if name != "scores"} == json.loads(json.dumps(expected))
    assert metrics == {
        "eval/accuracy_low": expected["accuracy"]["low"],
        "eval/accuracy_high": expected["accuracy"]["high"],
        "eval/human_accuracy": expected["beside_people"]["all"]["ties_half"]["human"],
        "eval/human_accuracy_within": expected["beside_people"]["within"]["ties_half"]["human"],
        "eval/kendall_tau": expected["kendall_tau"]["mean"],
        "eval/calibration_error": expected["calibration"]["expected_error"],
    }
    assert len(set(metrics.values())) == len(metrics)
    assert written["scores"]["heldout"] == pytest.approx(np.quantile((scores.numpy() - 3) / 2, QUANTILES))
    assert written["scores"]["demonstrations"] == pytest.approx([-1, -0.9, -0.5, 0, 0.5, 0.9, 1])
    assert (context.output / "reliability.svg").exists()


@pytest.mark.parametrize(("follow", "said"), [(1.0, True), (-1.0, True), (0.0, False)])
def test_scores_that_follow_length_more_than_people_do_are_noted(
    context: Context[RmSettings], *, follow: float, said: bool
) -> None:
    """Longer or shorter alike; people's ratings have nothing to do with length here."""
    sets, scores = heldout(1)
    texts = [[1] * int(length) for length in np.random.default_rng(2).integers(1, 60, 120)]
    lengths = torch.tensor([float(len(text)) for text in texts])
    write_quality(context, sets, scores + follow * lengths, torch.tensor([0.0, 1.0]), texts)
    notes = context.attempt / NOTES
    assert ("may learn to write to a length" in (notes.read_text() if notes.exists() else "")) == said


@pytest.mark.parametrize(("precision", "largest"), [("fp32", 0.01), ("bf16", 0.5)])
def test_scores_that_depend_on_the_batch_are_refused_in_deviations(precision: Any, largest: float) -> None:
    """The difference counts by the spread of scores: the same shift passes where scores spread twice as far."""
    texts = [[1] * (length + 1) for length in range(40)]
    scores = torch.zeros(40, dtype=torch.float64)

    def alone(rows: Any) -> Tensor:
        return torch.full((len(rows),), -3.0 * largest, dtype=torch.float64)

    check_padding(alone, texts, scores, 3.1, precision)
    with pytest.raises(StageError, match="depends on the batch"):
        check_padding(alone, texts, scores, 2.9, precision)
