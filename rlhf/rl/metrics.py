"""PPO's metrics, by the names that TRL's PPO gave the field. docs/ppo.md says what each means.

Shapes: scores and ended ``[sample]``; everything else ``[sample, time]`` with the mask True on real tokens.
"""

import math
from collections.abc import Sequence

from torch import Tensor

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


def update_metrics(policy: Sequence[PolicySums], value: Sequence[ValueSums]) -> dict[str, float]:
    """Measure an iteration's updates; means are over the real tokens of all its minibatches.

    policy  empty while the value model warms up
    """
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
