"""The figures of stage evaluate, with policies and rewards whose every number is known."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.attempt.context import Context
from rlhf.config.stages import EvaluateSettings
from rlhf.rollout.prompts import PromptBatch
from rlhf.stages import evaluate
from rlhf.textstats import distinct_ngrams, paired_interval

BEFORE = ["a dull film", "a dull dull film", "an awful story"]
AFTER = ["a wonderful film", "a wonderful film", "a moving story of love"]
LOGPROBS = {
    "before": torch.tensor([[-1.0, -2.0, -9.0, -9.0], [-1.5, -1.0, -0.5, -9.0], [-3.0, -9.0, -9.0, -9.0]]),
    "after": torch.tensor([[-0.5, -1.0, -1.0, -1.0], [-1.0, -0.5, -0.5, -1.0], [-1.0, -1.0, -1.0, -1.0]]),
}
MASKS = {
    "before": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool),
    "after": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool),
}
WORTH = {"dull": -1.0, "awful": -2.0, "wonderful": 2.0, "moving": 1.0}


class Reward:
    def score(self, prompts: list[str], texts: list[str]) -> Tensor:
        assert len(prompts) == len(texts)
        return torch.tensor([sum(WORTH.get(word, 0.0) for word in text.split()) for text in texts])


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context[EvaluateSettings]:
    """A run in which both policies answer in known words with known log-probabilities."""
    asked: dict[str, Any] = {}

    def policy(name: str) -> Any:
        # The log-probabilities are of the tuned policy's responses: KL is not to be taken on the other's.
        def logprobs(sequences: str) -> Tensor:
            assert sequences == "responses of after"
            return LOGPROBS[name]

        return SimpleNamespace(name=name, tokenizer=None, logprobs=logprobs)

    def roll_out(policy: Any, batch: PromptBatch, seed: int, length: int) -> Any:
        assert asked.setdefault("noise", (seed, length, batch.samples)) == (seed, length, batch.samples)
        texts = {"before": BEFORE, "after": AFTER}[policy.name]
        sequences = f"responses of {policy.name}"
        return SimpleNamespace(prompts=batch.prompts, texts=texts, sequences=sequences, mask=MASKS[policy.name])

    def stream(file: Path, tokenizer: Any, max_length: int) -> Any:
        del tokenizer
        assert (file.name, max_length) == ("heldout.jsonl", 256)
        return SimpleNamespace(first=lambda size: PromptBatch([*"pqrs"[:size]], [[1]] * size, list(range(size))))

    monkeypatch.setattr(evaluate, "load_frozen", lambda _: (policy("before"), policy("after"), Reward()))
    monkeypatch.setattr(evaluate, "roll_out", roll_out)
    monkeypatch.setattr(evaluate, "PromptStream", stream)
    judge = tmp_path / "judge"
    judge.mkdir()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice([*WORTH, "a", "film", "story", "an"], 4)) for _ in range(60)]
    rows = [{"text": text, "rating": sum(WORTH.get(word, 0.0) for word in text.split())} for text in texts]
    (judge / "ratings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = {"prompts": tmp_path, "judge": judge}
    settings = EvaluateSettings(prompts=3)
    return Context("evaluate", "key", settings, inputs, tmp_path, tmp_path, tmp_path)


def test_every_figure_is_that_of_its_policy(context: Context[EvaluateSettings]) -> None:
    """Scores, lengths and bigrams of each; KL from before to after on the tuned policy's real tokens alone."""
    metrics = evaluate.run(context)
    assert metrics["score/before"] == pytest.approx((-1 - 2 - 2) / 3)
    assert metrics["score/after"] == pytest.approx((2 + 2 + 1) / 3)
    # By response: 0.5 + 1, 0.5 + 0.5 + 0, 2; what lies on padding is out.
    assert metrics["kl/response"] == pytest.approx((1.5 + 1.0 + 2.0) / 3)
    assert (metrics["length/before"], metrics["length/after"]) == pytest.approx((7 / 3, 2))
    assert metrics["distinct_2/before"] == distinct_ngrams(BEFORE, 2) == pytest.approx(5 / 7)
    assert metrics["distinct_2/after"] == distinct_ngrams(AFTER, 2) == pytest.approx(6 / 8)
    samples = [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in samples] == ["p", "q", "r"]
    assert [(row["before"], row["after"]) for row in samples] == list(zip(BEFORE, AFTER, strict=True))
    assert [row["score_before"] for row in samples] == [-1, -2, -2]
    assert [row["score_after"] for row in samples] == [2, 2, 1]
    assert [row["kl"] for row in samples] == [1.5, 1.0, 2.0]


def test_the_judges_difference_is_after_less_before_with_its_interval(context: Context[EvaluateSettings]) -> None:
    """The judge that the ratings fit, prompt by prompt; without a judge nothing of it is there."""
    metrics = evaluate.run(context)
    judge = evaluate.evaluation.load_judge(context.inputs["judge"])
    before, after = judge.rate(BEFORE), judge.rate(AFTER)
    interval = paired_interval(before, after)
    assert metrics["judge/before"] == pytest.approx(before.mean())
    assert metrics["judge/after"] == pytest.approx(after.mean())
    assert metrics["judge/delta"] == pytest.approx((after - before).mean())
    assert metrics["judge/delta"] > 1
    assert (metrics["judge/delta_low"], metrics["judge/delta_high"]) == (interval.low, interval.high)
    assert interval.low < metrics["judge/delta"] < interval.high
    # Student's t of three values: 4.303 standard errors.
    width = 4.303 * after.std(ddof=1) / 3**0.5
    assert metrics["judge/after_high"] == pytest.approx(after.mean() + width, rel=1e-3)
    assert metrics["judge/after_low"] == pytest.approx(after.mean() - width, rel=1e-3)
    scores = (metrics["score/delta_low"], metrics["score/delta"], metrics["score/delta_high"])
    assert scores == pytest.approx((10 / 3 - 4.303 / 3, 10 / 3, 10 / 3 + 4.303 / 3), rel=1e-3)
    without = context.__class__(
        "evaluate",
        "key",
        EvaluateSettings(prompts=3, judge=False),
        context.inputs,
        context.output,
        context.output,
        context.output,
    )
    assert {name for name in metrics if not name.startswith("judge/")} == set(evaluate.run(without))


def test_the_user_sees_which_of_the_two_policies_answers(
    context: Context[EvaluateSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is half of the work."""
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Context, "progress", lambda _, *said: seen.append(said))
    evaluate.run(context)
    assert seen == [("the policy before", 0, 2), ("the policy after", 1, 2)]
