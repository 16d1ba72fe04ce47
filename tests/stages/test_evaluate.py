"""The figures of stage evaluate, with policies and rewards whose every number is known."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf.attempt.context import Context
from rlhf.config.stages import EvaluateSettings
from rlhf.models import evaluation
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

    monkeypatch.setattr(evaluate, "load_frozen", lambda _, role: policy(role))
    monkeypatch.setattr(evaluate, "load_rewards", lambda *_: Reward())
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


Written = dict[str, list[str]]
"""By policy: the responses by sample, three prompts in turn."""
MANY: Written = {
    "before": ["dull", "awful", "moving", "wonderful", "dull", "dull", "dull", "moving", "dull"],
    "ppo": ["wonderful", "dull", "moving", "wonderful", "dull", "moving"],
    "after": ["wonderful", "dull", "moving"],
    "dpo": ["moving", "moving", "moving", "awful", "moving", "wonderful"],
}


def compared(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[dict[str, float], list[dict[str, Any]], list[tuple[str, list[int]]]]:
    """The metrics and samples of policies that answer sample s with their s-th text, and who was asked for which."""
    asked: list[tuple[str, list[int]]] = []

    def policy(name: str) -> Any:
        # Each token is a third likelier to the policies after.
        logprobs = lambda sequences: torch.full((3, 2), -1.0 if name == "before" else -0.5)  # noqa: E731
        return SimpleNamespace(name=name, tokenizer=None, logprobs=logprobs)

    def roll_out(policy: Any, batch: PromptBatch, seed: int, length: int) -> Any:
        del seed, length
        asked.append((policy.name, batch.samples))
        texts = [MANY[policy.name][sample] for sample in batch.samples]
        return SimpleNamespace(prompts=batch.prompts, texts=texts, sequences=None, mask=torch.ones(3, 2).bool())

    stream = SimpleNamespace(first=lambda size: PromptBatch([*"pqr"], [[1]] * 3, [0, 1, 2]))
    monkeypatch.setattr(evaluate, "load_frozen", lambda _, role: policy(role))
    monkeypatch.setattr(evaluate, "load_rewards", lambda *_: Reward())
    monkeypatch.setattr(evaluate, "roll_out", roll_out)
    monkeypatch.setattr(evaluate, "PromptStream", lambda *_: stream)
    given = EvaluateSettings.model_validate({"judge": False, "prompts": 3, "policies": ["ppo", "dpo"]} | settings)
    metrics = evaluate.run(Context("evaluate", "key", given, {"prompts": folder}, folder, folder, folder))
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return metrics, rows, asked


def test_several_policies_are_compared_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same prompts and random numbers, prompt by prompt, with the KL of each; a tie is half a win."""
    metrics, rows, asked = compared(tmp_path, monkeypatch, responses=2)
    assert asked == [(name, samples) for name in ("before", "ppo", "dpo") for samples in ([0, 1, 2], [3, 4, 5])]
    scores = {
        name: np.array([[WORTH[texts[p + 3 * r]] for r in (0, 1)] for p in range(3)])
        for name, texts in MANY.items()
        if name != "after"
    }
    for name, of_policy in scores.items():
        assert metrics[f"score/{name}"] == pytest.approx(of_policy.mean())
    assert metrics["score/dpo_delta"] == pytest.approx((scores["dpo"] - scores["before"]).mean())
    interval = paired_interval(scores["before"].mean(1), scores["dpo"].mean(1))
    assert metrics["score/dpo_delta_low"] == pytest.approx(interval.low)
    wins = ((scores["dpo"] > scores["ppo"]) + 0.5 * (scores["dpo"] == scores["ppo"])).mean()
    assert metrics["win/dpo_over_ppo"] == pytest.approx(wins)
    assert {name for name in metrics if name.startswith("win/") and name[-4:] not in ("_low", "high")} == {
        "win/ppo_over_before",
        "win/dpo_over_before",
        "win/dpo_over_ppo",
    }
    assert metrics["kl/ppo"] == metrics["kl/dpo"] == pytest.approx(1.0)
    assert "kl/before" not in metrics
    assert [(row["policy"], row["prompt"], row["before"], row["after"]) for row in rows[4:8]] == [
        ("ppo", "q", "dull", "dull"),
        ("ppo", "r", "dull", "moving"),
        ("dpo", "p", "dull", "moving"),
        ("dpo", "q", "awful", "moving"),
    ]


def test_the_best_of_n_is_the_best_by_the_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the policy before, whose own response is the first of the n; one response to each prompt is held at a time."""
    metrics, rows, asked = compared(tmp_path, monkeypatch, policies=["ppo"], best_of_n=3)
    assert asked == [
        ("before", [0, 1, 2]),
        ("after", [0, 1, 2]),
        ("before", [0, 1, 2]),
        ("before", [3, 4, 5]),
        ("before", [6, 7, 8]),
    ]
    best = [row for row in rows if row.get("policy") == "best_of_3"]
    assert [row["after"] for row in best] == ["wonderful", "moving", "moving"]
    assert [row["score_after"] for row in best] == [2, 1, 1]
    assert metrics["score/best_of_3"] == pytest.approx(4 / 3)
    assert metrics["score/best_of_3_delta"] == pytest.approx(4 / 3 - (-1 - 2 + 1) / 3)
    assert metrics["kl/best_of_3"] == pytest.approx(np.log(3) - 2 / 3)
    assert "score/delta" in metrics


def test_the_kl_of_best_of_n_is_within_its_bound() -> None:
    """Of a policy over seven responses, whose best of n is known exactly; at it where there are very many."""
    p = np.array([0.3, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05])  # from the worst response to the best
    for n in (2, 4, 16):
        below = np.concatenate([[0], np.cumsum(p)])
        best = below[1:] ** n - below[:-1] ** n
        assert 0 < (best * np.log(best / p)).sum() <= np.log(n) - (n - 1) / n
    fine = np.full(10_000, 1e-4)
    below = np.concatenate([[0], np.cumsum(fine)])
    best = below[1:] ** 4 - below[:-1] ** 4
    assert (best * np.log(best / fine)).sum() == pytest.approx(np.log(4) - 3 / 4, abs=1e-3)


def test_the_intervals_of_all_win_rates_hold_together() -> None:
    """In 95 % of evaluations, whatever the number of policies; each alone at 95 % would be in some 80 %."""
    rng, held, repetitions = np.random.default_rng(0), 0, 400
    for _ in range(repetitions):
        values = {name: rng.normal(size=(60, 1)) for name in "abcd"}
        rates = evaluation.win_rates(values)
        names = [name for name in rates if not name.endswith(("_low", "_high"))]
        assert len(names) == 6
        held += all(rates[f"{name}_low"] <= 0.5 <= rates[f"{name}_high"] for name in names)
    assert held / repetitions >= 0.94


@pytest.mark.parametrize("policies", [["ppo", "ppo"], ["before", "ppo"], ["reward-like", "ppo"], []])
def test_policies_whose_names_mean_something_else_are_refused(policies: list[str]) -> None:
    """Each is a role and a name of figures."""
    with pytest.raises(ValidationError):
        EvaluateSettings(policies=policies)
