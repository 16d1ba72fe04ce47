from pathlib import Path

import pytest

from rlhf.config.tuning import LoraTuning
from rlhf.errors import RequestError
from rlhf.rollout.speaker import Speaker
from tests.models.tiny import make_tiny_adapter, make_tiny_llama

PROMPTS = ["a film", "the joy of a film of two halves", "dull"]


@pytest.fixture(params=["plain", "adapter"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny = make_tiny_llama(tmp_path / "tiny")
    if request.param == "plain":
        return tiny
    return make_tiny_adapter(tiny, tmp_path / "adapter", LoraTuning(method="lora", rank=4), scores=False)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_that_streams_is_the_one_of_the_batch(folder: Path, temperature: float) -> None:
    """To the letter, for each prompt's number, and its pieces add up to it."""
    speaker = Speaker(folder)
    for seed in range(3):
        together = speaker.answers(PROMPTS, temperature, 12, seed)
        for number, prompt in enumerate(PROMPTS):
            ids = speaker.prompt_ids(prompt, 12, "a prompt")
            answer = speaker.answer(ids, temperature, 12, seed, number)
            assert "".join(answer) == answer.text == together[number]
        assert speaker.answers(PROMPTS[1:], temperature, 12, seed, first=1) == together[1:]


def test_a_reader_who_leaves_keeps_what_was_written(folder: Path) -> None:
    """The answer's text is then that of the tokens so far, and it has not ended."""
    speaker = Speaker(folder)
    answer = speaker.answer(speaker.prompt_ids("a film", 20, "a prompt"), 1.0, 20, 0)
    pieces = iter(answer)
    first = next(pieces)
    assert answer.text.startswith(first)
    assert len(answer.text) < len(speaker.answers(["a film"], 1.0, 20, 0)[0])
    assert not answer.has_ended


def test_a_prompt_beyond_the_context_is_refused_with_its_place(folder: Path) -> None:
    """Also one after which not a single token fits."""
    with pytest.raises(RequestError, match="do not fit the context of 64") as caught:
        Speaker(folder).prompt_ids("a film of two halves " * 20, 1, "prompt 7")
    assert (caught.value.where, caught.value.next_step) == ("prompt 7", "shorten it")
