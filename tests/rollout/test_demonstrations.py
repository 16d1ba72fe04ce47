"""The demonstrations that ptx mixes into PPO's updates."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.policy_gradient import PtxSettings
from rlhf.errors import PreflightError
from rlhf.models import text
from rlhf.models.micro_batches import MicroBatch
from rlhf.rollout.prompts import DemonstrationStream

ROWS = [{"prompt": f"film {number}", "completion": "a joy " * number} for number in range(1, 6)]


pytestmark = [
    # DeepSpeed's and torch's own.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.usefixtures("group_of_one"),
]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return text.load_tokenizer(tiny)


def stream(folder: Path, tokenizer: Any, micro: int = 5, **settings: Any) -> DemonstrationStream:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return DemonstrationStream(file, tokenizer, PtxSettings(coef=1.0, **settings), 0, MicroBatch(micro))


def completions(demonstrations: DemonstrationStream, update: int) -> list[str]:
    minibatch = demonstrations.minibatch(update)
    assert minibatch.num_tokens == sum(int(part.mask.sum()) for part in minibatch.parts)
    return [
        str(ids[-part.time :][mask].tolist())
        for part in minibatch.parts
        for ids, mask in zip(part.ids, part.mask, strict=True)
    ]


def test_a_pass_has_every_completion_once_and_ends_in_eos(tmp_path: Path, tokenizer: Any) -> None:
    """Prompts are masked; each pass has an order of its own; micro batches change nothing but the portions."""
    of_two, of_five = (stream(tmp_path, tokenizer, micro, batch_size=5) for micro in (2, 5))
    expected = sorted(
        str([*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
        for row in ROWS
    )
    for update in range(6):
        assert sorted(completions(of_two, update)) == expected
        assert sorted(completions(of_five, update)) == expected
    alone = stream(tmp_path, tokenizer, batch_size=1)
    passes = [[completions(alone, 5 * number + place) for place in range(5)] for number in range(6)]
    assert len({str(order) for order in passes}) > 1


def test_what_is_too_long_is_cut_at_the_end_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    """A prompt that fills the length leaves nothing to learn; where all do, that is an error and no empty batch."""
    read = [text.prompt_ids(tokenizer, row["prompt"]) + text.response_ids(tokenizer, row["completion"]) for row in ROWS]
    lengths = [len(ids) for ids in read]
    limit = sorted(lengths)[-2]
    assert stream(tmp_path, tokenizer, batch_size=5, max_length=limit).cut == 1
    longest = stream(tmp_path, tokenizer, batch_size=5, max_length=limit).minibatch(0).parts[0]
    assert torch.ones_like(longest.mask).shape[1] < max(lengths)
    ROWS.append({"prompt": "long " * 60, "completion": "gone"})
    try:
        kept = stream(tmp_path, tokenizer, batch_size=5, max_length=max(lengths))
    finally:
        ROWS.pop()
    assert (kept.cut, kept.left_out) == (1, 1)
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "long " * 60, "completion": "gone"}) + "\n")
    with pytest.raises(PreflightError, match="all 1 demonstrations have prompts of 8 tokens"):
        DemonstrationStream(file, tokenizer, PtxSettings(coef=1.0, max_length=8), 0, MicroBatch(1))


def test_demonstrations_of_a_task_are_mixed_in_as_often_as_its_weight_says(tmp_path: Path, tokenizer: Any) -> None:
    """Also where one before them is left out for its length."""
    weights = [3.0, 1.0, 1.0, 0.5, 0.5]
    file = tmp_path / "weighted.jsonl"
    rows = [{"prompt": "long " * 60, "completion": "gone", "task": "t3.0", "weight": 3.0}]
    rows += [row | {"task": f"t{weight}", "weight": weight} for row, weight in zip(ROWS, weights, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = PtxSettings(coef=1.0, batch_size=12, max_length=60)
    demonstrations = DemonstrationStream(file, tokenizer, settings, 0, MicroBatch(4))
    assert demonstrations.left_out == 1
    drawn = sorted(Counter(completions(demonstrations, 0)).values())
    assert drawn == sorted(2 * weight for weight in weights)
