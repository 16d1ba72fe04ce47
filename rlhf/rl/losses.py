"""Losses of policy and value model, and their measurements.

Shapes: ``[batch, time]``, right-padded response tokens; the mask is True on real ones (see :mod:`rlhf.rl.masks`).
Log-probabilities are in nats.

Each loss is a sum over the given real tokens divided by the number of real tokens in the global minibatch, so the
losses of micro batches and ranks, and their gradients, *add* to those of the minibatch: neither padding, micro batches
nor the number of ranks changes them. Where gradients are averaged over ranks or micro batches, as DeepSpeed does,
multiply by the number of those.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from rlhf.config.grpo import Average, Ratio
from rlhf.rl.kl import Estimator, kl_estimates
from rlhf.rl.masks import masked, masked_sum


@dataclass(frozen=True)
class TokenSums:
    """Sums over real tokens, float64 scalars: those of micro batches and ranks add up."""

    tokens: Tensor
    """The number of real tokens."""
    loss: Tensor
    """The undivided loss."""
    clipped: Tensor
    """The number of tokens whose clipped loss is the larger."""

    def __add__(self, other: Self) -> Self:
        return type(self).from_tensor(self.to_tensor() + other.to_tensor())

    def to_tensor(self) -> Tensor:
        """Return all sums as one float64 vector, for a single all-reduce by addition."""
        return torch.stack([getattr(self, field.name) for field in fields(self)])

    @classmethod
    def from_tensor(cls, sums: Tensor) -> Self:
        """Read back the vector of :meth:`to_tensor`."""
        return cls(*sums.unbind())

    @property
    def mean_loss(self) -> Tensor:
        """Return the loss per real token."""
        return self.loss / self.tokens

    @property
    def clip_fraction(self) -> Tensor:
        """Return the fraction of real tokens whose clipped loss is the larger, in [0, 1]."""
        return self.clipped / self.tokens


@dataclass(frozen=True)
class PolicySums(TokenSums):
    """Sums of the policy's loss; ``ratio`` is exp(logprob - old logprob)."""

    squared_log_ratio: Tensor
    ratio: Tensor
    squared_ratio: Tensor
    kl_term: Tensor
    """The KL term of the loss, coefficient included; 0 where the penalty is in the reward."""
    entropy_term: Tensor
    """The entropy bonus in the loss, coefficient and sign included."""
    demonstrations: Tensor
    """The mean negative log-likelihood of an update's demonstrations, nats a token; 0 without."""

    @property
    def approximate_kl(self) -> Tensor:
        """Return half the mean squared log-ratio over real tokens, nats a token (Schulman 2020's k2)."""
        return self.squared_log_ratio / self.tokens / 2

    @property
    def mean_ratio(self) -> Tensor:
        """Return the mean ratio over real tokens; 1 before the first update of an iteration."""
        return self.ratio / self.tokens

    @property
    def ratio_variance(self) -> Tensor:
        """Return the ratio's population variance over real tokens; 0 before an iteration's first update."""
        return (self.squared_ratio / self.tokens - self.mean_ratio.square()).clamp(min=0)


@dataclass(frozen=True)
class ValueSums(TokenSums):
    """Sums of the value model's loss."""


@dataclass(frozen=True)
class Penalties:
    """Terms of the policy's loss beside the surrogate: KL to the reference, and entropy."""

    kl_coef: float = 0.0
    """β, where the KL penalty is a term of the loss."""
    kl_estimator: Estimator = "k2"
    kl_importance_weights: bool = True
    """Whether each token's estimate of the KL is multiplied by its ratio r."""
    entropy_bonus: float = 0.0
    """Weight of the mean entropy a token."""


@dataclass(frozen=True)
class Averaging:
    """How the losses of tokens make that of a minibatch."""

    kind: Average = "token"
    """``token`` the mean over all real tokens, ``sequence`` the mean over each response and then over responses,
    ``constant`` the sum over ``responses`` times ``longest``."""
    responses: int = 1
    """Responses of the global minibatch."""
    longest: int = 1
    """The most tokens that a response may have."""

    def __call__(self, losses: Tensor, mask: Tensor, num_tokens: int | Tensor) -> Tensor:
        """Return the share of tokens ``[batch, time]`` in the minibatch's loss; shares of micro batches add up.

        num_tokens  real tokens in the global minibatch
        """
        if self.kind == "token":
            return masked_sum(losses, mask) / num_tokens
        if self.kind == "constant":
            return masked_sum(losses, mask) / (self.responses * self.longest)
        return (masked_sum(losses, mask, dim=-1) / mask.sum(-1).clamp(min=1)).sum() / self.responses


def policy_ratios(log_ratio: Tensor, mask: Tensor, ratio: Ratio) -> Tensor:
    """Return the log-ratio that each token's surrogate is of, ``[batch, time]``, 0 on padding.

    log_ratio  ``[batch, time]``, of each token's probability now to that when it was sampled, 0 on padding
    ratio      ``token`` leaves it; ``sequence`` is the mean over a response (Zheng et al. 2025, GSPO, arXiv:2507.18071,
               Eq. 7), ``response`` the sum, the log-ratio of the response as one action
    """
    if ratio == "token":
        return log_ratio
    total = log_ratio.sum(-1, keepdim=True)
    if ratio == "sequence":
        total = total / mask.sum(-1, keepdim=True).clamp(min=1)
    return masked(total.expand(mask.shape), mask)


def clipped_policy_loss(
    logprobs: Tensor,
    entropies: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float | None,
    num_tokens: int | Tensor,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    ratio_of: Ratio = "token",
    average: Averaging = Averaging(),
    penalties: Penalties = Penalties(),
) -> tuple[Tensor, PolicySums]:
    """Return the negative of Schulman et al. 2017 (arXiv:1707.06347), Eqs. 7 and 9, and this part's sums:

        -sum over real tokens of [ min(r * A, clamp(r, 1 - clip, 1 + clip) * A) - kl_coef * w * k + entropy_bonus * H ]
            / num_tokens

    r is exp(logprob - old logprob); w is r with ``kl_importance_weights``, otherwise 1. In expectation over the old
    policy's tokens, r * k3 is KL(policy ‖ reference) (DeepSeek-AI 2025, DeepSeek-V3.2, arXiv:2512.02556, Eq. 7), and
    r * k2, with r a constant, has its gradient. For one token both have the gradient r * d * grad log policy, d being
    the log-ratio to the reference.

    logprobs            ``[batch, time]``, of the sampled tokens now; takes a gradient
    entropies           ``[batch, time]``, H, of the distributions they were drawn from, now; takes a gradient
    old_logprobs        ``[batch, time]``, of the same tokens under the policy that sampled them
    reference_logprobs  ``[batch, time]``, under the reference; k is :func:`rlhf.rl.kl.kl_estimates` of it
    advantages          ``[batch, time]``
    clip                at least 0; 0.2 is usual; None leaves the ratio as it is
    num_tokens          real tokens in the global minibatch
    clip_high           in place of ``clip`` above 1 (Yu et al. 2025, DAPO, arXiv:2503.14476, Eq. 10); None is ``clip``
    dual_clip           c, above 1: where A is negative, its token's surrogate is at least c * A (Ye et al. 2020,
                        arXiv:1912.09729, Eq. 5); None for none
    ratio_of            what r is the ratio of: :func:`policy_ratios`; w is always the token's own
    average             in place of the mean over tokens; the sums are of tokens whatever it is
    """
    advantages = masked(advantages.detach(), mask)
    # Masked before exp, so that padding's ratio is 1 and its gradient 0 rather than 0 * inf.
    log_ratio = masked(logprobs - old_logprobs.detach(), mask)
    token_ratio, ratio = log_ratio.exp(), policy_ratios(log_ratio, mask, ratio_of).exp()
    unclipped_losses = clipped_losses = -ratio * advantages
    if clip is not None:
        clipped_losses = -ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high)) * advantages
    surrogates = torch.maximum(unclipped_losses, clipped_losses)
    if dual_clip is not None:
        surrogates = torch.where(advantages < 0, surrogates.minimum(-dual_clip * advantages), surrogates)
    terms = [surrogates]
    kl_terms = entropy_terms = torch.zeros_like(surrogates)
    if penalties.kl_coef:
        estimates = kl_estimates(logprobs, reference_logprobs.detach(), mask, penalties.kl_estimator)
        if penalties.kl_importance_weights:
            # k2 is biased; with a constant weight its gradient is right. k3 is unbiased, and its gradient needs r's.
            weights = token_ratio.detach() if penalties.kl_estimator == "k2" else token_ratio
            estimates = estimates * weights
        kl_terms = penalties.kl_coef * estimates
        terms.append(kl_terms)
    if penalties.entropy_bonus:
        entropy_terms = -penalties.entropy_bonus * entropies
        terms.append(entropy_terms)
    with torch.no_grad():
        sums = PolicySums(
            tokens=mask.sum().double(),
            loss=masked_sum(surrogates, mask).double(),
            clipped=(clipped_losses > unclipped_losses).sum().double(),
            squared_log_ratio=log_ratio.double().square().sum(),
            ratio=masked_sum(ratio.double(), mask),
            squared_ratio=masked_sum(ratio.double().square(), mask),
            kl_term=masked_sum(kl_terms, mask).double(),
            entropy_term=masked_sum(entropy_terms, mask).double(),
            demonstrations=torch.zeros((), dtype=torch.float64, device=mask.device),
        )
    shares = [average(term, mask, num_tokens) for term in terms]
    return sum(shares[1:], start=shares[0]), sums


def demonstration_loss(logprobs: Tensor, mask: Tensor, *, coef: float, num_tokens: int) -> tuple[Tensor, PolicySums]:
    """Return the negative last term of Ouyang et al. 2022 (arXiv:2203.02155), eq. 2, "ptx", over demonstrations.

        -coef * sum over real tokens of log policy(y_t | x, y_<t) / num_tokens

    logprobs    ``[batch, time]``, of the demonstrations' completions now, at temperature 1; takes a gradient
    num_tokens  real tokens of all the update's demonstrations, over all ranks
    returns     the loss, a scalar, and sums that are 0 except for ``demonstrations``
    """
    likelihood = masked_sum(logprobs, mask) / num_tokens
    zeros = {field.name: torch.zeros_like(likelihood, dtype=torch.float64) for field in fields(PolicySums)}
    sums = PolicySums(**(zeros | {"demonstrations": -likelihood.detach().double()}))
    return -coef * likelihood, sums


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None, num_tokens: int | Tensor
) -> tuple[Tensor, ValueSums]:
    """Return half the larger squared error (Huang et al. 2022, "The 37 implementation details of PPO", no. 9):

        sum over real tokens of max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / 2 / num_tokens

    values      ``[batch, time]``, the value model's estimates now; the only input that takes a gradient
    old_values  ``[batch, time]``, its estimates when the responses were sampled
    returns     ``[batch, time]``, R of :func:`rlhf.rl.advantages.generalised_advantages`
    clip        at least 0, in units of the score; 0.2 is usual; None leaves the error as it is
    num_tokens  real tokens in the global minibatch
    returns     the loss, a scalar, and this part's sums
    """
    values, old_values, returns = (masked(x, mask) for x in (values, old_values.detach(), returns.detach()))
    unclipped_losses = (values - returns).square() / 2
    limited = values if clip is None else values.clamp(old_values - clip, old_values + clip)
    clipped_losses = (limited - returns).square() / 2
    loss = masked_sum(torch.maximum(unclipped_losses, clipped_losses), mask)
    with torch.no_grad():
        sums = ValueSums(
            tokens=mask.sum().double(),
            loss=loss.detach().double(),
            clipped=(clipped_losses > unclipped_losses).sum().double(),
        )
    return loss / num_tokens, sums
