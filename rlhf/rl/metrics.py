"""PPO's metrics, by the names that TRL's PPO gave the field. docs/ppo.md says what each means.

Shapes: scores and ended ``[sample]``; everything else ``[sample, time]`` with the mask True on real tokens.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from rlhf.config.training import Precision
from rlhf.errors import DivergedError
from rlhf.rl.losses import PolicySums, ValueSums
from rlhf.rl.masks import masked_mean, masked_sum
from rlhf.rl.rewards import kl_estimates


def rollout_metrics(
    scores: Tensor,
    ended: Tensor,
    logprobs: Tensor,
    reference_logprobs: Tensor,
    entropies: Tensor,
    mask: Tensor,
    kl_coef: float,
) -> dict[str, float]:
    """What an iteration's responses were like before its updates; means over responses, unless said otherwise."""
    kl = kl_estimates(logprobs, reference_logprobs, mask).sum(-1)
    lengths = mask.sum(-1).float()
    return {
        "objective/kl": kl.mean().item(),
        "objective/entropy": masked_sum(-logprobs, mask, dim=-1).mean().item(),
        "objective/non_score_reward": (-kl_coef * kl).mean().item(),
        "objective/rlhf_reward": (scores - kl_coef * kl).mean().item(),
        "objective/scores": scores.mean().item(),
        "policy/entropy_avg": masked_mean(entropies, mask).item(),
        "val/num_eos_tokens": float(ended.sum().item()),
        "length/mean": lengths.mean().item(),
        "length/max": lengths.max().item(),
        "kl/coef": kl_coef,
    }


def update_metrics(policy: Sequence[PolicySums], value: Sequence[ValueSums]) -> dict[str, float]:
    """What an iteration's updates did; means over the real tokens of all its minibatches."""
    policies, values = _total(policy), _total(value)
    return {
        "loss/policy_avg": policies.mean_loss.item(),
        "loss/value_avg": values.mean_loss.item(),
        "policy/approxkl_avg": policies.approximate_kl.item(),
        "policy/clipfrac_avg": policies.clip_fraction.item(),
        "val/clipfrac_avg": values.clip_fraction.item(),
        "val/ratio": policies.mean_ratio.item(),
        "val/ratio_var": policies.ratio_variance.item(),
        "policy/approxkl_first": policy[0].approximate_kl.item(),
    }


Sums = TypeVar("Sums", PolicySums, ValueSums)


def _total(parts: Sequence[Sums]) -> Sums:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


# Where old and new log-probabilities come from the same weights, they differ by rounding alone. Half the squared
# difference stays below these, nats² a token: measured 1e-14 in fp32, and 1.5e-4 in bf16, which has three digits.
FIRST_KL_BOUNDS: Mapping[Precision, float] = {"fp32": 5e-9, "bf16": 1e-3}


def first_ratio_alarm(metrics: Mapping[str, float], precision: Precision) -> str | None:
    """What to tell the user where the ratio was not 1 on an iteration's first minibatch; None where it was.

    Huang et al. 2024 (arXiv:2403.17031): a ratio off 1 before any update means that the two forward passes differ, by
    dropout, padding, temperature or precision, and that PPO optimises something else than it says.
    """
    found, bound = metrics["policy/approxkl_first"], FIRST_KL_BOUNDS[precision]
    if found <= bound:
        return None
    return (
        f"the policy's ratio was not 1 before its first update: policy/approxkl_first is {found:.2g}, above {bound:g}"
    )


def check_health(metrics: dict[str, float], kl_limit: float) -> None:
    """Stop a run that can no longer be saved.

    Raises:
        DivergedError: the mean KL left ``kl_limit`` nats a response, or responses collapsed to a lone EOS.
    """
    if not metrics["objective/kl"] <= kl_limit:
        raise DivergedError(
            f"the policy drifted {metrics['objective/kl']:.1f} nats a response from its reference; "
            f"the limit is {kl_limit:g}",
            "objective/kl",
            "raise ppo.kl.coef or lower ppo.policy_learning_rate; ppo.kl.limit is the limit",
        )
    if metrics["length/mean"] < 1.5 and metrics["length/max"] > 0:
        raise DivergedError(
            "the policy collapsed: most responses are a lone EOS",
            "length/mean",
            "lower ppo.policy_learning_rate, raise ppo.kl.coef, or look at what the reward model likes",
        )
