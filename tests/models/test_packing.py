import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from rlhf.models.heads import SequenceScores, pack_texts
from rlhf.models.packable import PACKABLE, keeps_texts_apart
from rlhf.models.packing import pack, rows_of
from rlhf.models.text import pad
from tests.models.tiny import tiny_config

# Each with a classifier in transformers, and without packing.
OTHERS = ("opt", "bloom")
CLASSIFIERS = sorted(PACKABLE & MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.keys())


def classifier_of_type(model_type: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(tiny_config(model_type, num_labels=1)).eval()


def some_texts() -> list[list[int]]:
    """Of 1 to 30 tokens."""
    draw = random.Random(0)
    return [[draw.randrange(1, 100) for _ in range(draw.randrange(1, 31))] for _ in range(12)]


@torch.no_grad()
@pytest.mark.parametrize("model_type", [*CLASSIFIERS, *OTHERS])
def test_a_packed_text_scores_what_it_scores_alone(model_type: str) -> None:
    """Whatever stands before it in its row: for every type that is packed, and for types that must not be."""
    classifier, texts = classifier_of_type(model_type), some_texts()
    alone = torch.cat([classifier(input_ids=torch.tensor([text])).logits[0] for text in texts])
    scores = SequenceScores(classifier)(*pad(texts, 0, "right"))
    torch.testing.assert_close(scores, alone, atol=2e-5, rtol=0)
    assert alone.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("model_type", sorted(PACKABLE))
def test_a_packed_text_is_predicted_as_alone(model_type: str) -> None:
    """By every type that sft packs: its logits are those that it has in a row of its own."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
    texts = some_texts()
    alone = torch.cat([model(input_ids=torch.tensor([text]), use_cache=False).logits[0] for text in texts])
    places = torch.cat([torch.arange(len(text)) for text in texts])
    ids = torch.tensor([token for text in texts for token in text])
    packed = model(input_ids=ids[None], position_ids=places[None], use_cache=False).logits[0]
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=0)
    assert alone.std() > 0.1


@pytest.mark.parametrize(
    "config", [*map(tiny_config, ("opt", "gpt_oss", "bloom", "mpt")), tiny_config("falcon", alibi=True)]
)
def test_models_that_read_on_into_the_next_text_are_not_packed(config: Any) -> None:
    """Nor those whose ALiBi rounds places in a long row."""
    assert not keeps_texts_apart(config)


def test_gradients_are_those_of_padded_rows() -> None:
    """In training the classifier's own forward pass packs."""
    ids, mask = pad(some_texts(), 0, "right")
    padded, packed = classifier_of_type("llama"), classifier_of_type("llama")
    pack_texts(packed)
    for classifier in (padded, packed):
        classifier(input_ids=ids, attention_mask=mask).logits.square().sum().backward()
    for (name, one), other in zip(padded.named_parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-4, rtol=1e-4, msg=name)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_every_text_is_found_whole_at_its_end(lengths: list[int]) -> None:
    """Ids are unlike each other, so that a token out of place shows."""
    start = iter(range(0, 10_000, 100))
    texts = [[first + place for place in range(length)] for first, length in zip(start, lengths, strict=False)]
    packed = pack(*pad(texts, 0, "right"))
    assert packed.ids.shape[1] == max(lengths)
    ids, positions = packed.ids.flatten(), packed.positions.flatten()
    for text, end in zip(texts, packed.ends.tolist(), strict=True):
        assert ids[end - len(text) + 1 : end + 1].tolist() == text
        assert positions[end - len(text) + 1 : end + 1].tolist() == list(range(len(text)))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_rows_hold_every_text_once_and_are_at_least_half_full(lengths: list[int]) -> None:
    """First fit leaves at most one row half empty: the next text would have gone there."""
    rows = rows_of(lengths)
    assert sorted(text for row in rows for text in row) == list(range(len(lengths)))
    filled = [sum(lengths[text] for text in row) for row in rows]
    assert max(filled) <= max(lengths)
    assert sum(2 * tokens <= max(lengths) for tokens in filled) <= 1
