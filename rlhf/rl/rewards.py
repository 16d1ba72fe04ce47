"""From one score a response to a reward for each token.

Shapes: scores ``[batch]``; log-probabilities and rewards ``[batch, time]``, right-padded, the mask True on real tokens
(see :mod:`rlhf.rl.masks`). Log-probabilities and KL are in nats.
"""

import torch
from torch import Tensor

from rlhf.rl.kl import Estimator, kl_estimates
from rlhf.rl.masks import last_token_mask, masked


def shaped_scores(
    scores: Tensor, ended: Tensor, *, clip: float | None, missing_eos_penalty: float, missing_eos_score: float | None
) -> Tensor:
    """Clip the scores ``[batch]``, and punish responses that the length limit cut off: it teaches to stop.

    Clipping comes first, so that the punishment always counts. It is Huang et al. 2024 (arXiv:2403.17031), detail 13,
    "the EOS trick".

    ended                bool ``[batch]``, True where the response holds an EOS
    clip                 largest distance of a score from 0; None for any
    missing_eos_penalty  subtracted from the score of a response without EOS
    missing_eos_score    replaces it instead, unless None
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
    mask                ``[batch, time]``; a row with no real token has no reward at all, so it can fill up a batch
    kl_coef             β, in units of the score per nat, at least 0
    returns             ``[batch, time]``, 0 on padding
    """
    penalties = -kl_coef * kl_estimates(logprobs, reference_logprobs, mask, estimator)
    return penalties + masked(scores.unsqueeze(-1).expand(mask.shape), last_token_mask(mask))
