"""Which response tokens are real, and sums over those that are.

Shapes: responses are ``[batch, time]``, right-padded: the real tokens of a row come first. A mask is bool, True on real
tokens. Values under padding, NaN and infinity included, never change a result or a gradient.
"""

import torch
from torch import Tensor


def response_mask(tokens: Tensor, eos_token_id: int) -> Tensor:
    """Mark the real tokens of sampled responses: those up to the first EOS, the EOS included.

    tokens   sampled token ids ``[batch, time]``; those after an EOS are ignored
    returns  bool ``[batch, time]``; a row without an EOS is real to its end
    """
    is_eos = tokens == eos_token_id
    eos_before = is_eos.cumsum(dim=-1) - is_eos.long()
    return eos_before == 0


def ended(tokens: Tensor, eos_token_id: int) -> Tensor:
    """Mark responses ``[batch, time]`` with an EOS, which the length limit did not cut off: bool ``[batch]``."""
    return (tokens == eos_token_id).any(dim=-1)


def last_token_mask(mask: Tensor) -> Tensor:
    """Mark the last real token of each row, bool ``[batch, time]``; a row with no real token has none."""
    next_is_real = torch.nn.functional.pad(mask[..., 1:], (0, 1), value=False)
    return mask & ~next_is_real


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """Return ``values`` on real tokens and 0 on padding, with a gradient of 0 there."""
    # Not values * mask: NaN * 0 is NaN, and so is the gradient of inf * 0.
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum ``values`` over real tokens, over the whole tensor or along ``dim``."""
    return masked(values, mask).sum(dim=dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Average ``values``; the denominator counts real tokens (NaN where there are none)."""
    return masked_sum(values, mask, dim) / mask.sum(dim=dim)
