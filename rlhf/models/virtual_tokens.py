"""Virtual tokens: learned embeddings, or keys and values in every layer, before every text.

PEFT makes and keeps them (:mod:`peft.tuners`); here they are applied within the model's body. So every head, mask,
position and cache of ours works as it does without them: a body with virtual tokens takes and returns what the plain
body does, for the text alone.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig
from peft.tuners.p_tuning.model import PromptEncoder
from peft.tuners.prefix_tuning.model import PrefixEncoder
from peft.utils.integrations import gather_params_ctx
from torch import Tensor
from transformers import DynamicCache

TRAINED = "default"
"""PEFT's name of the adapter that trains."""


class AnchoredEncoder(PromptEncoder):
    """P-tuning's encoder whose prompt holds embeddings of real words between the pseudo-tokens.

    Liu et al. 2021 (arXiv:2103.10385), §3.2, the template {h_0 … h_i, e(x), h_i+1 …}.

    anchors  place in the prompt to the word's embedding ``[dim]``; may be empty
    """

    def __init__(self, config: Any, anchors: Mapping[int, Tensor]) -> None:
        super().__init__(config)
        self.anchors = dict(anchors)

    def forward(self, indices: Tensor) -> Tensor:
        """Return the prompt ``[batch, token, dim]``; the LSTM reads pseudo-tokens in the anchors' places too."""
        # cuDNN's LSTM has a backward pass in training mode alone, in which PPO's models never are.
        with torch.backends.cudnn.flags(enabled=False):
            prompt = super().forward(indices)
        places = torch.zeros(prompt.shape[1], dtype=torch.bool, device=prompt.device)
        words = torch.zeros_like(prompt[0])
        for place, embedding in self.anchors.items():
            places[place] = True
            words[place] = embedding.to(words)
        return torch.where(places[:, None], words, prompt)

    def unsharded(self, config: Any) -> "AnchoredEncoder":
        """Return another encoder of this prompt, whose weights are whole."""
        return AnchoredEncoder(config, self.anchors)


class StartedPrefixEncoder(PrefixEncoder):
    """Prefix tuning's encoder whose output is added to keys and values that the model has itself.

    So training begins at a model that reads a text before each text, rather than at one whose attention is lost among
    random keys (Li and Liang 2021, arXiv:2101.00190, §7.4).

    start  ``[token, layers · 2 · heads · head size]``, see :func:`keys_and_values`
    """

    def __init__(self, config: Any, start: Tensor) -> None:
        super().__init__(config)
        self.start = start

    def forward(self, prefix: Tensor) -> Tensor:
        """Return keys and values ``[batch, token, layers · 2 · heads · head size]``."""
        change = super().forward(prefix)
        return change + self.start.to(change)[prefix]

    def unsharded(self, config: Any) -> "StartedPrefixEncoder":
        """Return another encoder of this prefix, whose weights are whole and on the CPU."""
        return StartedPrefixEncoder(config, self.start.cpu())


def apply_in_body(model: Any) -> None:
    """Make a PEFT model of a prompt-learning method apply its virtual tokens within its body.

    Their position ids are 0 … n - 1, and the text's begin at n, as in PEFT. Learned embeddings stand directly before
    the text, behind padding on its left: a sliding window counts padding too.
    """
    base: Any = model.get_base_model()
    whole_body = getattr(base, base.base_model_prefix)
    # OPT's language model goes past its body to the decoder within.
    body = getattr(whole_body, "decoder", whole_body)
    plain, embeddings = body.forward, body.get_input_embeddings()
    count = model.active_peft_config.num_virtual_tokens

    def forward(
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: None = None,  # noqa: ARG001 - some heads pass it on
        **named: Any,
    ) -> Any:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        rows = len(input_ids)
        mask = torch.cat([attention_mask.new_ones(rows, count), attention_mask], dim=1)
        positions = None if position_ids is None else position_ids + count
        columns = None
        if not isinstance(model.active_peft_config, PrefixTuningConfig):
            columns = _behind_padding(attention_mask, count)
            mask = mask.gather(1, columns)
        if cache is not None and cache.get_seq_length():
            return plain(input_ids=input_ids, attention_mask=mask, position_ids=positions, cache=cache, **named)
        if columns is None:
            cache = DynamicCache(config=body.config) if cache is None else cache
            for number, layer in enumerate(model.get_prompt(1).layers):
                cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), number)
            return plain(input_ids=input_ids, attention_mask=mask, position_ids=positions, cache=cache, **named)
        if positions is not None:
            places = torch.arange(count, device=positions.device)
            positions = torch.cat([places.expand(rows, count), positions.expand(rows, -1)], dim=1).gather(1, columns)
        texts = embeddings(input_ids)
        # An encoder of several rows at once would round by their number.
        whole = torch.cat([model.get_prompt(1).to(texts).expand(rows, -1, -1), texts], dim=1)
        whole = whole.gather(1, columns[..., None].expand_as(whole))
        outputs = plain(inputs_embeds=whole, attention_mask=mask, position_ids=positions, cache=cache, **named)
        outputs.last_hidden_state = outputs.last_hidden_state[:, count:]
        return outputs

    body.forward = forward
    whole_body.has_virtual_tokens = True
    # PEFT's own forward pass would put the virtual tokens before the text once more.
    vars(model)["forward"] = base  # not as its submodule


def _behind_padding(attention_mask: Tensor, count: int) -> Tensor:
    """Return the order ``[batch, count + time]`` of columns that puts ``count`` tokens behind the padding on the left.

    attention_mask  ``[batch, time]``, of the text alone
    """
    start = attention_mask.long().argmax(dim=1, keepdim=True)
    place = torch.arange(count + attention_mask.shape[1], device=attention_mask.device)
    moved = torch.where(place < start + count, place - start, place)
    return torch.where(place < start, place + count, moved)


def has_virtual_tokens(body: Any) -> bool:
    """Return whether :func:`apply_in_body` was called on the model of this body."""
    return getattr(body, "has_virtual_tokens", False)


def computed(model: PeftModel, weights: Mapping[str, Tensor], device: str | torch.device = "cpu") -> Tensor:
    """Return the virtual tokens ``[token, …]`` as PEFT stores them, on the CPU: an encoder's outputs, without it.

    weights  the encoder's by their names in the model, whole
    device   where the encoder computes, in its weights' precision
    """
    encoder: Any = model.prompt_encoder[TRAINED]
    config = model.peft_config[TRAINED]
    prefix = f"prompt_encoder.{TRAINED}."
    own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    tokens = own["embedding.weight"]
    if len(own) == 1:
        return tokens
    # The model's own encoder is sharded.
    whole = encoder.unsharded(config).to(device, tokens.dtype)
    whole.load_state_dict(own)
    with torch.no_grad():
        return whole(torch.arange(len(tokens), device=device)[None])[0].cpu()


def without_encoder(config: Any) -> PromptTuningConfig | PrefixTuningConfig:
    """Return PEFT's settings of the same virtual tokens, learned as they are."""
    common = {"num_virtual_tokens": config.num_virtual_tokens, "task_type": config.task_type}
    sizes = {name: getattr(config, name) for name in ("token_dim", "num_layers", "num_attention_heads")}
    kind = PrefixTuningConfig if isinstance(config, PrefixTuningConfig) else PromptTuningConfig
    return kind(**common, **sizes, num_transformer_submodules=1)


@torch.no_grad()
def keys_and_values(model: Any, tokens: Sequence[int]) -> Tensor:
    """Return the keys and values that a causal model has of a text in all layers, as PEFT lays out a prefix.

    That is ``[token, layers · 2 · heads · head size]``, for each layer first its keys. A collective where the model is
    sharded: each rank then gathers one module at a time.
    """
    body = getattr(model, model.base_model_prefix)
    with ExitStack() as gathering:

        def gather(module: Any, _: Any) -> None:
            gathering.enter_context(gather_params_ctx(list(module.parameters(recurse=False)), modifier_rank=None))

        def release(_: Any, __: Any, ___: Any) -> None:
            gathering.close()

        owners = [part for part in body.modules() if next(part.parameters(recurse=False), None) is not None]
        hooks = [part.register_forward_pre_hook(gather) for part in owners]
        hooks += [part.register_forward_hook(release) for part in owners]
        ids = torch.tensor([tokens], device=model.device)
        cache = DynamicCache(config=body.config)
        body(input_ids=ids, attention_mask=torch.ones_like(ids), cache=cache, use_cache=True)
        for hook in hooks:
            hook.remove()
    layers: list[Any] = cache.layers
    parts = [part[0].transpose(0, 1).flatten(1) for layer in layers for part in (layer.keys, layer.values)]
    return torch.cat(parts, dim=1)


def embeddings_of(model: Any, tokens: Sequence[int]) -> Tensor:
    """Return the input embeddings ``[token, dim]`` of token ids, of a sharded or whole model. A collective."""
    embeddings = model.get_input_embeddings()
    with gather_params_ctx(list(embeddings.parameters()), modifier_rank=None), torch.no_grad():
        return embeddings(torch.tensor(tokens, device=embeddings.weight.device)).detach().clone()
