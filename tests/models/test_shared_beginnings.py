"""Texts read end to end behind their common beginning, against each text alone."""

from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.models import shared_beginnings, varlen
from rlhf.models.heads import TokenLogprobs, pack_texts
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
        lengths = (offsets.diff() for offsets in (texts.key_offsets, texts.offsets) if offsets is not None)
        calls.append((len(query), int(next(lengths).sub(next(lengths)).max())))
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
            torch.testing.assert_close(other.grad, one.grad, atol=5e-5, rtol=1e-4, msg=name)


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


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=8), min_size=1, max_size=6), st.booleans())
def test_each_place_has_its_token_and_each_text_its_keys(texts: list[list[int]], left: bool) -> None:
    """Beginnings leave each text a token of its own; those of texts in turn are longer by a few tokens."""
    ids, mask = pad(texts, 0, "left" if left else "right")
    places, real = positions(mask), mask.bool()
    with patch.object(shared_beginnings, "FEWEST", 2):
        row = end_to_end(ids, places, mask)
    tokens, saved = [len(text) for text in texts], shared_tokens(texts, fewest=2)
    if row is None:
        assert not any(saved)
        assert bool(real.all())
        return
    everywhere, boundaries = min(saved), row.texts
    assert len(row.places) == everywhere + sum(tokens) - sum(saved)
    for of in (ids, places):
        assert torch.equal(of.flatten()[row.places][row.source].view_as(ids)[real], of[real])
    assert boundaries.keys is not None
    assert boundaries.key_offsets is not None
    queries, keys = boundaries.offsets.diff().tolist(), boundaries.key_offsets.diff().tolist()
    assert (boundaries.longest, boundaries.most_keys) == (max(queries), max(keys))
    seen = ids.flatten()[row.places][boundaries.keys].split(keys)
    begun = [texts[0][:everywhere]] if everywhere else []
    assert [part.tolist() for part in seen] == begun + texts
    # A text's own tokens, and no others, are the last of its keys.
    last = torch.cat([part[-own:] for part, own in zip(boundaries.keys.split(keys), queries, strict=True)])
    assert last.tolist() == list(range(len(row.places)))


def shared_tokens(texts: list[list[int]], fewest: int) -> list[int]:
    """Of each text how many tokens an earlier one has, or what all begin with."""

    def common(one: list[int], other: list[int]) -> int:
        most = min(len(one), len(other)) - 1
        return next((place for place in range(most) if one[place] != other[place]), most)

    if len(texts) == 1:
        return [0]
    everywhere = min(common(texts[0], text) for text in texts[1:])
    saved, leader = [everywhere], texts[0]
    for text in texts[1:]:
        saved.append(common(leader, text))
        if saved[-1] < everywhere + fewest:
            saved[-1], leader = everywhere, text
    return saved


PROMPTS = [[5, 6, *range(20, 40)], [5, 6, *range(50, 80)]]
RESPONSES = [[7, 8, 9], [10], [11, 12, 13, 14, 15, 16]]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_responses_to_a_prompt_share_it_in_a_reward_model(device: str, read: list[tuple[int, int]]) -> None:
    """Scores and gradients of padded texts that share nothing; every layer reads two prompts once, less what both
    begin with. On a GPU in bf16: as near to fp32 as padded texts in bf16 are.
    """
    torch.manual_seed(0)
    config = tiny_config("llama", num_labels=1, attn_implementation="sdpa")
    exact: Any = AutoModelForSequenceClassification.from_config(config).eval().to(device)
    models = [exact, deepcopy(exact)] + ([deepcopy(exact)] if device == "cuda" else [])
    for model in models[1:]:
        model.to(torch.bfloat16 if device == "cuda" else torch.float32)
    pack_texts(models[-1])
    ids, mask = (one.to(device) for one in pad([p + r for p in PROMPTS for r in RESPONSES], 0, "right"))
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    for model in models:
        scores = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1).float()
        (scores * torch.linspace(-1, 1, len(scores), device=device)).sum().backward()
        results.append((scores.detach(), {name: one.grad.float() for name, one in model.named_parameters()}))
    (scores, gradients), *others = results
    if device == "cpu":
        tokens = sum(map(len, PROMPTS)) - 2 + 2 * sum(map(len, RESPONSES))
        assert read == [(tokens, len(PROMPTS[1]))] * config.num_hidden_layers
        torch.testing.assert_close(others[-1][0], scores, atol=1e-5, rtol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[-1][1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)
        return
    (padded, of_padded), (shared, of_shared) = others
    assert (shared - scores).norm() < 2 * (padded - scores).norm() + 1e-2 * scores.norm()
    for name, gradient in gradients.items():
        gap = (of_padded[name] - gradient).norm()
        assert (of_shared[name] - gradient).norm() < 2 * gap + 2e-2 * gradient.norm(), name
