"""Texts read end to end behind their common beginning, against each text alone."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.models import varlen
from rlhf.models.heads import TokenLogprobs
from rlhf.models.shared_beginnings import end_to_end, read_beginnings_once
from rlhf.models.text import pad, positions
from tests.models.tiny import tiny_config

BEGINNING = [5, 6, 7, 8, 9]
ENDS = [[10, 11, 12], [13], [14, 15, 16, 17, 18, 19], [10, 12]]


def padded(ends: list[list[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    return pad([BEGINNING + end for end in ends], 0, side)  # pyright: ignore[reportArgumentType]


def two_models(kind: str = "llama") -> tuple[Any, Any]:
    torch.manual_seed(0)
    plain: Any = AutoModelForCausalLM.from_config(tiny_config(kind, attn_implementation="sdpa")).eval()
    once = deepcopy(plain)
    read_beginnings_once(once)
    return plain, once


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each call of attention by text: tokens, and those that texts share."""
    calls: list[tuple[int, int]] = []
    by_text = varlen.by_text_on_cpu

    def counted(query: Tensor, key: Tensor, value: Tensor, texts: varlen.Boundaries, scale: float) -> Tensor:
        calls.append((len(query), texts.shared))
        return by_text(query, key, value, texts, scale)

    monkeypatch.setattr(varlen, "by_text_on_cpu", counted)
    return calls


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "gemma", "phi"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_texts_are_read_as_alone(kind: str, side: str, read: list[tuple[int, int]]) -> None:
    """States of real tokens and all gradients; every layer reads the beginning once and no padding."""
    ids, mask = padded(ENDS, side)
    real = mask.bool()
    states: list[Tensor] = []
    models = two_models(kind)
    for model in models:
        body = model.base_model
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask), "use_cache": False}
        hidden = body(**given).last_hidden_state[real]
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        states.append(hidden.detach())
    assert read == [(len(BEGINNING) + sum(map(len, ENDS)), len(BEGINNING))] * models[0].config.num_hidden_layers
    torch.testing.assert_close(states[1], states[0], atol=1e-5, rtol=1e-4)
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_packed_rows_are_read_as_padded_ones(read: list[tuple[int, int]]) -> None:
    """A row whose positions restart, without a mask."""
    plain, once = two_models()
    ids, mask = padded(ENDS)
    places = positions(mask)
    real = mask.bool()
    expected = plain(input_ids=ids, attention_mask=mask, use_cache=False).logits[real]
    found = once(input_ids=ids[real][None], position_ids=places[real][None], use_cache=False).logits[0]
    assert {shared for _, shared in read} == {len(BEGINNING)}
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_copy_reads_its_own_weights() -> None:
    """PPO's sampler is a copy in which weights are exchanged."""
    _, once = two_models()
    other = deepcopy(once)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(2)
    ids, mask = padded(ENDS)
    one, two = (TokenLogprobs(model)(ids, mask, 2, 1.0, False)[0] for model in (once, other))
    assert not torch.allclose(one, two)


def test_what_cannot_be_rearranged_is_read_as_it_is(read: list[tuple[int, int]]) -> None:
    """A cache, holes, one text alone, dropout in training, and texts that share nothing and have no padding."""
    plain, once = two_models()
    ids, mask = padded(ENDS)
    holes = mask.clone()
    holes[:, 2] = 0
    places = positions(mask)
    some = {"input_ids": ids, "position_ids": places}
    cases: list[dict[str, Any]] = [
        some | {"attention_mask": mask, "use_cache": True},
        some | {"attention_mask": holes, "use_cache": False},
        {"input_ids": ids[:1, :8], "position_ids": places[:1, :8], "attention_mask": mask[:1, :8], "use_cache": False},
    ]
    for case in cases:
        real = case["attention_mask"].bool()
        one, two = (model(**case).logits[real] for model in (plain, once))
        torch.testing.assert_close(two, one)
    once(**some, attention_mask=torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1]), use_cache=False)
    once.base_model.append_dropout = torch.nn.Dropout(0.1)
    once.train()
    once(**some, attention_mask=mask, use_cache=False)
    assert not read


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=5), min_size=1, max_size=5), st.booleans())
def test_each_place_has_its_token(texts: list[list[int]], left: bool) -> None:
    """The beginning is the longest that leaves each text a token, and each real place finds its own id and position."""
    ids, mask = pad(texts, 0, "left" if left else "right")
    places, real = positions(mask), mask.bool()
    row = end_to_end(ids, places, mask)
    common = 0
    while len(texts) > 1 and all(len(text) > common + 1 and text[common] == texts[0][common] for text in texts):
        common += 1
    if row is None:
        assert not common
        assert bool(real.all())
        return
    assert row.texts.shared == common
    assert row.texts.offsets.diff().tolist() == [len(text) - common for text in texts]
    assert row.texts.longest == max(map(len, texts)) - common
    assert len(row.places) == common + sum(len(text) - common for text in texts)
    for of in (ids, places):
        assert torch.equal(of.flatten()[row.places][row.source].view_as(ids)[real], of[real])
