"""Heads of models: log-probabilities and values of a response's tokens, and scores of texts.

Shapes: ids and attention masks ``[batch, prompt + time]``, prompts padded on the left, responses on the right; results
``[batch, time]``, float32.
"""

import inspect
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import FloatTensor, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf.models.capacity import BLOCK, CHUNK, FEWEST
from rlhf.models.micro_batches import PackedSamples
from rlhf.models.packable import keeps_texts_apart
from rlhf.models.packing import pack
from rlhf.models.shared_beginnings import read_beginnings_once
from rlhf.models.templates import Tokenizer
from rlhf.models.text import positions
from rlhf.models.varlen import NAME, as_mask, computes
from rlhf.models.virtual_tokens import has_virtual_tokens
from rlhf.randomness import Domain, seed_of
from rlhf.rl.kl import logprobs_and_entropies, logprobs_of


class TokenLogprobs(nn.Module):
    """Compute the log-probabilities of responses under a causal language model, in nats."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor,
        time: int,
        temperature: float,
        entropies: bool,
        count: int | None = None,
        packed: PackedSamples | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of the last ``time`` tokens, and the entropies of their distributions.

        Logits are the largest tensors of all: they are computed in chunks, and again in the backward pass where there
        are several.

        entropies  False returns zeros for them, which saves passes over the logits
        count      tokens to compute, real ones first, of which there are no more; all others get 0. None computes
                   padding too. Under ZeRO-3 it must be the same on all ranks, which gather the head for each chunk
        packed     the same samples with ``count``, which the body then reads in place of padded ones
        """
        model = unwrapped(self.model)
        _, body = body_of(model)
        outputs = _read_by(body, ids, attention_mask, packed)
        hidden, tokens = _before_responses(outputs, time, packed), ids[:, -time:].flatten()
        places, real = None, attention_mask[:, -time:].flatten()
        if packed is not None:
            tokens = packed.tokens
        elif count is not None and count < len(tokens):
            # Sorted, since a GPU that picks by a mask first waits to learn how many it picks.
            places = real.argsort(descending=True, stable=True)[:count]
            hidden, tokens = hidden.index_select(0, places), tokens[places]
        read = partial(_read, model, type(outputs), temperature=temperature, entropies=entropies)
        logprobs, entropy = _in_chunks(model, read, hidden, tokens)
        if packed is not None:
            return packed.padded(logprobs), packed.padded(entropy)
        if places is not None:
            zeros = logprobs.new_zeros(len(real))
            logprobs, entropy = (zeros.index_copy(0, places, values) for values in (logprobs, entropy))
        return logprobs.view(-1, time), entropy.view(-1, time)


def _read_by(body: Any, ids: Tensor, attention_mask: Tensor, packed: PackedSamples | None) -> Any:
    """Return what a model's body returns for samples, which it reads padded or end to end."""
    if packed is None:
        places = positions(attention_mask)
        return body(input_ids=ids, attention_mask=attention_mask, position_ids=places, use_cache=False)
    mask = as_mask(body, packed.offsets, packed.longest)
    return body(input_ids=packed.ids, attention_mask=mask, position_ids=packed.positions, use_cache=False)


def _before_responses(outputs: Any, time: int, packed: PackedSamples | None) -> Tensor:
    """Return the last states one position before each response token, ``[token, width]``."""
    if packed is None:
        return outputs.last_hidden_state[:, -time - 1 : -1].flatten(0, 1)
    return outputs.last_hidden_state[0].index_select(0, packed.before)


def _read(
    model: Any, outputs: Callable[..., Any], hidden: Tensor, tokens: Tensor, *, temperature: float, entropies: bool
) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of tokens, and the entropies of their distributions, as the states give them.

    outputs  the type of what the model's body returns
    hidden   ``[token, width]``, the body's last states, one position before each token
    """
    logits = _logits(model, outputs, hidden)
    if entropies:
        return logprobs_and_entropies(logits, tokens, temperature)
    logprobs = logprobs_of(logits, tokens, temperature)
    return logprobs, torch.zeros_like(logprobs)


def _logits(model: Any, outputs: Callable[..., Any], hidden: Tensor) -> Tensor:
    """Return logits ``[token, vocabulary]`` of the last states of a model's body; arguments as of :func:`_read`."""
    # The model's own forward pass: it may scale and cap its logits, and have hooks.
    with _in_place_of_body(model, _Known(outputs(last_hidden_state=hidden[None]))):
        return model(input_ids=hidden.new_zeros(1, len(hidden), dtype=torch.long), use_cache=False).logits[0]


def learned_tokens(model: Any, outputs: Any, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return of tokens, as a causal language model's body reads the text before each: their log-probabilities, the
    entropies of their distributions, and whether they are the most likely; the last two without gradients.

    outputs  what the body returned
    hidden   ``[token, width]``, its last states, one position before each token
    """

    def read(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = _logits(model, type(outputs), hidden)
        logprobs, entropies = logprobs_and_entropies(logits, tokens)
        with torch.no_grad():
            likeliest = logits.gather(-1, tokens[:, None]).squeeze(-1) == logits.amax(-1)
        return logprobs, entropies.detach(), likeliest

    logprobs, entropies, likeliest = _in_chunks(model, read, hidden, tokens)
    return logprobs, entropies, likeliest


def _in_chunks(
    model: Any, read: Callable[[Tensor, Tensor], tuple[Tensor, ...]], hidden: Tensor, tokens: Tensor
) -> tuple[Tensor, ...]:
    """Return what ``read`` makes of tokens and the states before them, in chunks that limit the logits at a time.

    Of several chunks the logits are computed again in the backward pass.
    """
    size = max(FEWEST, CHUNK // model.config.get_text_config().vocab_size)
    if len(tokens) > size and torch.is_grad_enabled():
        read = partial(checkpoint, read, use_reentrant=False, preserve_rng_state=False)
    chunks = [read(*chunk) for chunk in zip(hidden.split(size), tokens.split(size), strict=True)]
    return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))


class _Known(nn.Module):
    """A model's body whose result is known."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self._outputs = outputs

    @property
    def decoder(self) -> nn.Module:
        # OPT's language model goes past its body to the decoder within.
        return self

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._outputs


def body_of(language_model: nn.Module) -> tuple[str, Any]:
    """Return the name and the module of all that comes before the head."""
    # Llama 4's base_model_prefix is not the name.
    return next(child for child in language_model.named_children() if isinstance(child[1], PreTrainedModel))


@contextmanager
def _in_place_of_body(model: Any, other: nn.Module) -> Generator[None]:
    name, body = body_of(model)
    modules = model._modules
    modules[name] = other
    try:
        yield
    finally:
        modules[name] = body


class TokenValues(nn.Module):
    """Compute values of a response's tokens by a sequence classifier with one label.

    The value of a token is read one position earlier: it is the estimate *before* the token is emitted.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        compute_in_fp32(unwrapped(model).score)

    def forward(self, ids: Tensor, attention_mask: Tensor, time: int, packed: PackedSamples | None = None) -> Tensor:
        """Return the values before each of the last ``time`` tokens.

        packed  the same samples, which the body then reads in place of padded ones; padding then gets 0
        """
        classifier = unwrapped(self.model)
        body = getattr(classifier, classifier.base_model_prefix)
        hidden = _before_responses(_read_by(body, ids, attention_mask, packed), time, packed)
        values = classifier.score(hidden).squeeze(-1).float()
        return values.view(-1, time) if packed is None else packed.padded(values)


class SequenceScores(nn.Module):
    """Score texts, padded on the right, by a sequence classifier with one label, at a text's last token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        compute_in_fp32(unwrapped(model).score)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return raw scores ``[batch]``."""
        return _last_token_logits(unwrapped(self.model), ids, attention_mask).squeeze(-1).float()


def pack_texts(classifier: Any) -> None:
    """Make a decoder's sequence classifier pack its texts, which are padded on the right, and score in fp32."""
    compute_in_fp32(classifier.score)
    read_beginnings_once(classifier, on_gpus=True)

    def forward(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=_last_token_logits(classifier, input_ids, attention_mask))

    classifier.forward = forward


def packs_texts(classifier: Any) -> bool:
    """Return whether a sequence classifier reads texts in packed rows."""
    body = getattr(classifier, classifier.base_model_prefix)
    return keeps_texts_apart(body.config) and not has_virtual_tokens(body)


def _last_token_logits(classifier: Any, ids: Tensor, attention_mask: Tensor) -> FloatTensor:
    """Return logits ``[batch, label]``."""
    body = getattr(classifier, classifier.base_model_prefix)
    if packs_texts(classifier):
        # Where each text is attended to by itself, a long row costs no more, and needs no filling.
        by_text = body.config._attn_implementation == NAME and computes(ids.device, body.dtype)
        texts = pack(ids, attention_mask, in_one_row=by_text)
        hidden = body(input_ids=texts.ids, position_ids=texts.positions, use_cache=False).last_hidden_state
        return classifier.score(hidden.flatten(0, 1)[texts.ends])
    hidden = body(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return classifier.score(hidden[torch.arange(len(ids), device=ids.device), attention_mask.sum(-1) - 1])


class OwnScores(nn.Module):
    """Score texts, padded on the right, by an encoder's own forward pass, whatever states its head reads."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        # Tokenizers give types also to models that take no types, or that know one type alone.
        takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        self._typed = takes_types and (getattr(model.config, "type_vocab_size", None) or 0) > 1

    def forward(self, ids: Tensor, attention_mask: Tensor, types: Tensor) -> Tensor:
        """Return raw scores ``[batch]``; ``types`` ``[batch, time]`` are 0 in the first text and 1 in the second."""
        named = {"token_type_ids": types} if self._typed else {}
        return self.model(input_ids=ids, attention_mask=attention_mask, **named).logits.squeeze(-1).float()


def unwrapped(model: Any) -> Any:
    """Return the model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def compute_in_fp32(head: nn.Module) -> None:
    """Make every linear layer of a head multiply in float32, whatever type its input and weights have."""
    for part in head.modules():
        if isinstance(part, nn.Linear):
            part.forward = partial(_linear_in_fp32, part)


def _linear_in_fp32(layer: Any, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
    product = _Fp32Product.apply(input, layer.weight)
    return product if layer.bias is None else product + layer.bias.float()


class _Fp32Product(torch.autograd.Function):
    # Casting the weight outside would keep an fp32 copy of the largest matrix of all for the backward pass.

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        # A plain view could not be changed in place, as forbid_rows_without_token does.
        return torch.ops.aten._unsafe_view(_product(_rows(hidden), weight.T), [*hidden.shape[:-1], len(weight)])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch passes gradients by position
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        rows, product = _rows(grad), _product
        if hidden.dtype == weight.dtype == torch.bfloat16:
            # Both gradients are rounded to bf16 anyway: rounding the terms of their sums too adds no larger an error.
            rows = rows.bfloat16()
            product = _product if _exact_in_bf16(hidden, weight) else torch.mm
        of_hidden = of_weight = None
        if ctx.needs_input_grad[0]:
            of_hidden = product(rows, weight).to(hidden.dtype).view_as(hidden)
        if ctx.needs_input_grad[1]:
            of_weight = product(rows.T, _rows(hidden)).to(weight.dtype)
        return of_hidden, of_weight


def _rows(states: Tensor) -> Tensor:
    return states.reshape(-1, states.shape[-1])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of two matrices in float32."""
    if _exact_in_bf16(left, right):
        return torch.mm(left, right, out_dtype=torch.float32)
    if right.is_cuda or right.dtype == torch.float32:
        return left.float() @ right.float()
    # The cast of a whole head would leave the processor's cache before it is multiplied.
    width = max(1, BLOCK // len(right))
    result = torch.empty(len(left), right.shape[1])
    for columns, part in zip(result.split(width, dim=1), right.split(width, dim=1), strict=True):
        torch.mm(left.float(), part.float(), out=columns)
    return result


def _exact_in_bf16(left: Tensor, right: Tensor) -> bool:
    """Return whether a GPU's tensor cores take both: they multiply bf16 without rounding, and add in fp32."""
    return left.is_cuda and left.dtype == right.dtype == torch.bfloat16


def forbid_rows_without_token(model: Any, tokenizer: Tokenizer) -> None:
    """Make a language model give probability 0 to rows of its embeddings that are no token of the tokenizer.

    Embeddings are padded to round sizes, and such a row decodes to nothing. The logits are changed where they leave the
    model, so that the sampler and every log-probability and entropy agree.
    """
    rows = torch.tensor(rows_without_token(model, tokenizer))
    if len(rows):

        def forbid(module: nn.Module, arguments: Any, output: Any) -> None:  # noqa: ARG001 - torch's signature
            nonlocal rows
            rows = rows.to(output.logits.device)  # once: a copy to a GPU waits for what it computes
            output.logits.index_fill_(-1, rows, -math.inf)

        model.register_forward_hook(forbid)


def rows_without_token(model: Any, tokenizer: Tokenizer) -> list[int]:
    """Return the rows of a model's embeddings that are no token of the tokenizer."""
    tokens = set(tokenizer.get_vocab().values())
    return [row for row in range(model.config.get_text_config().vocab_size) if row not in tokens]


def initialise_head(weight: Tensor, domain: Domain, seed: int) -> None:
    """Draw a head from N(0, 1/√(d + 1)), d its input width: Stiennon et al. 2020; Huang et al. 2024, detail 11."""
    generator = torch.Generator().manual_seed(seed_of(domain, seed))
    deviation = 1 / math.sqrt(weight.shape[-1] + 1)
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)
