from pathlib import Path

import pytest
import torch

from rlhf.errors import RequestError
from rlhf.models.text import load_tokenizer
from rlhf.rollout import speaker
from rlhf.rollout.drawing import Responses
from rlhf.rollout.speaker import Speaker
from tests.models.tiny import make_tiny_llama


def test_answers_follow_from_the_seed_and_fit_the_context(tmp_path: Path) -> None:
    """One for each prompt; what does not fit is refused with what would."""
    folder = make_tiny_llama(tmp_path / "tiny")
    found = Speaker(folder).answers(["a film", "the film is"], 0.8, 8, 0)
    assert len(found) == 2
    assert found == Speaker(folder).answers(["a film", "the film is"], 0.8, 8, 0)
    assert found != Speaker(folder).answers(["a film", "the film is"], 0.8, 8, 1)
    with pytest.raises(RequestError, match="do not fit the context of 64") as caught:
        Speaker(folder).answers(["a film"], 0.8, 64, 0)
    assert caught.value.where == "prompt 1"


def test_answers_read_as_rewards_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control token in the middle shows its name, as it does to a reward function; the EOS and padding do not."""
    folder = make_tiny_llama(tmp_path / "tiny")
    tokenizer = load_tokenizer(folder)
    pad, eos, word = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer("film")["input_ids"][-1]
    ids = torch.tensor([[word, pad, word, eos, pad], [word, word, word, word, pad]])
    monkeypatch.setattr(speaker, "sample_responses", lambda *_, **__: Responses(ids, torch.zeros(2, 5)))
    film = tokenizer.decode([word])
    ended, cut = Speaker(folder).answers(["a film", "the film is"], 0.8, 5, 0)
    assert tokenizer.pad_token in ended
    assert ended.count(film.strip()) == 2
    assert tokenizer.eos_token not in ended
    assert not ended.endswith(tokenizer.pad_token)
    assert cut.endswith(tokenizer.pad_token)
