"""Attention by lengths, against transformers' masks: on a CPU with a loop in the kernel's place."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhf.models import varlen
from rlhf.models.packable import PACKABLE
from rlhf.rollout import flash
from rlhf.rollout.decoding import UNPACKED, Decoder, decodes_in_slots
from rlhf.rollout.slots import LayerShape, Lengths
from tests.rollout.test_decoding import (
    EXPERTS,
    LAYERS,
    LIKE_A_GPU,
    NUMBERS,
    PROMPTS,
    model_of_type,
    operations_with_the_host,
    slowly,
)

MASKED = {"falcon", "gemma2"}
"""Types whose layers ask for no interface, or cap their products, for which transformers has no SDPA."""


def looped(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, places: int, window: int, scale: float | None
) -> Tensor:
    """Each text alone, by torch's attention over the places that it sees; and that the kernel takes its arguments."""
    lengths, queries, firsts = table
    assert table.dtype == torch.int32
    assert all(part.is_contiguous() for part in (lengths, queries, firsts))
    assert key.shape[0] == value.shape[0] == int(firsts[-1])
    parts: list[Tensor] = []
    for text, length in enumerate(lengths[:-1].tolist()):
        assert int(firsts[text + 1] - firsts[text]) == places
        first, end = int(firsts[text]), int(firsts[text]) + length
        k, v = (states[max(first, end - window) : end].transpose(0, 1) for states in (key, value))
        q = query[queries[text] : queries[text + 1]].transpose(0, 1)
        parts.append(scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The loop in place of the GPU's kernel; return the number of texts of each call."""
    calls: list[int] = []

    def called(query: Tensor, *more: Any) -> Tensor:
        calls.append(len(query))
        return looped(query, *more)

    monkeypatch.setattr(flash, "_by_length", called)
    monkeypatch.setattr(flash, "computes", lambda *_: True)
    return calls


@pytest.mark.parametrize("model_type", sorted(PACKABLE | UNPACKED))
def test_lengths_draw_the_tokens_of_masks(kernel: list[int], model_type: str) -> None:
    """By every type that decodes in slots, in every layer of every step; and the model is afterwards as it was."""
    model = model_of_type(model_type)
    before = model.config._attn_implementation
    steps: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: steps.append(1))
    eos, expected = slowly(model)
    decoder = Decoder(model, LIKE_A_GPU, 4)
    steps.clear()
    found = decoder.sample(PROMPTS, NUMBERS, 1.0, eos_token_id=eos, pad=0)
    assert len(kernel) == (0 if model_type in MASKED else len(steps) * model.config.num_hidden_layers)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=5e-5, rtol=0)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("gemma3_text", LAYERS),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 2}),
        ("llama", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 16}),
    ],
)
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_any_heads_and_windows_draw_the_same(
    kernel: list[int], model_type: str, more: Mapping[str, Any], rows: int
) -> None:
    """With layers of two types, and with a mask where the caller asks for one."""
    model = model_of_type(model_type, **more)
    eos, expected = slowly(model)
    for masked in (False, True):
        kernel.clear()
        found = Decoder(model, None, rows, masked=masked).sample(PROMPTS, NUMBERS, 1.0, eos_token_id=eos, pad=0)
        assert bool(kernel) != masked
        assert torch.equal(found.ids, expected.ids)
        torch.testing.assert_close(found.logprobs, expected.logprobs, atol=5e-5, rtol=0)


def test_a_model_that_computes_packed_rows_text_by_text_is_sampled_too(kernel: list[int]) -> None:
    """The policy that is trained is the one that is sampled, and its attention is afterwards what it was."""
    model = model_of_type("llama")
    eos, expected = slowly(model)
    model.set_attn_implementation(varlen.NAME)
    assert decodes_in_slots(model)
    for masked in (False, True):
        found = Decoder(model, masked=masked).sample(PROMPTS, NUMBERS, 1.0, eos_token_id=eos, pad=0)
        assert torch.equal(found.ids, expected.ids)
        assert model.config._attn_implementation == varlen.NAME
    assert kernel


def test_a_captured_step_reads_lengths_where_they_are(kernel: list[int]) -> None:
    """Tensors given to layers are parts of one that stays: a graph would otherwise read what is no longer there."""
    lengths = Lengths(4, 2, 10, torch.device("cpu"))
    given = lengths.in_place_of_mask(3, 5)
    lengths.up_to(torch.tensor([0, 6, 9]))
    assert given.shape == (1, 3, 7, 5)
    assert given[0, :, :, 0].tolist() == [[1, 1, 7, 7, 10, 10, 1], list(range(7)), list(range(0, 61, 10))]


@pytest.mark.parametrize("model_type", sorted((PACKABLE | UNPACKED) - EXPERTS - MASKED))
def test_a_step_by_lengths_never_needs_the_host(monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    """So that it can be captured as a graph, with torch's own kernel."""
    monkeypatch.setattr(flash, "computes", lambda *_: True)
    assert operations_with_the_host(model_type) == []


def test_what_the_kernel_does_not_compute_keeps_its_mask() -> None:
    """Heads of odd or different sizes, capped products, layers that ask for no interface, and eager attention."""
    plain, head = model_of_type("llama"), (2, 8)
    assert flash.fits(plain, [LayerShape(head, head)] * 2)
    for shape in (LayerShape((2, 12), (2, 12)), LayerShape((2, 264), (2, 264)), LayerShape(head, (2, 16))):
        assert not flash.fits(plain, [shape] * 2)
    assert not flash.fits(plain, [LayerShape(head, head), LayerShape((1, 8), (1, 8))])
    eager = model_of_type("llama", attn_implementation="eager")
    for other in (model_of_type("falcon"), model_of_type("gemma2"), eager):
        assert not flash.fits(other, [LayerShape(head, head)] * 2)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not flash.computes(cpu, torch.bfloat16)
    assert not flash.computes(cuda, torch.float32)
