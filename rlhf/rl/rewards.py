"""From one score a response to a reward for each token.

Shapes: scores ``[batch]``; log-probabilities and rewards ``[batch, time]``, right-padded, the mask True on real tokens
(see :mod:`rlhf.rl.masks`). Log-probabilities and KL are in nats.
"""

import torch
from torch import Tensor

from rlhf.rl.masks import last_token_mask, masked


def scores_with_eos_penalty(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """Subtract ``penalty`` from the scores ``[batch]`` of responses that the length limit cut off.

    It teaches the policy to stop (Huang et al. 2024, arXiv:2403.17031, "the EOS trick").

    ended    bool ``[batch]``, True where the response holds an EOS
    penalty  in units of the score; 0 changes nothing
    """
    return torch.where(ended, scores, scores - penalty)


def kl_estimates(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Per-token estimates ``[batch, time]`` of the KL divergence from the policy to the reference, 0 on padding.

        k1_t = log policy(y_t | x, y_<t) - log reference(y_t | x, y_<t)

    Unbiased for responses sampled from the policy; a single estimate may be negative (Schulman 2020, "Approximating KL
    Divergence"). Its sum along a row estimates the response's KL in nats.
    """
    return masked(logprobs, mask) - masked(reference_logprobs, mask)


def kl_penalised_rewards(
    scores: Tensor, logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """Spread Eq. 2 of Ziegler et al. 2019 (arXiv:1909.08593) over tokens, as Ouyang et al. 2022 (arXiv:2203.02155) do:

        r_t = -kl_coef * k1_t, plus the score at the last real token

    so that a row sums to ``score - kl_coef * log(policy(y | x) / reference(y | x))``, the reward of Stiennon et al.
    2020 (arXiv:2009.01325), section 3.4.

    scores              ``[batch]``, the reward model's
    logprobs            ``[batch, time]``, sampled tokens under the policy that sampled them
    reference_logprobs  ``[batch, time]``, the same tokens under the reference
    mask                ``[batch, time]``; a row with no real token has no reward at all, so it can fill up a batch
    kl_coef             β, in units of the score per nat, at least 0
    returns             ``[batch, time]``, 0 on padding
    """
    penalties = -kl_coef * kl_estimates(logprobs, reference_logprobs, mask)
    return penalties + masked(scores.unsqueeze(-1).expand(mask.shape), last_token_mask(mask))
