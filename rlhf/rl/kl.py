"""Log-probabilities of tokens, KL estimates and importance weights between two policies, and the coefficient that
follows the KL.

Shapes: ``[batch, time]``, right-padded response tokens; the mask is True on real ones (see :mod:`rlhf.rl.masks`).
Log-probabilities and KL are in nats.

Log-probabilities and entropies from logits ``[..., vocabulary]`` are in float32 whatever the model's precision. With a
vocabulary of 128,256 a float32 logits tensor is the largest in memory. The functions here hold a single tensor of that
size beyond the logits, in the forward and in the backward pass; split the batch to make it smaller.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf.rl.masks import masked

Estimator = Literal["k1", "k2", "k3"]

_ESTIMATES: Mapping[Estimator, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: log_ratio.square() / 2,
    "k3": lambda log_ratio: (-log_ratio).expm1() + log_ratio,
}

# The largest error that the controller corrects at once: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.
LARGEST_ERROR = 0.2


def kl_estimates(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, estimator: Estimator = "k1") -> Tensor:
    """Return per-token estimates ``[batch, time]`` of KL(policy ‖ reference), 0 on padding: Schulman 2020.

    With d = log policy(y_t | x, y_<t) - log reference(y_t | x, y_<t), of tokens sampled from the policy:

        k1 = d                  unbiased; a single estimate may be negative
        k2 = d² / 2             biased, never negative; its gradient is unbiased
        k3 = exp(-d) - 1 + d    unbiased, never negative

    The sum of k1 along a row estimates the response's KL. Differentiable in both log-probabilities.
    """
    # Masked before exp, so that padding gives 0 and a gradient of 0.
    return _ESTIMATES[estimator](masked(logprobs, mask) - masked(reference_logprobs, mask))


def adapted_coefficient(coef: float, kl: float, target: float, horizon: int, responses: int) -> float:
    """Return the KL coefficient after ``responses`` more: the controller of Ziegler et al. 2019, section 2.2.

        e    = clip((kl - target) / target, -0.2, 0.2)
        coef = coef * (1 + e * min(responses / horizon, 1))

    It changes by a fifth at most and stays above 0, also where ``responses`` exceeds the horizon.

    coef     above 0
    kl       mean KL of those responses, nats a response
    target   nats a response, above 0
    horizon  responses, at least 1
    """
    error = min(max(kl / target - 1, -LARGEST_ERROR), LARGEST_ERROR)
    return coef * (1 + error * min(responses / horizon, 1))


def truncated_importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Return each token's weight, its likelihood by the trained policy over that by the sampler, truncated:

        w_t = min( exp(logprob - sampler_logprob), cap )

    A policy loss whose advantages are multiplied by w estimates, up to the cap, the loss over the trained policy's own
    samples: truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
    RL training"). The cap bounds the variance.

    logprobs          ``[batch, time]``, by the trained policy before the updates, nats; no gradient passes through
    sampler_logprobs  ``[batch, time]``, of the same tokens as they were sampled
    cap               above 0; 2 is usual
    returns           ``[batch, time]``, 1 on padding where the cap allows
    """
    return masked((logprobs - sampler_logprobs).detach(), mask).exp().clamp(max=cap)


def logprobs_of(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probability of each token, in nats, under softmax(logits / temperature).

        log p(token) = z[token] - log sum_v exp(z[v]),   z = logits / temperature

    logits       ``[..., vocabulary]`` in any floating type; differentiable. A position whose result receives a
                 gradient of 0, as padding does, passes on exactly 0, even where its logits are not finite
    tokens       ``[...]``, ids in [0, vocabulary)
    temperature  above 0, the one the tokens were sampled with
    returns      ``[...]`` in float32 (float64 for float64 logits)
    """
    return _LogprobsOf.apply(logits, tokens, temperature)


def entropy_from_logits(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the entropy of softmax(logits / temperature), -sum_v p[v] log p[v], in nats.

    logits       ``[..., vocabulary]`` in any floating type; -inf stands for probability 0. Differentiable, and as in
                 :func:`logprobs_of` a gradient of 0 passes on exactly 0
    temperature  above 0
    returns      ``[...]`` in float32 (float64 for float64 logits), in [0, log(vocabulary)]
    """
    return _EntropyOf.apply(logits, temperature)


class _LogprobsOf(torch.autograd.Function):
    # Plain log_softmax keeps its whole result for the backward pass; this keeps only each row's normaliser, and the
    # logits, which the model's last layer keeps anyway.

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        work = _scaled_copy(logits, temperature)
        largest = work.amax(dim=-1, keepdim=True)
        # Relative to the largest first, so that huge logits lose no digits either.
        picked = work.sub_(largest).gather(-1, tokens[..., None])
        total = work.exp_().sum(dim=-1, keepdim=True)
        ctx.save_for_backward(logits, tokens, largest, total)
        ctx.temperature = temperature
        return (picked - total.log()).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch passes gradients by position
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        logits, tokens, largest, total = ctx.saved_tensors
        scale = grad[..., None] / ctx.temperature
        # d log p[token] / d logits[v] = ([v == token] - p[v]) / temperature
        work = _scaled_copy(logits, ctx.temperature).sub_(largest).exp_().mul_(-scale / total)
        work.scatter_add_(-1, tokens[..., None], scale)
        return work.masked_fill_(scale == 0, 0.0).to(logits.dtype), None, None


class _EntropyOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float) -> Tensor:
        entropy = torch.special.entr(_probabilities(logits, temperature)).sum(dim=-1)
        ctx.save_for_backward(logits, entropy)
        ctx.temperature = temperature
        return entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch passes gradients by position
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None]:
        logits, entropy = ctx.saved_tensors
        scale = grad[..., None] / ctx.temperature
        # d H / d logits[v] = -p[v] (log p[v] + H) / temperature, and p log p is -entr(p), which is 0 where p is 0
        work = _probabilities(logits, ctx.temperature)
        gradient = (torch.special.entr(work) - work * entropy[..., None]).mul_(scale)
        return gradient.masked_fill_(scale == 0, 0.0).to(logits.dtype), None


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    work = _scaled_copy(logits, temperature)
    work -= work.amax(dim=-1, keepdim=True)
    work.exp_()
    return work.div_(work.sum(dim=-1, keepdim=True))


def _scaled_copy(logits: Tensor, temperature: float) -> Tensor:
    precision = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(precision, copy=True).div_(temperature)
