"""What an iteration's metrics warn of, and when a run can no longer be saved. Pure functions of metrics."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.config.ppo import PpoSettings
from rlhf.config.stages import Precision
from rlhf.errors import DivergedError

Metrics = Mapping[str, float]

# Where old and new log-probabilities come from the same weights, they differ by rounding alone. Half the squared
# difference stays below these, nats² a token: measured 1e-14 in fp32, and up to 1.6e-3 in bf16, which has three digits.
FIRST_KL_BOUNDS: Mapping[Precision, float] = {"fp32": 5e-9, "bf16": 5e-3}

# Where the sampler has the trained weights, log-probabilities differ by rounding alone. The mean difference, nats a
# token, stays below these: python -m benchmarks.mismatch measured up to 4e-8 in fp32 and 1.3e-3 in bf16, on a CPU.
SAMPLER_KL_BOUNDS: Mapping[Precision, float] = {"fp32": 1e-5, "bf16": 1e-2}


@dataclass(frozen=True)
class Watched:
    """What alarms compare an iteration with."""

    first: Metrics
    """The first iteration's metrics."""
    precision: Precision
    max_new_tokens: int
    rollouts: int

    @classmethod
    def of(cls, settings: PpoSettings, first: Metrics) -> "Watched":
        """What a run's settings say."""
        return cls(first, settings.precision, settings.sampling.max_new_tokens, settings.rollouts)


def alarms(now: Metrics, watched: Watched) -> dict[str, str]:
    """What to tell the user about an iteration, by the name of its metric ``alarm/<name>``; empty where all is well."""
    found = {name: check(now, watched) for name, check in _CHECKS.items()}
    return {name: line for name, line in found.items() if line}


def alarm_metrics(raised: Mapping[str, str]) -> dict[str, float]:
    """``alarm/<name>``: 1 where it was raised, otherwise 0."""
    return {f"alarm/{name}": float(name in raised) for name in _CHECKS}


def _ratio(now: Metrics, watched: Watched) -> str | None:
    # Huang et al. 2024 (arXiv:2403.17031): a ratio off 1 before any update means that the two forward passes differ, by
    # dropout, padding, temperature or precision, and that PPO optimises something else than it says.
    found, bound = now.get("policy/approxkl_first", 0.0), FIRST_KL_BOUNDS[watched.precision]
    if found <= bound:
        return None
    return (
        f"the policy's ratio was not 1 before its first update: policy/approxkl_first is {found:.2g}, above "
        f"{bound:g}; old and new log-probabilities come from different computations"
    )


def _sampler(now: Metrics, watched: Watched) -> str | None:
    # Either sign: the log-ratio's mean is a KL, which is not negative, only if the tokens came from the sampler's
    # probabilities that it is taken of.
    kl, bound = now.get("rollout/kl_to_trained", 0.0), SAMPLER_KL_BOUNDS[watched.precision] * now["length/mean"]
    if abs(kl) <= bound:
        return None
    return (
        f"the responses were not sampled from the policy that is trained: rollout/kl_to_trained is {kl:.2g} nats a "
        f"response, beyond {bound:.2g}, and rollout/largest_gap {now['rollout/largest_gap']:.2g} nats; "
        "if that cannot be mended, set importance_cap"
    )


def _negative_kl(now: Metrics, _: Watched) -> str | None:
    # k1 is unbiased for responses that really came from the policy: beyond noise, its mean cannot be negative.
    kl, noise = now["objective/kl"], now["objective/kl_stderr"]
    if not kl < -max(4 * noise, 1e-3):
        return None
    return (
        f"the mean KL is negative beyond noise: objective/kl is {kl:.3g}, standard error {noise:.2g}; the responses "
        "were not sampled from the distribution that their log-probabilities are of"
    )


def _eos(now: Metrics, watched: Watched) -> str | None:
    rate, first = (row["val/num_eos_tokens"] / watched.rollouts for row in (now, watched.first))
    if not rate:
        return (
            f"no response ends within {watched.max_new_tokens} tokens: the policy has not learned to end, or has no "
            "room to; train sft for longer on demonstrations that end, or raise sampling.max_new_tokens"
        )
    if not (first >= 0.2 and rate <= 0.05):
        return None
    return (
        f"responses no longer end: {rate:.0%} have an EOS, and {first:.0%} had at first; "
        "raise missing_eos_penalty or kl.coef"
    )


def _length(now: Metrics, watched: Watched) -> str | None:
    share, first = (row["length/mean"] / watched.max_new_tokens for row in (now, watched.first))
    if not (share > 0.95 and first < 0.8):
        return None
    return (
        f"responses have grown to the limit: {now['length/mean']:.0f} of {watched.max_new_tokens} tokens on average, "
        f"and {watched.first['length/mean']:.0f} at first; length may be what pays: raise kl.coef, look at samples"
    )


def _entropy(now: Metrics, watched: Watched) -> str | None:
    entropy, first = now["policy/entropy_avg"], watched.first["policy/entropy_avg"]
    if not (first > 0.05 and entropy < first / 10):
        return None
    return (
        f"the policy's entropy collapsed from {first:.3g} to {entropy:.2g} nats a token: it says nearly the same to "
        "everyone; lower policy_learning_rate, raise kl.coef, or set entropy_bonus"
    )


def _score_range(now: Metrics, _: Watched) -> str | None:
    share = now.get("score/out_of_range", 0.0)
    if not share > 0.1:
        return None
    return (
        f"{share:.0%} of the scores lie outside the range of the reward model's own training data: it is guessing "
        "there; raise kl.coef, set score_clip, or stop earlier"
    )


_CHECKS: Mapping[str, Callable[[Metrics, Watched], str | None]] = {
    "ratio": _ratio,
    "sampler": _sampler,
    "negative_kl": _negative_kl,
    "eos": _eos,
    "length": _length,
    "entropy": _entropy,
    "score_range": _score_range,
}


def out_of_range(scores: Tensor, low: float, high: float) -> dict[str, float]:
    """The share of scores ``[batch]`` outside ``[low, high]``, as a metric."""
    return {"score/out_of_range": ((scores < low) | (scores > high)).double().mean().item()}


def check_finite(mask: Tensor, **tensors: Tensor) -> None:
    """Stop before any update where a model answered something that is no number.

    mask     ``[batch, time]``, True on real tokens; what lies under padding may be anything
    tensors  by name, ``[batch]`` or ``[batch, time]``

    Raises:
        DivergedError: naming the tensor and the first row.
    """
    for name, tensor in tensors.items():
        fine = torch.isfinite(tensor) if tensor.dim() == 1 else (torch.isfinite(tensor) | ~mask).all(-1)
        if not fine.all():
            rows = (~fine).nonzero().flatten().tolist()
            raise DivergedError(
                f"{name} of {len(rows)} of {len(fine)} responses are no finite numbers; no update was made of them",
                f"response {rows[0]} of the iteration",
                "lower the learning rates; where scores are at fault, look at the reward",
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
            "raise ppo.kl.coef or lower ppo.policy_learning_rate; ppo.kl.limit is the limit",
        )
    if metrics["length/mean"] < min(1.5, first["length/mean"] / 2):
        raise DivergedError(
            "the policy collapsed: most responses are a lone EOS",
            "length/mean",
            "lower ppo.policy_learning_rate, raise ppo.kl.coef, or look at what the reward model likes",
        )
