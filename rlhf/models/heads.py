"""Heads of models: log-probabilities and values of a response's tokens, and scores of texts.

Shapes: ids and attention masks ``[batch, prompt + time]``, prompts padded on the left, responses on the right; results
``[batch, time]``, float32.
"""

import inspect
import math
from functools import partial
from typing import Any

import torch
from torch import FloatTensor, Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf.models.packing import keeps_texts_apart, pack
from rlhf.models.templates import Tokenizer
from rlhf.models.text import positions
from rlhf.models.virtual_tokens import has_virtual_tokens
from rlhf.randomness import Domain, seed_of
from rlhf.rl.kl import entropy_from_logits, logprobs_of


class TokenLogprobs(nn.Module):
    """Compute the log-probabilities of responses under a causal language model, in nats."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, attention_mask: Tensor, time: int, temperature: float, entropies: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of the last ``time`` tokens, and the entropies of their distributions.

        entropies  False returns zeros for them, which saves a pass over the logits
        """
        width = ids.shape[1]
        # Logits are the largest tensor of all: only those that predict a response token are computed. They are selected
        # by index and not by number: a slice is not contiguous, and a matrix product with it is fifty times slower.
        logits = unwrapped(self.model)(
            input_ids=ids,
            attention_mask=attention_mask,
            position_ids=positions(attention_mask),
            logits_to_keep=torch.arange(width - time - 1, width - 1, device=ids.device),
            use_cache=False,
        ).logits
        logprobs = logprobs_of(logits, ids[:, width - time :], temperature)
        return logprobs, entropy_from_logits(logits, temperature) if entropies else torch.zeros_like(logprobs)


class TokenValues(nn.Module):
    """Compute values of a response's tokens by a sequence classifier with one label.

    The value of a token is read one position earlier: it is the estimate *before* the token is emitted.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        compute_in_fp32(unwrapped(model).score)

    def forward(self, ids: Tensor, attention_mask: Tensor, time: int) -> Tensor:
        """Return the values before each of the last ``time`` tokens."""
        classifier = unwrapped(self.model)
        body = getattr(classifier, classifier.base_model_prefix)
        hidden = body(
            input_ids=ids, attention_mask=attention_mask, position_ids=positions(attention_mask), use_cache=False
        ).last_hidden_state
        return classifier.score(hidden[:, -time - 1 : -1].contiguous()).squeeze(-1).float()


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

    def forward(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=_last_token_logits(classifier, input_ids, attention_mask))

    classifier.forward = forward


def _last_token_logits(classifier: Any, ids: Tensor, attention_mask: Tensor) -> FloatTensor:
    """Return logits ``[batch, label]``."""
    body = getattr(classifier, classifier.base_model_prefix)
    if keeps_texts_apart(body.config) and not has_virtual_tokens(body):
        texts = pack(ids, attention_mask)
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
        return nn.functional.linear(hidden.float(), weight.float())

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch passes gradients by position
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        of_hidden = of_weight = None
        if ctx.needs_input_grad[0]:
            of_hidden = (grad @ weight.float()).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (grad.flatten(0, -2).T @ hidden.flatten(0, -2).float()).to(weight.dtype)
        return of_hidden, of_weight


def forbid_rows_without_token(model: Any, tokenizer: Tokenizer) -> None:
    """Make a language model give probability 0 to rows of its embeddings that are no token of the tokenizer.

    Embeddings are padded to round sizes, and such a row decodes to nothing. The logits are changed where they leave the
    model, so that the sampler and every log-probability and entropy agree.
    """
    tokens = set(tokenizer.get_vocab().values())
    rows = torch.tensor([row for row in range(model.config.get_text_config().vocab_size) if row not in tokens])
    if len(rows):

        def forbid(module: nn.Module, arguments: Any, output: Any) -> None:  # noqa: ARG001 - torch's signature
            output.logits.index_fill_(-1, rows.to(output.logits.device), -math.inf)

        model.register_forward_hook(forbid)


def initialise_head(weight: Tensor, domain: Domain, seed: int) -> None:
    """Draw a head from N(0, 1/√(d + 1)), d its input width: Stiennon et al. 2020; Huang et al. 2024, detail 11."""
    generator = torch.Generator().manual_seed(seed_of(domain, seed))
    deviation = 1 / math.sqrt(weight.shape[-1] + 1)
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)
