"""Where a reward model starts from: a language model, another reward model, or nothing."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf.config.stages import Precision
from rlhf.config.tuning import FULL
from rlhf.errors import StageError
from rlhf.models.evaluation import check_padding
from rlhf.models.reward import from_scratch, is_reward_model, load_scorer
from rlhf.models.text import load_tokenizer

pytestmark = pytest.mark.usefixtures("group")


@pytest.fixture
def scorer(tiny: Path, tmp_path: Path) -> Path:
    """A reward model's folder, as the stage writes it."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    torch.nn.init.constant_(model.score.weight, 0.5)
    model.save_pretrained(tmp_path / "scorer")
    for file in tiny.iterdir():
        if not (tmp_path / "scorer" / file.name).exists():
            shutil.copy(file, tmp_path / "scorer")
    path = tmp_path / "scorer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"score_mean": 0.0, "score_std": 1.0}))
    return tmp_path / "scorer"


def test_a_reward_model_keeps_its_head_and_a_language_model_gets_one(tiny: Path, scorer: Path) -> None:
    """Preference-model pre-training would be lost with the head."""
    assert is_reward_model(scorer)
    assert not is_reward_model(tiny)
    kept = load_scorer(scorer, "fp32", FULL, load_tokenizer(scorer), head_seed=0).score.weight
    assert (kept == 0.5).all()
    fresh = load_scorer(tiny, "fp32", FULL, load_tokenizer(tiny), head_seed=0).score.weight
    assert fresh.std() > 0


def test_from_scratch_is_the_shape_alone(scorer: Path, tmp_path: Path) -> None:
    """Random weights by the seed, whatever the weights were; the tokenizer stays, and what was true of scores goes."""
    made = from_scratch(scorer, tmp_path / "made", seed=0)
    other = from_scratch(scorer, tmp_path / "other", seed=1)
    assert not is_reward_model(made)
    assert load_tokenizer(made).get_vocab() == load_tokenizer(scorer).get_vocab()

    def embeddings(folder: Path) -> torch.Tensor:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        return next(iter(model.parameters()))

    assert embeddings(made).shape == embeddings(scorer).shape
    assert not torch.equal(embeddings(made), embeddings(scorer))
    assert not torch.equal(embeddings(made), embeddings(other))
    assert 0.01 < embeddings(made).std() < 0.05


def test_a_score_that_depends_on_padding_is_refused() -> None:
    """By so many deviations; rounding is allowed, more to bf16 than to fp32."""
    texts, scores = [[1] * length for length in range(1, 20)], torch.linspace(-1, 1, 19)

    def shifted(by: float) -> Callable[[Sequence[list[int]]], torch.Tensor]:
        return lambda rows: torch.stack([scores[len(row) - 1] for row in rows]) + by

    check_padding(shifted(0.0), texts, scores, 1.0, "fp32")
    check_padding(shifted(0.1), texts, scores, 1.0, "bf16")
    refused: tuple[tuple[float, Precision], ...] = ((0.1, "fp32"), (0.8, "bf16"))
    for by, precision in refused:
        with pytest.raises(StageError, match="depends on the batch"):
            check_padding(shifted(by), texts, scores, 1.0, precision)
