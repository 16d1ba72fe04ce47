"""Metrics of policy-gradient stages by TRL's names (docs/ppo.md), warnings about them, and checks that stop a run.

Shapes: scores and ended ``[sample]``; everything else ``[sample, time]`` with the mask True on real tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.config.policy_gradient import PolicyGradientSettings
from rlhf.config.stages import Precision
from rlhf.errors import DivergedError
from rlhf.rl.advantages import equal_groups
from rlhf.rl.kl import Estimator, kl_estimates
from rlhf.rl.losses import PolicySums, ValueSums
from rlhf.rl.masks import masked, masked_mean, masked_sum


def rollout_metrics(
    scores: Tensor,
    ended: Tensor,
    logprobs: Tensor,
    reference_logprobs: Tensor,
    entropies: Tensor,
    mask: Tensor,
    kl_coef: float,
    estimator: Estimator = "k1",
) -> dict[str, float]:
    """Measure an iteration's responses before its updates; means are over responses.

    kl_coef    β of the penalty in the reward; 0 where the reward has none
    estimator  of that penalty; ``objective/kl`` is always k1's
    """
    kl = kl_estimates(logprobs, reference_logprobs, mask).sum(-1)
    penalty = -kl_coef * kl_estimates(logprobs, reference_logprobs, mask, estimator).sum(-1)
    lengths = mask.sum(-1).float()
    return {
        "objective/kl": kl.mean().item(),
        "objective/kl_stderr": kl.std().item() / math.sqrt(len(kl)),
        "objective/entropy": masked_sum(-logprobs, mask, dim=-1).mean().item(),
        "objective/non_score_reward": penalty.mean().item(),
        "objective/rlhf_reward": (scores + penalty).mean().item(),
        "objective/scores": scores.mean().item(),
        "policy/entropy_avg": masked_mean(entropies, mask).item(),
        "val/num_eos_tokens": float(ended.sum().item()),
        "length/mean": lengths.mean().item(),
        "length/max": lengths.max().item(),
    }


def group_metrics(rewards: Tensor, ended: Tensor, size: int) -> dict[str, float]:
    """Measure groups of ``size`` responses to a prompt, which are next to each other.

    ``groups/without_gradient`` is the share of groups whose rewards are all equal, so that no advantage differs from 0;
    ``groups/none_ended`` the share in which every response was cut off; ``groups/deviation`` the mean standard
    deviation of a group's rewards.

    rewards  ``[sample]``, of whole responses, as the advantages are computed from
    """
    grouped = rewards.double().view(-1, size)
    return {
        "groups/without_gradient": equal_groups(rewards, size).double().mean().item(),
        "groups/none_ended": (~ended.view(-1, size)).all(-1).double().mean().item(),
        "groups/deviation": grouped.std(-1).mean().item(),
    }


def mismatch_metrics(sampler_logprobs: Tensor, logprobs: Tensor, mask: Tensor) -> dict[str, float]:
    """Measure the distance of the distribution that was sampled from to the policy that is trained.

    ``rollout/kl_to_trained`` is the mean over responses of the sum over tokens of log sampler - log trained, an
    unbiased estimate of KL(sampler || trained) in nats a response; ``rollout/largest_gap`` the largest difference of a
    single token's two log-probabilities, nats.

    sampler_logprobs  ``[sample, time]``, of the tokens as they were sampled
    logprobs          ``[sample, time]``, of the same tokens by the trained policy, before any update
    """
    gaps = masked(sampler_logprobs - logprobs, mask).double()
    return {"rollout/kl_to_trained": gaps.sum(-1).mean().item(), "rollout/largest_gap": gaps.abs().max().item()}


def update_metrics(policy: Sequence[PolicySums], value: Sequence[ValueSums] = ()) -> dict[str, float]:
    """Measure an iteration's updates; means are over the real tokens of all its minibatches.

    policy  empty while the value model warms up
    value   empty without a value model
    """
    metrics: dict[str, float] = {}
    if value:
        values = sum(value[1:], start=value[0])
        metrics = {"loss/value_avg": values.mean_loss.item(), "val/clipfrac_avg": values.clip_fraction.item()}
    if not policy:
        return metrics | {"policy/updates": 0.0}
    policies = sum(policy[1:], start=policy[0])
    return metrics | {
        "loss/policy_avg": policies.mean_loss.item(),
        "policy/approxkl_avg": policies.approximate_kl.item(),
        "policy/clipfrac_avg": policies.clip_fraction.item(),
        "val/ratio": policies.mean_ratio.item(),
        "val/ratio_var": policies.ratio_variance.item(),
        "policy/approxkl_first": policy[0].approximate_kl.item(),
        "policy/updates": float(len(policy)),
        "loss/kl_avg": (policies.kl_term / policies.tokens).item(),
        "loss/ptx_avg": policies.demonstrations.item() / len(policy),
        "loss/entropy_avg": (policies.entropy_term / policies.tokens).item(),
    }


Metrics = Mapping[str, float]

# Old and new log-probabilities of the same weights differ by rounding alone. Half the squared difference stays below
# these, nats² a token: measured 1e-14 in fp32, and up to 1.6e-3 in bf16, which has three digits.
FIRST_KL_BOUNDS: Mapping[Precision, float] = {"fp32": 5e-9, "bf16": 5e-3}

# Log-probabilities of a sampler with the trained weights differ by rounding alone. The mean difference, nats a token,
# stays below these: python -m benchmarks.mismatch measured up to 4e-8 in fp32 and 1.3e-3 in bf16, on a CPU.
SAMPLER_KL_BOUNDS: Mapping[Precision, float] = {"fp32": 1e-5, "bf16": 1e-2}


ALARMS = ("ratio", "sampler", "negative_kl", "eos", "length", "entropy", "score_range")


@dataclass(frozen=True)
class Watched:
    """The values that alarms compare an iteration with."""

    first: Metrics
    """The first iteration's metrics."""
    precision: Precision
    max_new_tokens: int
    rollouts: int

    @classmethod
    def of(cls, settings: PolicyGradientSettings, first: Metrics) -> "Watched":
        """Take the values from a run's settings."""
        return cls(first, settings.precision, settings.sampling.max_new_tokens, settings.rollouts)


def alarms(now: Metrics, watched: Watched) -> dict[str, str]:
    """Return a line for the user on each thing wrong with an iteration, by the name of its metric ``alarm/<name>``."""
    return _mismatches(now, watched) | _declines(now, watched)


def alarm_metrics(raised: Mapping[str, str]) -> dict[str, float]:
    """Return ``alarm/<name>``: 1 where it was raised, otherwise 0."""
    return {f"alarm/{name}": float(name in raised) for name in ALARMS}


def _mismatches(now: Metrics, watched: Watched) -> dict[str, str]:
    """Compare log-probabilities that should be of one distribution."""
    raised: dict[str, str] = {}
    # Huang et al. 2024 (arXiv:2403.17031): a ratio off 1 before any update means that the two forward passes differ, by
    # dropout, padding, temperature or precision, and that PPO optimises something else than it says.
    approximate_kl, bound = now.get("policy/approxkl_first", 0.0), FIRST_KL_BOUNDS[watched.precision]
    if not approximate_kl <= bound:
        raised["ratio"] = (
            f"the policy's ratio was not 1 before its first update: policy/approxkl_first is {approximate_kl:.2g}, "
            f"above {bound:g}; old and new log-probabilities come from different computations"
        )
    # Either sign: the log-ratio's mean is a KL, which is not negative, only if the tokens were drawn from the sampler's
    # probabilities.
    kl, bound = now.get("rollout/kl_to_trained", 0.0), SAMPLER_KL_BOUNDS[watched.precision] * now["length/mean"]
    if not abs(kl) <= bound:
        raised["sampler"] = (
            f"the responses were not sampled from the policy that is trained: rollout/kl_to_trained is {kl:.2g} nats a "
            f"response, beyond {bound:.2g}, and rollout/largest_gap {now['rollout/largest_gap']:.2g} nats; "
            "if that cannot be mended, set importance_cap"
        )
    # k1 is unbiased for responses that really came from the policy: beyond noise, its mean cannot be negative.
    kl, noise = now["objective/kl"], now["objective/kl_stderr"]
    if kl < -max(4 * noise, 1e-3):
        raised["negative_kl"] = (
            f"the mean KL is negative beyond noise: objective/kl is {kl:.3g}, standard error {noise:.2g}; the "
            "responses were not sampled from the distribution that their log-probabilities are of"
        )
    return raised


def _declines(now: Metrics, watched: Watched) -> dict[str, str]:
    """Compare responses with those of the first iteration, and scores with the reward model's own data."""
    raised: dict[str, str] = {}
    rate, first = (row["val/num_eos_tokens"] / watched.rollouts for row in (now, watched.first))
    if not rate:
        raised["eos"] = (
            f"no response ends within {watched.max_new_tokens} tokens: the policy has not learned to end, or has no "
            "room to; train sft for longer on demonstrations that end, or raise sampling.max_new_tokens"
        )
    elif first >= 0.2 and rate <= 0.05:
        raised["eos"] = (
            f"responses no longer end: {rate:.0%} have an EOS, and {first:.0%} had at first; "
            "raise missing_eos_penalty or kl.coef"
        )
    share, first = (row["length/mean"] / watched.max_new_tokens for row in (now, watched.first))
    if share > 0.95 and first < 0.8:
        raised["length"] = (
            f"responses have grown to the limit: {now['length/mean']:.0f} of {watched.max_new_tokens} tokens on "
            f"average, and {watched.first['length/mean']:.0f} at first; length may be rewarded: raise kl.coef, look "
            "at samples"
        )
    entropy, first = now["policy/entropy_avg"], watched.first["policy/entropy_avg"]
    if first > 0.05 and entropy < first / 10:
        raised["entropy"] = (
            f"the policy's entropy collapsed from {first:.3g} to {entropy:.2g} nats a token: it gives nearly the same "
            "response to every prompt; lower policy_learning_rate, raise kl.coef, or set entropy_bonus"
        )
    share = now.get("score/out_of_range", 0.0)
    if share > 0.1:
        raised["score_range"] = (
            f"{share:.0%} of the scores lie outside the range of the reward model's own training data: it is guessing "
            "there; raise kl.coef, set score_clip, or stop earlier"
        )
    return raised


def out_of_range(scores: Tensor, low: float, high: float) -> dict[str, float]:
    """Return the share of scores ``[batch]`` outside ``[low, high]``, as a metric."""
    return {"score/out_of_range": ((scores < low) | (scores > high)).double().mean().item()}


def check_finite(mask: Tensor, **tensors: Tensor) -> None:
    """Stop before any update where a model returned a number that is not finite.

    mask     ``[batch, time]``, True on real tokens; values under padding may be anything
    tensors  by name, ``[batch]`` or ``[batch, time]``

    Raises:
        DivergedError: naming the tensor and the first row.
    """
    for name, tensor in tensors.items():
        fine = torch.isfinite(tensor) if tensor.dim() == 1 else (torch.isfinite(tensor) | ~mask).all(-1)
        if not fine.all():
            rows = (~fine).nonzero().flatten().tolist()
            raise DivergedError(
                f"{name} of {len(rows)} of {len(fine)} responses are not finite numbers; no update was made",
                f"response {rows[0]} of the iteration",
                "lower the learning rates; for scores, look at the reward",
            )


def check_health(metrics: Metrics, first: Metrics, kl_limit: float) -> None:
    """Stop a run that can no longer be saved.

    first  the first iteration's metrics: where responses were short from the start, short ones are no collapse

    Raises:
        DivergedError: the mean KL left ``kl_limit`` nats a response, or responses collapsed to a lone EOS.
    """
    kl = metrics["objective/kl"]
    if not kl <= kl_limit or math.isnan(kl):
        raise DivergedError(
            f"the policy drifted {kl:.1f} nats a response from its reference; the limit is {kl_limit:g}",
            "objective/kl",
            "raise kl.coef or lower policy_learning_rate; kl.limit is the limit",
        )
    if metrics["length/mean"] < min(1.5, first["length/mean"] / 2):
        raise DivergedError(
            "the policy collapsed: most responses are a lone EOS",
            "length/mean",
            "lower policy_learning_rate, raise kl.coef, or look at what the reward model likes",
        )
