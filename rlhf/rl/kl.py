"""Log-probabilities of tokens, KL estimates and importance weights between two policies, and the coefficient that
follows the KL.

Shapes: ``[batch, time]``, right-padded response tokens; the mask is True on real ones (see :mod:`rlhf.rl.masks`).
Log-probabilities and KL are in nats.

Log-probabilities and entropies from logits ``[..., vocabulary]`` are in float32 whatever the model's precision. With a
vocabulary of 128,256 a float32 logits tensor is the largest in memory. The functions here hold a single tensor of that
size beyond the logits, in the forward and in the backward pass, and one more for another temperature than 1 and one for
entropies; split the batch to make them smaller.
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

    logits       ``[..., vocabulary]`` in any floating type; -inf stands for probability 0. Differentiable. A position
                 whose result receives a gradient of 0, as padding does, passes on exactly 0, even where its logits are
                 not finite
    tokens       ``[...]``, ids in [0, vocabulary)
    temperature  above 0, the one the tokens were sampled with
    returns      ``[...]`` in float32 (float64 for float64 logits)
    """
    return _Distribution.apply(logits, tokens, temperature, False)[0]


def logprobs_and_entropies(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return log-probabilities, and the entropy of softmax(logits / temperature), -sum_v p[v] log p[v], in nats.

    Arguments and gradients as of :func:`logprobs_of`; entropies are in [0, log(vocabulary)].
    """
    return _Distribution.apply(logits, tokens, temperature, True)


class _Distribution(torch.autograd.Function):
    # Plain log_softmax keeps its whole result for the backward pass; this keeps the logits alone, which exist anyway,
    # and computes the probabilities again. torch's softmax reads them once or twice, separate steps six times.

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, entropies: bool) -> tuple[Tensor, Tensor]:
        scaled, precision = _scaled(logits, temperature)
        work = torch.log_softmax(scaled, dim=-1, dtype=precision)
        logprobs = work.gather(-1, tokens[..., None]).squeeze(-1)
        entropy = torch.special.entr(work.exp_()).sum(dim=-1) if entropies else torch.zeros_like(logprobs)
        ctx.save_for_backward(logits, tokens, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch passes gradients by position
        ctx: Any, of_logprobs: Tensor | None, of_entropy: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        logits, tokens, entropy = ctx.saved_tensors
        scaled, precision = _scaled(logits, ctx.temperature)
        work = torch.softmax(scaled, dim=-1, dtype=precision)
        scale = torch.zeros_like(entropy) if of_logprobs is None else of_logprobs / ctx.temperature
        unused, factor = scale == 0, -scale
        more = None
        if of_entropy is not None:
            # d H / d logits[v] = -p[v] (log p[v] + H) / temperature, and -p log p is entr(p), 0 where p is 0
            part = of_entropy / ctx.temperature
            unused, factor = unused & (part == 0), factor - part * entropy
            more = torch.special.entr(work).mul_(part[..., None])
        # d log p[token] / d logits[v] = ([v == token] - p[v]) / temperature
        work.mul_(factor[..., None]).scatter_add_(-1, tokens[..., None], scale[..., None])
        if more is not None:
            work.add_(more)
        return work.masked_fill_(unused[..., None], 0.0).to(logits.dtype), None, None, None


def _scaled(logits: Tensor, temperature: float) -> tuple[Tensor, torch.dtype]:
    """Return logits / temperature, and the type to compute in."""
    precision = torch.promote_types(logits.dtype, torch.float32)
    # Divided in that type: bf16 would round once more.
    return logits if temperature == 1 else logits.to(precision) / temperature, precision
