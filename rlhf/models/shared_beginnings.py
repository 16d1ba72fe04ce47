"""Read a batch without padding, and what its texts begin with once.

Prompts of a task begin alike: a chat template's system message and an instruction; responses to one prompt have all of
it before them. A causal model computes the same for such tokens in each text, and the gradients of all texts add up in
them. Nothing is computed twice then, and nothing for padding: texts lie end to end, the first with its beginning, and
others attend to that one's beside themselves.

Shapes: R rows of T tokens, padded or packed.
"""

from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf.models.varlen import KNOWN, NAME, Boundaries, attend_by_text, computes
from rlhf.models.virtual_tokens import has_virtual_tokens

_SAID_TWICE = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""Arguments that say for other kernels where texts begin, as their positions do."""


FEWEST = 16
"""Tokens of a beginning that some texts of a batch share beyond what all of them do."""


def read_beginnings_once(model: Any, *, on_gpus: bool = False) -> None:
    """Make a model of transformers' attend by text, and on a CPU read beginnings that texts share once.

    One with virtual tokens, which stand before each text, is left as it is.

    on_gpus  whether to do so there too, where the host must then look at each batch
    """
    body = model.base_model
    if has_virtual_tokens(body):
        return
    attend_by_text(model)
    if body.config._attn_implementation == NAME and (on_gpus or not torch.cuda.is_available()):
        # A method, so that a copy of the model reads its own weights.
        body.forward = MethodType(_read, body)


class EndToEnd(NamedTuple):
    """The texts of a batch in one row, less beginnings that an earlier one has."""

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
        host = None if padding is None else padding.cpu()
        row = end_to_end(input_ids.cpu(), position_ids.expand_as(input_ids).cpu(), host)
    if row is None or input_ids is None or position_ids is None:
        return read(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **named)
    device = input_ids.device
    kept, source = row.places.to(device), row.source.to(device)
    ids, places = (states.expand_as(input_ids).flatten()[kept][None] for states in (input_ids, position_ids))
    token = KNOWN.set(row.texts.to(device))
    try:
        outputs = read(input_ids=ids, position_ids=places, use_cache=False)
    finally:
        KNOWN.reset(token)
    outputs.last_hidden_state = outputs.last_hidden_state[0].index_select(0, source).view(*input_ids.shape, -1)
    return outputs


def _can_rearrange(body: Any, ids: Tensor, attention_mask: Any, named: dict[str, Any]) -> bool:
    others = {name for name, value in named.items() if value is not None} - {"use_cache"} - _SAID_TWICE
    if not computes(ids.device, body.dtype) or others or named.get("use_cache", True):
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
    lengths = torch.nn.functional.pad(begins.flatten()[tokens].nonzero().squeeze(-1), (0, 1), value=len(tokens)).diff()
    pairs = torch.stack([ids.flatten()[tokens], positions.flatten()[tokens]])
    leader, shared = _leaders(pairs.split(lengths.tolist(), dim=1))
    if not shared.any() and len(tokens) == ids.numel():
        return None
    # What all texts begin with comes first, as if it were a text of its own.
    beginning = shared[1:].min()
    tokens, lengths = torch.cat([tokens[:beginning], tokens]), torch.cat([beginning[None], lengths])
    text = torch.arange(len(lengths)).repeat_interleave(lengths)
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(len(tokens)) - starts[text]
    for _ in range(2):  # a leader's own beginning may be that of all
        text = torch.where(place < shared[text], leader[text], text)
    origin = starts[text] + place
    own = origin == torch.arange(len(tokens))
    keys = (own.cumsum(0) - 1)[origin]
    source = torch.zeros(ids.numel(), dtype=torch.long)
    source[tokens] = keys
    some = slice(0 if beginning else 1, None)
    queries, lengths = (lengths - shared)[some], lengths[some]
    offsets, key_offsets = (torch.nn.functional.pad(each.cumsum(0), (1, 0)).int() for each in (queries, lengths))
    texts = Boundaries(offsets, int(queries.max()), keys, key_offsets, int(lengths.max()))
    return EndToEnd(tokens[own], source, texts)


def _leaders(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return of each text the one, counted from 1, whose beginning it shares, and how many tokens that has.

    Text 0 stands for what all begin with. Texts in turn that share at least :data:`FEWEST` tokens more, as the
    responses to a prompt do, have the first of them.

    texts  ids and positions, ``[2, token]`` each
    """
    everywhere = min((_in_common(texts[0], text) for text in texts[1:]), default=0)
    found, last = [(0, 0), (0, everywhere)], 1
    for number, text in enumerate(texts[1:], start=2):
        beginning = _in_common(texts[last - 1], text)
        if beginning >= everywhere + FEWEST:
            found.append((last, beginning))
        else:
            found.append((0, everywhere))
            last = number
    leader, shared = torch.tensor(found).T
    return leader, shared


def _in_common(one: Tensor, other: Tensor) -> int:
    """Return how many tokens two texts begin with, less than all of either."""
    most = min(one.shape[1], other.shape[1]) - 1
    return int((one[:, :most] == other[:, :most]).all(0).long().cumprod(0).sum())
