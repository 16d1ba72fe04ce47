"""Count what a decoder keeps in memory for its backward pass, from its folder alone and without torch.

The formulas follow what torch saves for transformers' layers with scaled-dot-product attention and a mask, as the
texts of a batch differ in length or share a row. A test compares them with the bytes that torch does save, for Llama,
GPT-2 and Qwen3 within 3 %, and for other decoders, whose nearest relative among these is taken, within 20 %.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rlhf.config.tuning import (
    BottomFrozenTuning,
    Ia3Tuning,
    LoraTuning,
    LowRankTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    QLoraTuning,
    TopTuning,
    TransferTuning,
    Tuning,
)
from rlhf.models.layout import config_file, shapes
from rlhf.models.packable import attends_to_whole_texts, has_fused_kernels

_LAYER = re.compile(r"\.(\d+)\.")
_STEPWISE = ("gelu_new", "gelu_fast", "quick_gelu", "gelu_python", "gelu_pytorch_tanh_python")
"""Activations that transformers computes in several steps, of which each keeps a tensor."""


@dataclass(frozen=True)
class Architecture:
    """The sizes that a decoder's memory follows from; widths in elements."""

    parameters: int
    layer: int
    """Parameters of one decoder layer."""
    head: int
    """Parameters of the language head; 0 where it is tied to the embeddings or missing."""
    embeddings: int
    """Parameters of the embeddings, of tokens and of positions."""
    linear: Mapping[str, tuple[int, int]]
    """Inputs and outputs of each matrix of the layers, by name."""
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all key heads together, which is that of the values."""
    intermediate: int
    """Inner width of the feed-forward layers; of a mixture of experts, that of a token's experts together."""
    gated: bool
    """Whether the feed-forward layers have a gate, as Llama's."""
    activation: str
    norms: int
    """Normalisations of a layer that are as wide as the model."""
    rms: bool
    """Whether these are root mean squares, which transformers computes in fp32."""
    normed_heads: bool
    """Whether queries and keys are normalised in each head, as Qwen3's."""
    wide_norms: bool
    """Whether the norms' weights multiply in fp32, as Gemma's."""
    eager: bool
    """Whether the attention's probabilities are kept, since no kernel computes it, as Gemma 2's."""
    inputs_first: bool = False
    """Whether the matrices have their inputs as rows, and so are no linear layers of torch's, as GPT-2's."""
    by_text: bool = False
    """Whether a GPU can compute packed texts one by one (:mod:`rlhf.models.varlen`), without a mask."""
    fused: bool = False
    """Whether Liger's kernels compute norms and gates, each of which keeps its inputs alone."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What the folder says of the model, as transformers writes it."""

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Read a plain folder or the base of an adapter's; errors as :func:`rlhf.models.layout.shapes`."""
        file = config_file(folder)
        content: dict[str, Any] = json.loads(file.read_text())
        config = content.get("text_config", content)
        weights = shapes(file.parent)
        hidden, layers, heads = (
            _first(config, *names)
            for names in (
                ("hidden_size", "n_embd", "d_model"),
                ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
                ("num_attention_heads", "n_head", "n_heads", "num_heads"),
            )
        )
        head_width = _first(config, "head_dim", default=hidden // heads)
        keys = _first(config, "num_key_value_heads", "multi_query_group_num", default=heads) * head_width
        vocabulary = _first(config, "vocab_size")
        in_layers = {name: shape for name, shape in weights.items() if _LAYER.search(name)}
        outside = {name: shape for name, shape in weights.items() if name not in in_layers}
        tables = [math.prod(shape) for shape in outside.values() if len(shape) == 2 and shape[0] == vocabulary]
        head = tables[-1] if len(tables) > 1 else 0
        inputs_first = config.get("model_type") in _INPUTS_FIRST
        order = 1 if inputs_first else -1
        linear = {
            name: (shape[::order][0], shape[::order][1])
            for name, shape in in_layers.items()
            if len(shape) == 2 and vocabulary not in shape
        }
        dense = _first(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=4 * hidden)
        experts = _first(config, "num_experts_per_tok", default=0)
        inner = experts * _first(config, "moe_intermediate_size", default=dense) if experts else dense
        inner_matrices = sum(
            math.prod(shape) for shape in linear.values() if dense in shape or 2 * dense in shape
        ) / max(1, layers * hidden * dense)
        norms = [name for name, shape in in_layers.items() if list(shape) == [hidden] and name.endswith("weight")]
        return cls(
            parameters=sum(map(math.prod, weights.values())),
            layer=sum(map(math.prod, in_layers.values())) // layers,
            head=head,
            embeddings=sum(math.prod(shape) for shape in outside.values() if len(shape) == 2) - head,
            linear=linear,
            layers=layers,
            hidden=hidden,
            vocabulary=vocabulary,
            heads=heads,
            queries=heads * head_width,
            keys=keys,
            intermediate=inner,
            gated=inner_matrices > 2.5 or experts > 0,
            activation=str(next((config[name] for name in _ACTIVATIONS if config.get(name)), "")),
            norms=max(1, round(len(norms) / layers)),
            rms=not any(name.removesuffix("weight") + "bias" in weights for name in norms),
            normed_heads=head_width != hidden and any(list(shape) == [head_width] for shape in in_layers.values()),
            wide_norms=str(config.get("model_type")).startswith(_WIDE_NORMS),
            eager=config.get("model_type") == "bloom"
            or config.get("attn_logit_softcapping") is not None
            or any(name.endswith("sinks") for name in in_layers),
            inputs_first=inputs_first,
            by_text=attends_to_whole_texts(config),
            fused=has_fused_kernels(str(config.get("model_type"))),
            config=config,
        )


_INPUTS_FIRST = ("gpt2", "openai-gpt")
"""Models whose matrices lie in the files with their inputs as rows."""
_WIDE_NORMS = ("gemma", "olmo2", "olmo3")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")


def _first(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    value = next((config[name] for name in names if isinstance(config.get(name), int)), default)
    if value is None:
        raise KeyError(names[0])
    return value


@dataclass(frozen=True)
class Learned:
    """What a way of fine-tuning trains of a model."""

    parameters: int
    head: bool = False
    """Whether the language head trains, by itself or as the embeddings that it is tied to."""
    added: int = 0
    """Parameters that the base does not have, trained ones included."""
    whole_layers: int = 0
    """Layers whose own weights train, so that the inputs of these are kept."""
    adapter_elements: float = 0.0
    """Elements that the adapters of a layer keep for each token."""
    adapter_inputs: float = 0.0
    """Of these, elements that are also inputs of the layer's own matrices."""
    adapter_masks: float = 0.0
    """Bytes that their dropout keeps for each token of a layer."""
    tokens: int = 0
    """Virtual tokens before each text."""
    bits: float = 0.0
    """Bits of a weight of the layers' matrices; 0 where these have the model's precision."""
    keeps_base: bool = False
    """Whether the weights that training begins with stay as they are, so that PPO needs no copy of them."""


def learned(model: Architecture, tuning: Tuning, *, scores: bool) -> Learned:
    """Return what a method trains.

    scores  whether the model has a score head, which is trained whole, in place of its language head
    """
    head = model.hidden if scores else model.head
    rest = model.parameters - model.head - model.layers * model.layer
    whole = model.parameters - model.head + head
    score = head if scores else 0
    tokens_width = model.layers * 2 * model.keys
    match tuning:
        case TopTuning(blocks=blocks):
            count = min(blocks, model.layers)
            return Learned(count * model.layer + rest - model.embeddings + head, head=bool(head), whole_layers=count)
        case BottomFrozenTuning(blocks=blocks):
            count = max(0, model.layers - blocks)
            return Learned(count * model.layer + rest - model.embeddings + head, head=bool(head), whole_layers=count)
        case TransferTuning(body=body):
            fresh = head or model.vocabulary * model.hidden
            added = 0 if head else fresh
            if body == "frozen":
                return Learned(fresh, True, added)
            return Learned(whole + added, True, added, whole_layers=model.layers)
        case LowRankTuning():
            return _low_rank(model, tuning, score)
        case PromptTuning(tokens=tokens):
            added = tokens * model.hidden
            return Learned(added + score, added=added, tokens=tokens, keeps_base=True)
        case PTuning(tokens=tokens, hidden_size=width):
            width = width or model.hidden
            # A bidirectional LSTM of two layers and an MLP of two: peft's prompt encoder.
            lstm = 8 * width * (model.hidden + width + 2) + 8 * width * (3 * width + 2)
            added = tokens * model.hidden + lstm + (2 * width + 1) * (2 * width + model.hidden)
            return Learned(added + score, added=added, tokens=tokens, keeps_base=True)
        case PrefixTuning(tokens=tokens, hidden_size=width):
            width = width or model.hidden
            added = tokens * model.keys + width * (model.keys + 1) + tokens_width * (width + 1)
            return Learned(added + score, added=added, tokens=tokens, keeps_base=True)
        case PTuningV2(tokens=tokens):
            added = tokens * tokens_width
            return Learned(added + score, added=added, tokens=tokens, keeps_base=True)
        case Ia3Tuning():
            added = model.layers * (2 * model.keys + model.intermediate)
            kept = 2 * model.keys + model.intermediate
            return Learned(added + score, added=added, adapter_elements=kept, keeps_base=True)
        case _:
            return Learned(whole, True, whole_layers=model.layers)


def _low_rank(model: Architecture, tuning: LowRankTuning, head: int) -> Learned:
    chosen = {
        name: shape
        for name, shape in model.linear.items()
        if tuning.targets is None or any(name.removesuffix(".weight").endswith(end) for end in tuning.targets)
    }
    added = tuning.rank * sum(map(sum, chosen.values()))
    if isinstance(tuning, LoraTuning) and tuning.dora:
        added += sum(width for _, width in chosen.values())
    inputs = sum(width for width, _ in chosen.values()) / model.layers
    ranks = tuning.rank * len(chosen) / model.layers
    # Matrices with one input keep it once, except behind a dropout of their own.
    kept = inputs if tuning.dropout else min(inputs, model.norms * model.hidden + model.intermediate)
    bits = 0.0
    if isinstance(tuning, QLoraTuning):
        # A constant of 32 bits for 64 weights, or of 8 bits with one of 32 for 256 of those (Dettmers et al., §3).
        bits = 4 + (8 / 64 + 32 / (64 * 256) if tuning.double_quantisation else 32 / 64)
    return Learned(
        added + head,
        added=added,
        adapter_elements=kept + ranks,
        adapter_inputs=0.0 if tuning.dropout else kept,
        adapter_masks=inputs if tuning.dropout else 0.0,
        bits=bits,
        keeps_base=True,
    )


def weight_bytes(model: Architecture, part: Learned, width: int, *, scores: bool) -> float:
    """Return the bytes of all weights, of ``width`` bytes each where they are not quantised."""
    count = model.parameters + part.added - (model.head - model.hidden if scores else 0)
    quantised = sum(map(math.prod, model.linear.values())) if part.bits else 0
    return (count - quantised) * width + quantised * part.bits / 8


def saved(
    model: Architecture,
    part: Learned,
    width: int,
    rows: int,
    time: int,
    *,
    checkpointing: bool = False,
    keeps_inputs: bool = False,
    masked: bool = True,
) -> float:
    """Return the bytes that a forward pass of the body saves for its backward pass, its last norm included.

    width          bytes of an element of the model's precision
    rows, time     shape of the batch of token ids
    checkpointing  keeps the input of each layer alone, and what one layer saves as it is computed again
    keeps_inputs   whether frozen linear layers keep their inputs too, as DeepSpeed's own do
    masked         whether attention has a mask; False where texts are computed one by one
    """
    time += part.tokens
    tokens = rows * time
    masked_time = time if masked else 0
    layer = tokens * _saved_by_layer(model, part, width, masked_time)
    elements = part.adapter_elements
    if keeps_inputs and not model.inputs_first:
        elements += max(0.0, _inputs(model) - part.adapter_inputs)
    frozen = tokens * (_frozen(model, width, masked_time) + elements * width + part.adapter_masks)
    scaled = width if part.whole_layers and not model.fused else 0
    norm = tokens * model.hidden * (_normed(model, width) + scaled)
    if checkpointing:
        return tokens * model.layers * model.hidden * width + max(layer, frozen) + norm
    return part.whole_layers * layer + (model.layers - part.whole_layers) * frozen + norm


def _saved_by_layer(model: Architecture, part: Learned, width: int, time: int) -> float:
    """Return bytes for each token of a layer whose weights train, or none of whose weights do but adapters."""
    if not part.whole_layers:
        return 0.0
    # The output of a norm is the input of a matrix; a root mean square keeps also what its own weight multiplies.
    inputs = model.norms * model.hidden + (model.queries + model.keys if model.normed_heads else 0)
    norms = (4 if model.wide_norms else width) * inputs if model.rms and not model.fused else 0
    return _frozen(model, width, time) + norms + _inputs(model) * width


def _inputs(model: Architecture) -> int:
    """Return elements for each token of the inputs of a layer's matrices, but for those that :func:`_frozen` counts."""
    return model.norms * model.hidden + (0 if model.activation == "relu" and not model.gated else model.intermediate)


def _frozen(model: Architecture, width: int, time: int) -> float:
    """Return bytes for each token of a layer without weights that train, through which a gradient passes."""
    norms = model.norms * model.hidden * _normed(model, width)
    norms += _normed(model, width) * (model.queries + model.keys) if model.normed_heads else 0
    # Queries, keys, values and results. With a mask, keys and values are repeated for each of their queries. The mask
    # is converted in each layer; the kernel keeps a normaliser in fp32 for each head.
    shared = 4 * model.queries + time if time else 2 * (model.queries + model.keys)
    attention = width * shared + 4 * model.heads
    if model.eager:
        # The probabilities in fp32 and in the model's precision, and the capped products.
        attention += model.heads * time * (4 + 2 * width)
    return norms + attention + width * _feed_forward(model) * model.intermediate


def _normed(model: Architecture, width: int) -> int:
    """Return bytes of an element of a norm's input as it is kept: transformers converts it for a root mean square."""
    return 4 if model.rms and not model.fused else width


def _feed_forward(model: Architecture) -> int:
    """Return how many tensors as wide as a feed-forward layer are kept beside the input of its last matrix."""
    if model.activation in _STEPWISE:
        return 4 + 2 * model.gated
    return 3 - model.fused if model.gated else 1


def work(model: Architecture, width: int, rows: int, time: int, *, backward: bool, masked: bool = True) -> float:
    """Return the bytes of a layer's intermediate results at their most.

    backward  whether they are those of its gradients, or of a pass that keeps nothing for them
    masked    as for :func:`saved`
    """
    inner = 3 if backward else 1 + _feed_forward(model)
    narrow = 2 if backward else 4
    return rows * time * (inner * model.intermediate + narrow * model.hidden + masked * time) * width
