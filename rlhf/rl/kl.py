"""Estimates of the KL divergence from the policy to its reference, and the coefficient that follows it.

Shapes: ``[batch, time]``, right-padded response tokens; the mask is True on real ones (see :mod:`rlhf.rl.masks`).
Log-probabilities and KL are in nats.
"""

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

from rlhf.rl.masks import masked

Estimator = Literal["k1", "k2", "k3"]

_ESTIMATES: Mapping[Estimator, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: log_ratio.square() / 2,
    "k3": lambda log_ratio: (-log_ratio).expm1() + log_ratio,
}

# How far the controller believes a single measurement: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.
LARGEST_ERROR = 0.2


def kl_estimates(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, estimator: Estimator = "k1") -> Tensor:
    """Per-token estimates ``[batch, time]`` of KL(policy ‖ reference), 0 on padding: Schulman 2020.

    With d = log policy(y_t | x, y_<t) - log reference(y_t | x, y_<t), of tokens sampled from the policy:

        k1 = d                  unbiased; a single estimate may be negative
        k2 = d² / 2             biased, never negative; its gradient is unbiased
        k3 = exp(-d) - 1 + d    unbiased, never negative

    The sum of k1 along a row estimates the response's KL. Differentiable in both log-probabilities.
    """
    # Masked before anything is exponentiated, so that padding gives 0 and a gradient of 0.
    return _ESTIMATES[estimator](masked(logprobs, mask) - masked(reference_logprobs, mask))


def adapted_coefficient(coef: float, kl: float, target: float, horizon: int, responses: int) -> float:
    """The KL coefficient after ``responses`` more: the proportional controller of Ziegler et al. 2019, section 2.2.

        e    = clip((kl - target) / target, -0.2, 0.2)
        coef = coef * (1 + e * min(responses / horizon, 1))

    so that it changes by a fifth at most and stays above 0, where responses may outnumber the horizon.

    coef     above 0
    kl       mean KL of those responses, nats a response
    target   nats a response, above 0
    horizon  responses, at least 1
    """
    error = min(max(kl / target - 1, -LARGEST_ERROR), LARGEST_ERROR)
    return coef * (1 + error * min(responses / horizon, 1))
