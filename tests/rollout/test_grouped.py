"""The attention of steps on a GPU, against transformers' own: on a CPU by torch's kernel in the place of cuDNN's."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.models import varlen
from rlhf.models.packable import PACKABLE
from rlhf.rollout import grouped
from rlhf.rollout.decoding import UNPACKED, Decoder, decodes_in_slots
from rlhf.rollout.slots import LayerShape
from tests.rollout.test_decoding import LAYERS, LIKE_A_GPU, NUMBERS, PROMPTS, model_of_type, slowly

OWN_WAY = {"falcon", "gemma2"}
"""Types whose layers ask for no interface, or cap their products, for which transformers has no SDPA."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the keys of all calls of the attention that is replaced."""
    shapes: list[tuple[int, ...]] = []
    attention: Any = grouped.scaled_dot_product_attention

    def called(query: Tensor, key: Tensor, *more: Any, **named: Any) -> Tensor:
        shapes.append(tuple(key.shape))
        return attention(query, key, *more, **named)

    monkeypatch.setattr(grouped, "scaled_dot_product_attention", called)
    return shapes


@pytest.mark.parametrize("model_type", sorted(PACKABLE | UNPACKED))
def test_steps_draw_the_tokens_of_transformers_attention(calls: list[tuple[int, ...]], model_type: str) -> None:
    """By every type that decodes in slots, in every layer of every step; and the model is afterwards as it was."""
    model = model_of_type(model_type)
    before = model.config._attn_implementation
    steps: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: steps.append(1))
    eos, expected = slowly(model)
    decoder = Decoder(model, LIKE_A_GPU, 4, use_grouped=True)
    steps.clear()
    found = decoder.sample(PROMPTS, NUMBERS, 1.0, eos_token_id=eos, pad=0)
    assert len(calls) == (0 if model_type in OWN_WAY else len(steps) * model.config.num_hidden_layers)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=5e-5, rtol=0)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("gemma3_text", LAYERS),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("mistral", {"sliding_window": None}),
        ("llama", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 16}),
    ],
)
def test_query_heads_share_key_heads_that_are_not_repeated(
    calls: list[tuple[int, ...]], model_type: str, more: Mapping[str, Any]
) -> None:
    """With layers of two types, and any number of heads."""
    model = model_of_type(model_type, **more)
    eos, expected = slowly(model)
    found = Decoder(model, use_grouped=True).sample(PROMPTS, NUMBERS, 1.0, eos_token_id=eos, pad=0)
    assert {heads for _, heads, *_ in calls} == {model.config.num_key_value_heads}
    assert torch.equal(found.ids, expected.ids)


def test_a_model_that_computes_packed_rows_text_by_text_is_sampled_too(calls: list[tuple[int, ...]]) -> None:
    """The policy that is trained is the one that is sampled, and its attention is afterwards what it was."""
    model = model_of_type("llama")
    eos, expected = slowly(model)
    model.set_attn_implementation(varlen.NAME)
    assert decodes_in_slots(model)
    for use_grouped in (False, True):
        found = Decoder(model, use_grouped=use_grouped).sample(PROMPTS, NUMBERS, 1.0, eos_token_id=eos, pad=0)
        assert torch.equal(found.ids, expected.ids)
        assert model.config._attn_implementation == varlen.NAME
        assert bool(calls) == use_grouped


def test_layers_that_ask_for_no_interface_and_a_cpu_keep_transformers_attention(calls: list[tuple[int, ...]]) -> None:
    """And a model that is to attend in plain arithmetic, or whose layers add more than a mask."""
    for kept in (*map(model_of_type, sorted(OWN_WAY)), model_of_type("llama", attn_implementation="eager")):
        assert not grouped.fits(kept)
    assert not grouped.computes(4, [LayerShape((2, 8), (2, 8))], torch.bfloat16, torch.device("cpu"))
    model = model_of_type("llama")
    Decoder(model).sample(PROMPTS[:1], NUMBERS[:1], 1.0, eos_token_id=-1, pad=0)
    assert not calls
    mask = torch.zeros(1, 1, 1, 4)
    with grouped.attending(model), pytest.raises(AssertionError):
        vars(grouped)["_attention"](model, mask, mask, mask, mask, softcap=30.0)
