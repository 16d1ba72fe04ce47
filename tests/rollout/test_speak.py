from pathlib import Path

import pytest

from rlhf.errors import RequestError
from rlhf.rollout.speak import answers
from tests.models.tiny import make_tiny_llama


def test_answers_follow_from_the_seed_and_fit_the_context(tmp_path: Path) -> None:
    """One for each prompt; what does not fit is refused with what would."""
    folder = make_tiny_llama(tmp_path / "tiny")
    found = answers(folder, ["a film", "the film is"], 0.8, 8, 0)
    assert len(found) == 2
    assert found == answers(folder, ["a film", "the film is"], 0.8, 8, 0)
    assert found != answers(folder, ["a film", "the film is"], 0.8, 8, 1)
    with pytest.raises(RequestError, match="do not fit the context of 64") as caught:
        answers(folder, ["a film"], 0.8, 64, 0)
    assert caught.value.where == "prompt 1"
