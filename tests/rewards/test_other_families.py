"""Reward models of another architecture, size and tokenizer than the policy's."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.errors import PreflightError
from rlhf.models import layout, text
from tests.models.tiny import make_tiny_llama
from tests.rewards.models import CONTEXT, DEVIATION, MEAN, WORDS, make_bert, make_other_llama, make_roberta

ROOT = Path(__file__).parents[2]
PROMPTS: list[Any] = ["a film", "say so", [{"role": "user", "content": "the film is"}], "a", "say so"]
RESPONSES = ["of two halves", "dull , dull , dull", "a joy .", "", "a joy"]
MAKERS = {
    "bert": make_bert,
    "bert-alone": lambda folder: make_bert(folder, sees="response"),
    "roberta": make_roberta,
    "llama": make_other_llama,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("families")
    for name, make in MAKERS.items():
        make(found / "models" / name)
    return found


@pytest.fixture(scope="module")
def scores(folder: Path) -> dict[str, dict[str, list[float]]]:
    """What the models say under ZeRO-3: by model, by batch size. One start serves all tests."""
    (folder / "rows.json").write_text(json.dumps({"prompts": PROMPTS, "responses": RESPONSES}))
    done = subprocess.run(
        [sys.executable, "-m", "tests.rewards.scoring", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "scores.json").read_text())


def oracle(folder: Path, name: str, prompt: Any, response: str) -> float:
    """The score by transformers alone, one text at a time, without padding or shards."""
    place = folder / "models" / name
    tokenizer: Any = AutoTokenizer.from_pretrained(place)
    model: Any = AutoModelForSequenceClassification.from_pretrained(place).eval()
    words = prompt if isinstance(prompt, str) else prompt[0]["content"]
    given: Any
    match name:
        case "bert":
            # In lists: given plainly, an empty response would be taken for none.
            given = tokenizer([words], [response], return_tensors="pt")
        case "bert-alone":
            given = tokenizer(response, return_tensors="pt")
        case "roberta":
            # RoBERTa has one type for both texts.
            given = tokenizer([words], [response], return_tensors="pt", return_token_type_ids=False, truncation=False)
        case _:
            ids = tokenizer(f"Q {words} A ", add_special_tokens=False)["input_ids"]
            ids += tokenizer(response, add_special_tokens=False)["input_ids"]
            given = {"input_ids": torch.tensor([[*ids, tokenizer.eos_token_id]])}
    with torch.no_grad():
        return (model(**given).logits.item() - MEAN) / DEVIATION


@pytest.mark.parametrize("name", MAKERS)
def test_under_zero3_a_reward_model_scores_as_transformers_alone_does(
    folder: Path, scores: dict[str, dict[str, list[float]]], name: str
) -> None:
    """Through its own tokenizer, template, special tokens, token types and head; then its normaliser."""
    expected = [oracle(folder, name, *row) for row in zip(PROMPTS, RESPONSES, strict=True)]
    assert scores[name]["1"] == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.05, "a model that finds all texts alike shows nothing"


@pytest.mark.parametrize("name", MAKERS)
def test_padding_changes_no_score(scores: dict[str, dict[str, list[float]]], name: str) -> None:
    """A text scores the same alone and beside longer ones, up to rounding."""
    assert scores[name]["4"] == pytest.approx(scores[name]["1"], abs=1e-4)


def test_a_reward_model_that_sees_the_response_alone_is_blind_to_its_prompt(
    scores: dict[str, dict[str, list[float]]], folder: Path
) -> None:
    """And one that sees the conversation is not."""
    assert oracle(folder, "bert-alone", "a", "dull") == oracle(folder, "bert-alone", "the film is", "dull")
    assert oracle(folder, "bert", "a", "dull") != oracle(folder, "bert", "the film is", "dull")


words = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


@given(prompt=words, response=words, length=st.integers(3, 20), name=st.sampled_from(["bert", "roberta"]))
def test_an_encoder_reads_its_own_form_of_two_texts_cut_at_the_start(
    folder: Path, prompt: str, response: str, length: int, name: str
) -> None:
    """What fits is what the tokenizer itself makes of both; of what does not, the prompt goes first, from its start."""
    tokenizer = text.load_encoder_tokenizer(folder / "models" / name)
    plain: Any = AutoTokenizer.from_pretrained(folder / "models" / name)
    ids, types = text.encoded(tokenizer, prompt, response, 1000)
    assert ids == plain([prompt], [response], padding=False, truncation=False)["input_ids"][0]
    whole, before, after = (len(ids), len(prompt.split()), len(response.split()))
    special = whole - before - after
    cut, kinds = text.encoded(tokenizer, prompt, response, max(length, special))
    over = max(0, whole - max(length, special))
    kept_before = prompt.split()[min(over, before) :]
    kept_after = response.split()[max(0, over - before) :]
    assert cut == plain([" ".join(kept_before)], [" ".join(kept_after)])["input_ids"][0]
    assert len(cut) == len(kinds) <= max(length, special)
    assert len(types) == len(ids)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 514}, 512),
        ({"model_type": "distilbert", "max_position_embeddings": 512, "pad_token_id": 0}, 512),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 8192}}, 8192),
        ({"model_type": "xlnet", "max_position_embeddings": -1}, layout.UNBOUNDED),
        ({"model_type": "bloom"}, layout.UNBOUNDED),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 0}, 513),
        ({"model_type": "both", "max_position_embeddings": 1, "n_positions": 1024}, 1),
        ({"model_type": "none", "max_position_embeddings": 0}, layout.UNBOUNDED),
    ],
)
def test_every_architecture_says_how_long_a_text_it_takes(config: dict[str, Any], length: int) -> None:
    """Also where positions begin behind the padding's, and where there is no limit."""
    assert layout.context_length(config) == length


def test_a_reward_model_that_would_be_given_too_long_texts_is_refused(tmp_path: Path) -> None:
    """A position beyond its table would end the run in the middle."""
    model = make_roberta(tmp_path / "model")
    layout.check_scored_length(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"score_max_length": CONTEXT + 1}))
    with pytest.raises(PreflightError, match=f"is {CONTEXT + 1}, and its context is {CONTEXT}"):
        layout.check_scored_length(model)


def test_the_length_of_an_adapter_s_texts_is_corrected_in_its_base(tmp_path: Path) -> None:
    """Its own folder has no config.json."""
    base = make_roberta(tmp_path / layout.BASE)
    (tmp_path / layout.ADAPTER_CONFIG).write_text("{}")
    layout.update_json(base / "config.json", {"score_max_length": CONTEXT + 1})
    with pytest.raises(PreflightError) as caught:
        layout.check_scored_length(tmp_path)
    assert caught.value.where == str(base / "config.json")


def test_a_value_model_never_starts_from_a_reward_model_with_other_tokens(folder: Path, tmp_path: Path) -> None:
    """An encoder's tokenizer without EOS is told apart like any other; the message says what to set."""
    policy = make_tiny_llama(tmp_path / "policy")
    text.check_same_tokens(policy, policy, "ppo")
    for name in MAKERS:
        with pytest.raises(PreflightError, match="different tokenizers") as caught:
            text.check_same_tokens(folder / "models" / name, policy, "ppo")
        assert caught.value.next_step == "ppo.value_init=policy"
