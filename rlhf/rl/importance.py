"""Importance weights for responses that another distribution sampled than the policy whose gradient is taken."""

from torch import Tensor

from rlhf.rl.masks import masked


def truncated_importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Weigh each token by how likely it was for the policy as trained, against the program that sampled it:

        w_t = min( exp(logprob - sampler_logprob), cap )

    A policy loss whose advantages are multiplied by w estimates, up to the cap, the loss over the trained policy's own
    samples: truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
    RL training"). The cap bounds the variance.

    logprobs          ``[batch, time]``, by the trained policy before the updates, nats; no gradient passes through
    sampler_logprobs  ``[batch, time]``, of the same tokens as they were sampled
    mask              ``[batch, time]``, True on real tokens
    cap               above 0; 2 is usual
    returns           ``[batch, time]``, 1 on padding where the cap allows
    """
    return masked((logprobs - sampler_logprobs).detach(), mask).exp().clamp(max=cap)
