"""Read a batch on a CPU without padding, and what all its texts begin with once.

Prompts of a task begin alike: a chat template's system message and an instruction. A causal model computes the same
for such tokens in each text, and the gradients of all texts add up in them. Nothing is computed twice then, and
nothing for padding: texts lie end to end behind their common beginning, which each attends to beside itself.

Shapes: R rows of T tokens, padded or packed.
"""

from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf.models.varlen import KNOWN, NAME, Boundaries, attend_by_text
from rlhf.models.virtual_tokens import has_virtual_tokens

_SAID_TWICE = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""Arguments that say for other kernels where texts begin, as their positions do."""


def read_beginnings_once(model: Any) -> None:
    """Make a model of transformers' attend by text and, on a CPU, read texts' common beginning once.

    One with virtual tokens, which stand before each text, is left as it is.
    """
    body = model.base_model
    if has_virtual_tokens(body):
        return
    attend_by_text(model)
    if body.config._attn_implementation == NAME and not torch.cuda.is_available():
        # A method, so that a copy of the model reads its own weights.
        body.forward = MethodType(_read, body)


class EndToEnd(NamedTuple):
    """The texts of a batch in one row, behind what all begin with."""

    places: Tensor
    """``[N]``: of each token the place in the batch's flattened rows."""
    source: Tensor
    """``[R * T]``: of each place in the flattened rows the token; any where there is padding."""
    texts: Boundaries


def _read(
    body: Any,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    **named: Any,
) -> Any:
    """Run the forward pass of a model's body; a mask may be of any of the forms that transformers takes."""
    read = partial(type(body).forward, body)
    row = None
    if input_ids is not None and position_ids is not None and _can_rearrange(body, input_ids, attention_mask, named):
        padding = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        row = end_to_end(input_ids, position_ids.expand_as(input_ids), padding)
    if row is None or input_ids is None or position_ids is None:
        return read(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **named)
    ids, places = (states.expand_as(input_ids).flatten()[row.places][None] for states in (input_ids, position_ids))
    token = KNOWN.set(row.texts)
    try:
        outputs = read(input_ids=ids, position_ids=places, use_cache=False)
    finally:
        KNOWN.reset(token)
    outputs.last_hidden_state = outputs.last_hidden_state[0].index_select(0, row.source).view(*input_ids.shape, -1)
    return outputs


def _can_rearrange(body: Any, ids: Tensor, attention_mask: Any, named: dict[str, Any]) -> bool:
    others = {name for name, value in named.items() if value is not None} - {"use_cache"} - _SAID_TWICE
    if ids.device.type != "cpu" or others or named.get("use_cache", True):
        return False
    # A mask of int32 in four dimensions is that of rlhf.models.varlen.as_mask: it says what positions say.
    known = isinstance(attention_mask, Tensor) and (attention_mask.dim() == 2 or attention_mask.dtype == torch.int32)
    if not (attention_mask is None or known) or getattr(body.config, "output_router_logits", False):
        return False
    # Dropout is drawn for each token anew.
    return not (body.training and any(isinstance(part, nn.Dropout) and part.p > 0 for part in body.modules()))


def end_to_end(ids: Tensor, positions: Tensor, attention_mask: Tensor | None) -> EndToEnd | None:
    """Return the texts of a batch ``[R, T]`` in one row; None where that saves nothing, or rows have holes.

    positions       a token's place in its text; in a batch without mask a text begins at each 0
    attention_mask  of padded rows with one text each
    """
    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    begins = torch.nn.functional.pad(real[:, 1:] & ~real[:, :-1], (1, 0))
    begins[:, 0] = real[:, 0]
    if attention_mask is None:
        begins = begins | (positions == 0)
    elif (begins.sum(1) != 1).any():
        return None
    tokens = real.flatten().nonzero().squeeze(-1)
    starts = begins.flatten()[tokens].nonzero().squeeze(-1)
    lengths = torch.nn.functional.pad(starts, (0, 1), value=len(tokens)).diff()
    shared = _shared(torch.stack([ids.flatten()[tokens], positions.flatten()[tokens]]), starts, int(lengths.min()) - 1)
    if not shared and len(tokens) == ids.numel():
        return None
    text = torch.arange(len(starts)).repeat_interleave(lengths)
    place = torch.arange(len(tokens)) - starts[text]
    own = (place >= shared) | (text == 0)
    # The first text's beginning stands for all.
    source = torch.zeros(ids.numel(), dtype=torch.long)
    source[tokens] = torch.where(place < shared, place, own.cumsum(0) - 1)
    offsets = torch.nn.functional.pad((lengths - shared).cumsum(0), (1, 0)).int()
    return EndToEnd(tokens[own], source, Boundaries(offsets, int(lengths.max()) - shared, shared))


def _shared(tokens: Tensor, starts: Tensor, most: int) -> int:
    """Return how many tokens all texts begin with; tokens are ids and positions ``[2, token]``."""
    if len(starts) < 2:
        return 0
    table = tokens[:, starts[:, None] + torch.arange(most)]
    return int((table == table[:, :1]).all(1).all(0).long().cumprod(0).sum())
