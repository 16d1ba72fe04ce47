"""Attention of a decode step on a GPU: torch's flash attention over slots that are filled to lengths of their own.

Under a mask torch reads a cache at a third of the memory's bandwidth. This kernel is told each row's length instead: it
reads no place behind it, each key once for all query heads that share it, and splits long rows where there are few.

To the kernel each key head of each row is a text of its own, ``[text, place, 1, size]``, whose one query has the heads
that share the key head: so cache, queries and results stay where they are. What it is told stands in one tensor of
four dimensions, which transformers hands to every layer in the mask's place as it is.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from rlhf.models import varlen
from rlhf.rollout.slots import LayerShape

NAME = "flash_by_length"
_OTHER = ("dropout", "softcap", "s_aux", "position_bias")
"""What layers may ask of attention beyond the kernel."""


def fits(model: Any, shapes: Sequence[LayerShape]) -> bool:
    """Return whether the kernel computes what the model's layers do, whose keys and values have these shapes."""
    config = model.config
    same = len({part for shape in shapes for part in shape}) == 1
    return (
        config._attn_implementation in ("sdpa", varlen.NAME)
        and model._can_set_attn_implementation()
        and same
        and shapes[0].keys[1] in range(8, 257, 8)
    )


def computes(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the device has the kernel for keys of a type."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@contextmanager
def attending(model: Any) -> Generator[None]:
    """Let the model's layers be given what :class:`rlhf.rollout.slots.Lengths` returns."""
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
    """Return ``[row, 1, head, size]`` of queries ``[row, head, 1, size]`` and whole slots ``[row, head, place, size]``.

    attention_mask  of :class:`rlhf.rollout.slots.Lengths`
    """
    assert not any(more.get(name) for name in _OTHER)
    (rows, heads, _, size), (_, shared, places, _) = query.shape, key.shape
    texts = query.reshape(rows * shared, heads // shared, size)
    keys, values = (states.reshape(-1, 1, size) for states in (key, value))
    window = attention_mask.shape[-1]
    states = _by_length(texts, keys, values, attention_mask[0, :, :, 0], places, window, scaling)
    return states.view(rows, 1, heads, size), None


def _by_length(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, places: int, window: int, scale: float | None
) -> Tensor:
    """Return ``[text, head, size]`` of queries, each over the keys ``[text · place, 1, size]`` that its text has.

    table   ``[3, text + 1]``, see there
    window  the number of a text's last places that are seen
    """
    lengths, queries, firsts = table
    # Without a window the kernel puts a text's heads into one tile, and splits its keys.
    left = -1 if window >= places else window - 1
    options: dict[str, Any] = {"window_size_left": left, "window_size_right": -1, "seqused_k": lengths[:-1]}
    return torch.ops.aten._flash_attention_forward(
        query, key, value, queries, firsts, 1, places, 0.0, False, False, scale=scale, **options
    )[0]


AttentionInterface.register(NAME, _attention)
