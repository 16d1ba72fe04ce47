"""Log-probabilities and entropies out of logits ``[..., vocabulary]``, in float32 whatever the model's precision.

A vocabulary of 128,256 makes one float32 logits tensor the largest thing in memory. The functions here hold a single
tensor of that size beyond the logits, in the forward and in the backward pass; split the batch to make even that small.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    # Plain log_softmax keeps its whole result for the backward pass; a token's log-probability needs only the row's
    # normaliser, and the logits, which the model's last layer keeps anyway.

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        work = _scaled_copy(logits, temperature)
        largest = work.amax(dim=-1, keepdim=True)
        # Relative to the largest before anything is picked, so that huge logits lose no digits either.
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
