"""From one score a response to rewards for each token, returns and advantages, whitened over the global batch.

Shapes: scores ``[batch]``; log-probabilities and rewards ``[batch, time]``, right-padded, the mask True on real tokens
(see :mod:`rlhf.rl.masks`). Log-probabilities and KL are in nats.
"""

import torch
from torch import Tensor

from rlhf.config.grpo import Baseline, Deviation
from rlhf.rl.kl import Estimator, kl_estimates
from rlhf.rl.masks import last_token_mask, masked


def shaped_scores(
    scores: Tensor, ended: Tensor, *, clip: float | None, missing_eos_penalty: float, missing_eos_score: float | None
) -> Tensor:
    """Clip the scores ``[batch]``, then penalise responses that the length limit cut off, which teaches to stop.

    The penalty is Huang et al. 2024 (arXiv:2403.17031), detail 13, "the EOS trick".

    ended                bool ``[batch]``, True where the response holds an EOS
    clip                 largest distance of a score from 0, or None
    missing_eos_penalty  subtracted from the score of a response without EOS
    missing_eos_score    replaces that score instead, unless None
    """
    shaped = scores if clip is None else scores.clamp(-clip, clip)
    cut_off = shaped - missing_eos_penalty if missing_eos_score is None else torch.full_like(shaped, missing_eos_score)
    return torch.where(ended, shaped, cut_off)


def kl_penalised_rewards(
    scores: Tensor,
    logprobs: Tensor,
    reference_logprobs: Tensor,
    mask: Tensor,
    kl_coef: float,
    estimator: Estimator = "k1",
) -> Tensor:
    """Spread Eq. 2 of Ziegler et al. 2019 (arXiv:1909.08593) over tokens, as Ouyang et al. 2022 (arXiv:2203.02155) do:

        r_t = -kl_coef * k_t, plus the score at the last real token

    so that with k1 a row sums to ``score - kl_coef * log(policy(y | x) / reference(y | x))``, the reward of Stiennon et
    al. 2020 (arXiv:2009.01325), section 3.4.

    scores              ``[batch]``, the reward model's
    logprobs            ``[batch, time]``, sampled tokens under the policy that sampled them
    reference_logprobs  ``[batch, time]``, the same tokens under the reference
    mask                ``[batch, time]``; a row with no real token has no reward, so it can fill up a batch
    kl_coef             β, in units of the score per nat, at least 0
    returns             ``[batch, time]``, 0 on padding
    """
    penalties = -kl_coef * kl_estimates(logprobs, reference_logprobs, mask, estimator)
    return penalties + masked(scores.unsqueeze(-1).expand(mask.shape), last_token_mask(mask))


def soft_overlong_penalty(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """Return the penalty of Yu et al. 2025 (DAPO, arXiv:2503.14476), Eq. 13, ``[batch]`` in [-1, 0]:

        0 up to a length of longest - buffer, from there (longest - buffer - length) / buffer

    lengths  ``[batch]``, real tokens of each response, at most ``longest``
    buffer   tokens over which it grows, above 0
    """
    return -((lengths - (longest - buffer)).clamp(min=0) / buffer)


# Keeps the division by a group's deviation finite; TRL and verl add the same.
DEVIATION_FLOOR = 1e-4


def equal_groups(values: Tensor, size: int) -> Tensor:
    """Mark the groups of ``size`` responses whose values ``[sample]`` are all equal: bool ``[group]``."""
    grouped = values.view(-1, size)
    return (grouped == grouped[:, :1]).all(-1)


@torch.no_grad()
def group_advantages(rewards: Tensor, size: int, *, baseline: Baseline, deviation: Deviation) -> Tensor:
    """Compare each response with the others to its prompt, ``[sample]``; exactly 0 where a group's rewards are equal.

        A_i = (r_i - mean r) / (s + 1e-4)           baseline ``mean``: Shao et al. 2024 (arXiv:2402.03300), §4.1.2
        A_i = r_i - mean over j of r_j, j not i     baseline ``leave-one-out``, without deviation: Ahmadian et al. 2024
                                                    (arXiv:2402.14740), Eq. 8; G / (G - 1) times r_i - mean r

    s is the sample standard deviation (denominator G - 1) of the group's rewards, or with ``batch`` of all.

    rewards  ``[sample]``, of whole responses; those to a prompt are next to each other
    size     G, responses to a prompt, at least 2
    """
    # In float64 the mean of equal float32 numbers is that number.
    grouped = rewards.double().view(-1, size)
    advantages = grouped - grouped.mean(-1, keepdim=True)
    if baseline == "leave-one-out":
        advantages = advantages * (size / (size - 1))
    if deviation != "none":
        spread = grouped.std(-1, keepdim=True) if deviation == "group" else grouped.std()
        advantages = advantages / (spread + DEVIATION_FLOOR)
    return advantages.flatten().to(rewards.dtype)


# Keeps the division finite where all values are equal; lm-human-preferences and TRL add the same.
VARIANCE_FLOOR = 1e-8


@torch.no_grad()
def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Estimate advantages and returns: generalised advantage estimation, Schulman et al. 2015 (arXiv:1506.02438),
    Eqs. 11, 12 and 16.

        delta_t = r_t + discount * V_{t+1} - V_t
        A_t     = delta_t + discount * gae_lambda * A_{t+1}
        R_t     = A_t + V_t

    A response is a whole episode: V and A are 0 beyond its last real token, whether it ended in EOS or at the limit.

    rewards     ``[batch, time]``, the reward for emitting each token
    values      ``[batch, time]``, V_t, the value model's estimate before that token is emitted
    discount    in [0, 1]; 1 is usual for responses
    gae_lambda  in [0, 1]; 0.95 is usual. 1 gives returns without the value model's bias, 0 the one-step error
    returns     advantages and returns, each ``[batch, time]``, 0 on padding; constants without a gradient
    """
    rewards, values = masked(rewards, mask), masked(values, mask)
    advantages = torch.zeros_like(rewards + values)
    advantage = next_value = torch.zeros_like(advantages[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        # Padding comes first in this direction and is all zeros, so it adds no advantage.
        advantage = delta + discount * gae_lambda * advantage
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages, masked(advantages + values, mask)


@torch.no_grad()
def masked_moments(values: Tensor, mask: Tensor) -> Tensor:
    """Return ``[count, sum, sum of squares]`` over real tokens, in float64; the moments of parts add up."""
    real = masked(values, mask).double()
    return torch.stack([mask.sum().double(), real.sum(), real.square().sum()])


@torch.no_grad()
def whiten(values: Tensor, mask: Tensor, moments: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Shift and scale ``values`` to mean 0 and variance 1 over the tokens that ``moments`` counted.

        (x - mean) / sqrt(variance + 1e-8), plus the mean again unless ``shift_mean``

    The variance is the population's: its denominator counts the real tokens of the global batch, as in
    Ziegler et al. 2019 (arXiv:1909.08593; Huang et al. 2024, arXiv:2403.17031, on whitening). Rewards keep their mean.

    values   ``[batch, time]``
    moments  :func:`masked_moments`, added up over all ranks
    returns  ``[batch, time]`` in the type of ``values``, 0 on padding; a constant without a gradient
    """
    count, total, total_of_squares = moments.unbind()
    count = count.clamp(min=1)
    mean = total / count
    variance = (total_of_squares / count - mean.square()).clamp(min=0)
    whitened = (values - mean) * (variance + VARIANCE_FLOOR).rsqrt()
    return masked(whitened if shift_mean else whitened + mean, mask)
