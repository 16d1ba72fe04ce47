"""Policies on held-out prompts, by the reward model and by a judge outside of training.

In: the policy before its last stage, one policy after or several, the reward model, held-out prompts, ratings for the
judge.  Out: every sample with its scores.
All policies answer the same prompts with the same random numbers. KL is the mean over a policy's responses of
log π(y | x) - log π_before(y | x), an unbiased estimate of KL(π ‖ before) in nats a response. Best of n is the policy
before, of whose n responses the rewards pick the best; its KL is at most log n - (n - 1) / n (Beirami et al. 2024,
arXiv:2401.01879).
Shapes: [P, R], P prompts with R responses each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rlhf.attempt.context import Context
from rlhf.config.stages import EvaluateSettings
from rlhf.models import evaluation
from rlhf.models.micro_batches import MicroBatch
from rlhf.rewards import Rewards
from rlhf.rl.kl import kl_estimates
from rlhf.rollout.prompts import PromptBatch, PromptStream
from rlhf.rollout.rollout import Rollout, roll_out
from rlhf.training.loading import load_frozen, load_rewards
from rlhf.training.policy import FrozenPolicy


@dataclass(frozen=True)
class Answers:
    """What a policy, or the best of n, wrote."""

    texts: list[list[str]]
    """``[R][P]``"""
    scores: Tensor
    """``[P, R]``, by the rewards."""
    lengths: Tensor
    """``[P, R]``, in tokens, EOS included."""
    kl: Tensor | None = None
    """``[P, R]``, nats; None where it is not estimated."""

    @classmethod
    def stacked(cls, parts: Sequence["Answers"]) -> "Answers":
        """Join the answers of several responses to each prompt."""
        scores, lengths = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("scores", "lengths"))
        kl = [part.kl for part in parts if part.kl is not None]
        return cls([part.texts[0] for part in parts], scores, lengths, torch.cat(kl, dim=1) if kl else None)


def run(context: Context[EvaluateSettings]) -> dict[str, float]:
    """Compare the policies; the final metrics are those of docs/evaluate.md."""
    settings = context.settings
    before = load_frozen(context, "before")
    reward = load_rewards(context, MicroBatch(settings.micro_batch_size))
    prompts = PromptStream(context.inputs["prompts"] / "heldout.jsonl", before.tokenizer, settings.max_prompt_length)
    batch = prompts.first(settings.prompts)

    names = ["before", *settings.compared]
    answers: dict[str, Answers] = {}
    for number, name in enumerate(names):
        context.progress(f"the policy {name}", number, len(names))
        # No name for it here: the next one is loaded when this one is gone.
        answers[name] = answered(
            settings, batch, before if name == "before" else load_frozen(context, name), before, reward
        )
    if settings.best_of_n:
        answers[f"best_of_{settings.best_of_n}"] = best_of(settings.best_of_n, context, batch, before, reward)

    scores = {name: one.scores.double().numpy() for name, one in answers.items()}
    metrics = evaluation.side_by_side("score", scores)
    for name, one in answers.items():
        metrics[f"length/{name}"] = one.lengths.float().mean().item()
        if one.kl is not None:
            metrics["kl/response" if name == "after" else f"kl/{name}"] = one.kl.mean().item()
    if n := settings.best_of_n:
        metrics[f"kl/best_of_{n}"] = math.log(n) - (n - 1) / n
    metrics |= evaluation.diversity({name: list(chain(*one.texts)) for name, one in answers.items()})
    liked = scores
    if settings.judge:
        judge = evaluation.load_judge(context.inputs["judge"])
        liked = {name: evaluation.ratings(judge, one.texts) for name, one in answers.items()}
        metrics |= evaluation.side_by_side("judge", liked)
    metrics |= evaluation.win_rates(liked)
    evaluation.write_samples(context.output / "samples.jsonl", samples(batch, answers))
    return metrics


def answered(
    settings: EvaluateSettings, batch: PromptBatch, policy: FrozenPolicy, before: FrozenPolicy, reward: Rewards
) -> Answers:
    """Have a policy answer all prompts, and measure how far its answers are from the policy before. A collective."""
    parts: list[Answers] = []
    for number in range(settings.responses):
        rollout, answers = sampled(settings, batch, number, policy, reward)
        if policy is not before:
            logprobs = (one.logprobs(rollout.sequences) for one in (policy, before))
            answers = replace(answers, kl=kl_estimates(*logprobs, rollout.mask).sum(-1, keepdim=True))
        parts.append(answers)
    return Answers.stacked(parts)


def best_of(
    n: int, context: Context[EvaluateSettings], batch: PromptBatch, before: FrozenPolicy, reward: Rewards
) -> Answers:
    """Keep of n responses to each prompt the one with the highest score, the first of equal ones. A collective.

    One response to each prompt is held at a time, whatever n is. With ``responses`` above 1 there are as many best
    ones, each of n responses of its own.
    """
    settings, parts = context.settings, list[Answers]()
    for number in range(settings.responses):
        _, best = sampled(settings, batch, number, before, reward)
        for draw in range(1, n):
            context.progress(f"best of {n}", number * n + draw, settings.responses * n)
            _, more = sampled(settings, batch, number + draw * settings.responses, before, reward)
            wins = more.scores > best.scores
            sides = zip(more.texts[0], best.texts[0], wins.flatten().tolist(), strict=True)
            best = Answers(
                [[new if higher else old for new, old, higher in sides]],
                torch.where(wins, more.scores, best.scores),
                torch.where(wins, more.lengths, best.lengths),
            )
        parts.append(best)
    return Answers.stacked(parts)


def sampled(
    settings: EvaluateSettings, batch: PromptBatch, number: int, policy: FrozenPolicy, reward: Rewards
) -> tuple[Rollout, Answers]:
    """Return a policy's responses, one a prompt, with the random numbers of that number. A collective."""
    shifted = [sample + number * len(batch.samples) for sample in batch.samples]
    rollout = roll_out(policy, replace(batch, samples=shifted), settings.seed, settings.sampling.max_new_tokens)
    scores, lengths = reward.score(rollout.prompts, rollout.texts), rollout.mask.sum(-1)
    return rollout, Answers([rollout.texts], scores[:, None], lengths[:, None])


def samples(batch: PromptBatch, answers: dict[str, Answers]) -> list[dict[str, Any]]:
    """Return a row for each policy after, prompt and response, beside that of the policy before."""
    before = answers["before"]
    return [
        ({} if name == "after" else {"policy": name})
        | {
            "prompt": prompt,
            "before": before.texts[number][place],
            "after": one.texts[number][place],
            "score_before": before.scores[place, number].item(),
            "score_after": one.scores[place, number].item(),
        }
        | ({} if one.kl is None else {"kl": one.kl[place, number].item()})
        for name, one in answers.items()
        if name != "before"
        for number in range(before.scores.shape[1])
        for place, prompt in enumerate(batch.prompts)
    ]
