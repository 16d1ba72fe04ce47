import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from rlhf.errors import PreflightError
from rlhf.models import text
from rlhf.models.layout import config_of, context_length

rows = st.lists(st.lists(st.integers(1, 99), max_size=6), min_size=1, max_size=5)


def write_tokenizer(folder: Path, *extra: str, **special: str) -> Path:
    """A tokenizer of words, with the named special tokens and extra ones."""
    words = {word: index for index, word in enumerate(["a", "b", "c", *extra, *special.values()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue] - typed read-only
    wrapped: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=list(extra), **special)
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pad", [{}, {"pad_token": "<eos>"}])
def test_padding_is_never_eos(tmp_path: Path, pad: dict[str, str]) -> None:
    """Whether a tokenizer has no pad token or uses its EOS as one, a spare special token takes the place."""
    folder = write_tokenizer(tmp_path, "<spare>", eos_token="<eos>", bos_token="<bos>", **pad)
    tokenizer = text.load_tokenizer(folder)
    assert tokenizer.eos_token == "<eos>"
    assert tokenizer.pad_token == "<spare>"
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)


def test_a_pad_token_of_its_own_is_kept(tmp_path: Path) -> None:
    """What the model was trained with stays."""
    folder = write_tokenizer(tmp_path, "<spare>", eos_token="<eos>", pad_token="<pad>")
    assert text.load_tokenizer(folder).pad_token == "<pad>"


def test_a_tokenizer_without_eos_or_spare_token_is_refused_with_what_to_change(tmp_path: Path) -> None:
    """No response could end, or no padding be told from an end."""
    with pytest.raises(PreflightError, match="no EOS token") as caught:
        text.load_tokenizer(write_tokenizer(tmp_path / "no_eos", pad_token="<pad>"))
    assert "eos_token" in caught.value.next_step
    with pytest.raises(PreflightError, match="no pad token") as caught:
        text.load_tokenizer(write_tokenizer(tmp_path / "no_pad", eos_token="<eos>"))
    assert "pad_token" in caught.value.next_step


@given(rows, st.sampled_from(["left", "right"]))
def test_padding_fills_one_side_and_the_mask_tells_the_rest(rows: list[list[int]], side: str) -> None:
    """Where the mask is 1 stand the ids in their order; the padding is all on the side asked for."""
    ids, mask = text.pad(rows, 0, side)
    assert ids.shape == mask.shape == (len(rows), max(1, *(len(row) for row in rows)))
    for row, padded, real in zip(rows, ids, mask, strict=True):
        assert padded[real.bool()].tolist() == row
        assert padded[~real.bool()].eq(0).all()
        assert real.tolist() == sorted(real.tolist(), reverse=side == "right")


@given(rows)
def test_positions_count_real_tokens(rows: list[list[int]]) -> None:
    """A token's position is the same whatever padding stands before it."""
    for side in ("left", "right"):
        mask = text.pad(rows, 0, side)[1]
        for row, real, positions in zip(rows, mask, text.positions(mask), strict=True):
            assert positions[real.bool()].tolist() == list(range(len(row)))
            assert positions.min() >= 0


def test_what_is_scored_ends_in_one_eos_and_loses_its_start(tiny: Path) -> None:
    """With or without a prompt, cut or whole; an EOS that the text spells does not count."""
    tokenizer = text.load_tokenizer(tiny)
    eos = tokenizer.eos_token_id
    response = "the film is a joy"
    alone = text.scored_ids(tokenizer, None, response, 100)
    assert alone == [*tokenizer(response)["input_ids"], eos]
    spelled = text.scored_ids(tokenizer, None, response + tokenizer.eos_token, 100)
    assert len(spelled) > len(alone)
    assert spelled.count(eos) == 1
    whole = text.scored_ids(tokenizer, "say so", response, 100)
    assert whole == [*text.prompt_ids(tokenizer, "say so"), *alone]
    for length in range(1, len(whole)):
        cut = text.scored_ids(tokenizer, "say so", response, length)
        assert cut == whole[-length:]
        assert cut[-1] == eos


def test_a_string_is_one_message_of_the_user(tiny: Path) -> None:
    """Both forms of a prompt mean the same, and end where the assistant begins to speak."""
    tokenizer = text.load_tokenizer(tiny)
    ids = text.prompt_ids(tokenizer, "say so")
    assert ids == text.prompt_ids(tokenizer, [{"role": "user", "content": "say so"}])
    assert tokenizer.decode(ids) == "<|user|>say so<|end|><|assistant|>"
    tokenizer.chat_template = None
    assert text.prompt_ids(tokenizer, "say so") == tokenizer("say so")["input_ids"]


def test_the_context_is_what_the_folder_says(tiny: Path) -> None:
    """The length that preflights compare with."""
    config = json.loads((tiny / "config.json").read_text())
    assert context_length(config_of(tiny)) == config["max_position_embeddings"] == 64


def test_the_context_is_known_by_every_name(tmp_path: Path) -> None:
    """GPT-2 calls it n_positions."""
    GPT2Config(n_positions=48).save_pretrained(tmp_path)
    assert context_length(config_of(tmp_path)) == 48


def test_an_empty_prompt_pads_to_one_column() -> None:
    """A tensor without columns would break every model."""
    assert torch.equal(text.pad([[], []], 7, "left")[0], torch.full((2, 1), 7))
