"""Which response tokens are real, and sums over those that are.

Shapes: responses are ``[batch, time]``, right-padded: the real tokens of a row are its first ones. A mask is bool, True
on real tokens. What lies under padding, NaN and infinity included, never matters, neither to a value nor to a gradient.
"""

import torch
from torch import Tensor


def response_mask(tokens: Tensor, eos_token_id: int) -> Tensor:
    """Mark the real tokens of sampled responses: everything up to the first EOS, the EOS included.

    tokens   sampled token ids ``[batch, time]``; what a generator wrote after an EOS is ignored
    returns  bool ``[batch, time]``; a row without an EOS is real to its end
    """
    is_eos = tokens == eos_token_id
    eos_before = is_eos.cumsum(dim=-1) - is_eos.long()
    return eos_before == 0


def ended(tokens: Tensor, eos_token_id: int) -> Tensor:
    """Which responses ``[batch, time]`` hold an EOS, so were not cut off by the length limit: bool ``[batch]``."""
    return (tokens == eos_token_id).any(dim=-1)


def last_token_mask(mask: Tensor) -> Tensor:
    """Mark the last real token of each row, bool ``[batch, time]``; a row with no real token has none."""
    next_is_real = torch.nn.functional.pad(mask[..., 1:], (0, 1), value=False)
    return mask & ~next_is_real


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` on real tokens and 0 on padding, whatever the padding held; its gradient is 0 there too."""
    # Not values * mask: NaN * 0 is NaN, and so is the gradient of inf * 0.
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum ``values`` over real tokens, of the whole tensor or along ``dim``."""
    return masked(values, mask).sum(dim=dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Average ``values``; the denominator counts real tokens (NaN where there are none)."""
    return masked_sum(values, mask, dim) / mask.sum(dim=dim)
