"""Attention text by text, against transformers' masks."""

import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.models import varlen
from rlhf.models.heads import pack_texts
from rlhf.models.packable import PACKABLE, attends_to_whole_texts
from rlhf.models.text import pad
from tests.models.tiny import tiny_config

PLAIN: dict[str, Any] = {"attn_pdrop": 0.0, "attention_dropout": 0.0}
WITHOUT_WINDOW = {kind: {"sliding_window": None} for kind in ("mistral", "mixtral", "phi3")}
CONFIGS = {kind: tiny_config(kind, **PLAIN, **WITHOUT_WINDOW.get(kind, {})) for kind in sorted(PACKABLE)}
BY_TEXT = [kind for kind, config in CONFIGS.items() if attends_to_whole_texts(config.to_dict())]
LENGTHS = (5, 1, 17, 9, 2)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of texts of each call on a CPU."""
    calls: list[int] = []
    by_text = varlen.by_text_on_cpu

    def counted(query: Tensor, key: Tensor, value: Tensor, texts: varlen.Boundaries, scale: float) -> Tensor:
        calls.append(len(texts.offsets) - 1)
        return by_text(query, key, value, texts, scale)

    monkeypatch.setattr(varlen, "by_text_on_cpu", counted)
    return calls


def packed_row(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Ids and positions of one row."""
    draw = random.Random(0)
    ids = torch.tensor([[draw.randrange(3, 100) for _ in range(sum(LENGTHS))]], device=device)
    return ids, torch.cat([torch.arange(length, device=device) for length in LENGTHS])[None]


def logits_and_gradients(model: Any, ids: Tensor, places: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=ids, position_ids=places, use_cache=False).logits.float()
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), {name: weight.grad.float() for name, weight in model.named_parameters()}


def two_models(kind: str) -> tuple[Any, Any]:
    """A model with transformers' mask, and one with our attention."""
    torch.manual_seed(0)
    masked: Any = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    by_text = deepcopy(masked)
    varlen.attend_by_text(by_text)
    return masked, by_text


@pytest.mark.parametrize("kind", BY_TEXT)
def test_a_row_is_computed_text_by_text_as_under_its_mask(texts: list[int], kind: str, tmp_path: Path) -> None:
    """In every layer; a row with one text alone keeps transformers' mask."""
    masked, by_text = two_models(kind)
    assert by_text.config._attn_implementation == varlen.NAME
    ids, places = packed_row()
    (logits, gradients), (own, own_gradients) = (logits_and_gradients(m, ids, places) for m in (masked, by_text))
    assert texts == [len(LENGTHS)] * CONFIGS[kind].num_hidden_layers
    torch.testing.assert_close(own, logits, atol=1e-4, rtol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own_gradients[name], gradient, atol=1e-3, rtol=1e-3, msg=name)
    texts.clear()
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    with torch.no_grad():
        mask = varlen.as_mask(by_text, offsets, max(LENGTHS))
        said = by_text(input_ids=ids, position_ids=places, attention_mask=mask, use_cache=False).logits
        assert texts == [len(LENGTHS)] * CONFIGS[kind].num_hidden_layers
        torch.testing.assert_close(said, own)
        texts.clear()
        one, other = (model(input_ids=ids, use_cache=False).logits for model in (masked, by_text))
        torch.testing.assert_close(other, one)
    assert not texts
    assert varlen.NAME not in by_text.config.to_json_string()


def test_many_types_are_computed_text_by_text() -> None:
    """So that the test above tests something; windows, caps and dropout keep the mask."""
    used = {kind for kind in BY_TEXT if two_models(kind)[1].config._attn_implementation == varlen.NAME}
    assert {"llama", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "granite", "gemma", "mistral"} <= used
    assert not used & {"gemma2", "gemma3_text", "cohere2", "olmo3", "starcoder2"}
    for more in ({"attention_dropout": 0.1}, {"head_dim": 12}, {"layer_types": ["sliding_attention"] * 2}):
        assert not attends_to_whole_texts(tiny_config("llama").to_dict() | more)


def test_a_reward_models_texts_are_computed_text_by_text(texts: list[int]) -> None:
    """Of several rows, with the filling behind each row's last text as a text of its own."""
    torch.manual_seed(0)
    padded: Any = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1)).eval()
    packed = deepcopy(padded)
    pack_texts(packed)
    draw = random.Random(0)
    ids, mask = pad([[draw.randrange(3, 100) for _ in range(length)] for length in LENGTHS], 0, "right")
    for classifier in (padded, packed):
        classifier(input_ids=ids, attention_mask=mask).logits.square().sum().backward()
    assert texts == [len(LENGTHS)] * 2
    for (name, one), other in zip(padded.named_parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-4, rtol=1e-4, msg=name)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=4))
def test_boundaries_are_where_texts_begin(rows: list[list[int]]) -> None:
    """Of rows whose ends are filled by a text of their own, as transformers sees them."""
    time = max(map(sum, rows)) + 1
    filled = [[*row, time - sum(row)] for row in rows]
    number = torch.tensor([[text for text, length in enumerate(row) for _ in range(length)] for row in filled])

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (number[row, query] == number[row, key]) & (key <= query)

    found = varlen.boundaries(varlen.beginnings(len(rows), time, sees, torch.device("cpu")))
    lengths = [length for row in filled for length in row]
    assert found.offsets.diff().tolist() == lengths
    assert found.offsets[0] == 0
    assert found.longest == max(lengths)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
def test_the_kernel_computes_what_the_mask_does(kind: str, device: str) -> None:
    """In bf16 with grouped queries: as near to fp32 under the mask as bf16 under the mask is, forward and gradients."""
    exact, by_text = (model.to(device) for model in two_models(kind))
    masked = deepcopy(exact).bfloat16()
    by_text = by_text.bfloat16()
    assert by_text.config._attn_implementation == varlen.NAME
    found = [logits_and_gradients(model, *packed_row(device)) for model in (exact, masked, by_text)]
    (logits, gradients), (of_mask, gradients_of_mask), (own, own_gradients) = found
    assert (own - logits).norm() < 1.5 * (of_mask - logits).norm() + 1e-3 * logits.norm()
    for name, gradient in gradients.items():
        gap = (gradients_of_mask[name] - gradient).norm()
        assert (own_gradients[name] - gradient).norm() < 2 * gap + 1e-2 * gradient.norm(), name


@pytest.mark.gpu
def test_a_reward_models_texts_score_on_a_gpu_as_padded() -> None:
    """Through the classifier's own forward pass, in bf16."""
    torch.manual_seed(0)
    padded: Any = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1)).eval()
    packed, padded = deepcopy(padded).bfloat16().cuda(), padded.cuda()
    pack_texts(packed)
    assert packed.config._attn_implementation == varlen.NAME
    draw = random.Random(0)
    ids, mask = pad([[draw.randrange(3, 100) for _ in range(length)] for length in LENGTHS], 0, "right")
    one, other = (model(input_ids=ids.cuda(), attention_mask=mask.cuda()).logits for model in (padded, packed))
    torch.testing.assert_close(other.float(), one, atol=0.05 * float(one.detach().std()) + 0.02, rtol=0.05)
