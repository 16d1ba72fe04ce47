"""Attention of a decode step on a GPU by cuDNN, which reads a cache at 60 % of the speed of its memory.

A step's queries see their row's places by a mask. torch's own kernel for masks takes a third of the memory's speed, and
knows no query heads that share a key head. cuDNN's takes both. Ranks do without it otherwise, since its gradient of a
query that sees nothing is not a number: here every query sees its own token, and nothing has a gradient.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rlhf.models import varlen
from rlhf.rollout.slots import LayerShape

NAME = "sdpa_grouped"
MULTIPLE_OF_128 = 91501
"""The version of cuDNN from which keys need not be a multiple of 128."""
_OTHER = ("dropout", "softcap", "s_aux", "position_bias")
"""What layers may ask of attention beyond a mask and a scale."""


def fits(model: Any) -> bool:
    """Return whether the model's layers ask transformers' interface for an attention that we may replace."""
    return model.config._attn_implementation in ("sdpa", varlen.NAME) and model._can_set_attn_implementation()


def computes(heads: int, shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether cuDNN takes queries of this many heads over keys and values of these shapes."""
    if device.type != "cuda" or (torch.backends.cudnn.version() or 0) < MULTIPLE_OF_128:
        return False
    mask = torch.zeros(2, 1, 1, 128, dtype=dtype, device=device)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        for shape in set(shapes):
            query = mask.new_zeros(2, heads, 1, shape.keys[1])
            key, value = (mask.new_zeros(2, shared, 128, width) for shared, width in shape)
            if not can_use_cudnn_attention(SDPAParams(query, key, value, mask, 0.0, False, heads != shape.keys[0])):
                return False
    return True


@contextmanager
def attending(model: Any) -> Generator[None]:
    """Let the model's layers attend so; every call must give a mask of four dimensions."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention(
    module: Any,  # noqa: ARG001 - transformers' signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Return ``[row, 1, head, size]`` of queries ``[row, head, 1, size]``, and keys and values of places."""
    assert not any(more.get(name) for name in _OTHER)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if query.is_cuda else nullcontext():
        states = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    return states.transpose(1, 2), None


AttentionInterface.register(NAME, _attention)
