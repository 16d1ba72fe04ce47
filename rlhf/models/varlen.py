"""Attention that computes each text of a packed row by itself, on a GPU with torch's kernel for variable lengths.

transformers' own way is a mask ``[row, 1, time, time]``, whose cost grows with the square of the row's length. Here the
mask is replaced by :class:`Boundaries`, found once in a forward pass and given to every layer in the mask's place. Rows
that are padded, or continue a cache, keep transformers' mask and torch's other kernels.
"""

import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.models.packable import attends_to_whole_texts

NAME = "sdpa_by_text"
_TAKES = inspect.signature(varlen_attn).parameters
"""They differ between torch 2.11 and later ones."""


@dataclass(frozen=True)
class Boundaries:
    """Where the texts of R rows of T tokens begin and end, in the order of the flattened rows."""

    offsets: Tensor
    """``[text + 1]``, int32: the first token of each text, and the number of all tokens."""
    longest: int
    """Tokens of the longest text."""
    keys: Tensor | None = None
    """``[key]``: the tokens that texts attend to, one text after the other, where some begin with tokens of others that
    lie in the row once. Each text's own tokens are the last of its keys."""
    key_offsets: Tensor | None = None
    """``[text + 1]``, int32: the first key of each text, and the number of all keys."""
    most_keys: int = 0
    """Keys of the text that has most."""

    def to(self, device: torch.device) -> Self:
        """Return the boundaries on a device."""
        moved: dict[str, Any] = {name: one.to(device) for name, one in vars(self).items() if isinstance(one, Tensor)}
        return replace(self, **moved)


KNOWN: ContextVar[Boundaries | None] = ContextVar("KNOWN", default=None)
"""The boundaries of the row that a model reads, where they are known beforehand."""


def as_mask(model: Any, offsets: Tensor, longest: int) -> Tensor | None:
    """Return the boundaries of one row's texts as what a model takes for its mask; None where it makes its own.

    Else it would wait for the GPU in each forward pass, to find them. transformers hands a mask of four dimensions on
    to the layers as it is: this one holds the offsets, and has as many rows as the longest text has tokens.

    offsets, longest  as in :class:`Boundaries`
    """
    by_text = model.config._attn_implementation == NAME and computes(offsets.device, model.dtype)
    return offsets.expand(1, 1, longest, -1) if by_text else None


def attend_by_text(model: Any) -> None:
    """Make a model of transformers' compute packed rows text by text, where its type allows it."""
    plain = attends_to_whole_texts(model.config.get_text_config().to_dict())
    if plain and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)


def boundaries(begins: Tensor) -> Boundaries:
    """Return the boundaries of texts.

    begins  ``[R, T]``, whether a text begins at a token; in each row one does at the first
    """
    starts = begins.flatten().nonzero().squeeze(-1)
    offsets = torch.nn.functional.pad(starts, (0, 1), value=begins.numel()).int()
    return Boundaries(offsets, int(offsets.diff().max()))


def beginnings(rows: int, time: int, sees: Callable[..., Tensor], device: torch.device) -> Tensor:
    """Return ``[R, T]``, whether a text begins at a token: whether the token does not see the one before it.

    sees  of indices of row, head, query and key, as transformers makes masks from
    """
    row, place = torch.arange(rows, device=device)[:, None], torch.arange(1, time, device=device)
    continues = sees(row, row.new_zeros(()), place, place - 1).expand(rows, -1)
    return torch.nn.functional.pad(~continues, (1, 0), value=True)


def _mask(**given: Any) -> Boundaries | Tensor | None:
    """Return what transformers gives each layer as its mask."""
    if (known := KNOWN.get()) is not None:
        return known
    packed = given["attention_mask"] is None and not given.get("allow_is_causal_skip", True)
    packed = packed and not given["use_vmap"]
    if packed and given["q_length"] == given["kv_length"] and computes(given["device"], given["dtype"]):
        begins = beginnings(given["batch_size"], given["q_length"], given["mask_function"], given["device"])
        return boundaries(begins)
    return sdpa_mask(**given)


def computes(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether texts are computed one by one on a device."""
    return device.type == "cpu" or (device.type == "cuda" and dtype == torch.bfloat16)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Return ``[R, T, head, width]`` of queries, keys and values ``[R, head, T, width]``."""
    if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.int32:  # that of as_mask
        attention_mask = Boundaries(attention_mask[0, 0, 0], attention_mask.shape[2])
    if not isinstance(attention_mask, Boundaries):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    on_cpu = query.device.type == "cpu"
    if not on_cpu and "enable_gqa" not in _TAKES:
        key, value = (repeat_kv(states, query.shape[1] // states.shape[1]) for states in (key, value))
    flat = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    by_text = by_text_on_cpu if on_cpu else _by_text
    states = by_text(flat[0], flat[1], flat[2], attention_mask, scale)
    return states.unflatten(0, (query.shape[0], query.shape[2])), None


def _by_text(query: Tensor, key: Tensor, value: Tensor, texts: Boundaries, scale: float) -> Tensor:
    """Return ``[token, head, width]`` of the tokens' queries, keys and values, each attending to its text alone."""
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in _TAKES else {"is_causal": True}
    if "enable_gqa" in _TAKES:
        options["enable_gqa"] = True
    if "scale" in _TAKES:
        options["scale"] = scale
    else:
        query = query * (scale * query.shape[-1] ** 0.5)
    offsets, longest = texts.offsets, texts.longest
    key_offsets, most = offsets, longest
    if texts.keys is not None and texts.key_offsets is not None:
        key, value = (states.index_select(0, texts.keys) for states in (key, value))
        key_offsets, most = texts.key_offsets, texts.most_keys
    # The last query sees the last key, and each one before it one key fewer.
    states = varlen_attn(query, key, value, offsets, key_offsets, longest, most, **options)
    assert isinstance(states, Tensor)
    return states


def by_text_on_cpu(query: Tensor, key: Tensor, value: Tensor, texts: Boundaries, scale: float) -> Tensor:
    """Return what :func:`_by_text` does."""
    # In fp32 gradients would take half as long, but log-probabilities would differ more from the sampler's.
    query, key, value = (states.transpose(0, 1) for states in (query, key, value))
    queries = query.split(texts.offsets.diff().tolist(), dim=1)
    keys, values = (_before_and_own(states, texts) for states in (key, value))
    attend = partial(scaled_dot_product_attention, scale=scale, enable_gqa=True)
    most = max(k.shape[1] - q.shape[1] for q, k in zip(queries, keys, strict=True))
    seen = torch.ones(texts.longest, most + texts.longest, dtype=torch.bool).tril(most) if most else None
    results: list[Tensor] = []
    for q, k, v in zip(queries, keys, values, strict=True):
        before = k.shape[1] - q.shape[1]
        mask = seen[: q.shape[1], most - before :][:, : k.shape[1]] if seen is not None and before else None
        results.append(attend(q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None)[0])
    return torch.cat(results, dim=1).transpose(0, 1)


def _before_and_own(states: Tensor, texts: Boundaries) -> Sequence[Tensor]:
    """Return of each text the states ``[head, key, width]`` of the tokens that it attends to."""
    parts = states.split(texts.offsets.diff().tolist(), dim=1)
    if texts.keys is None or texts.key_offsets is None:
        return parts
    whole: list[Tensor] = []
    beginnings: dict[int, Tensor] = {}
    for part, seen in zip(parts, texts.keys.split(texts.key_offsets.diff().tolist()), strict=True):
        before = seen[: len(seen) - part.shape[1]]
        if not len(before):
            whole.append(part)
            continue
        # Places rise. One slice serves all texts that begin as the row does: their gradients add up in turn.
        at_start = int(before[-1]) == len(before) - 1
        begun = states.index_select(1, before) if not at_start else beginnings.get(len(before))
        if begun is None:
            begun = beginnings[len(before)] = states[:, : len(before)]
        whole.append(torch.cat([begun, part], dim=1))
    return whole


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
