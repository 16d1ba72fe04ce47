from pathlib import Path

import pytest

from benchmarks.closed_form import PROMPT, save_reference
from benchmarks.exact import all_responses, log_probabilities


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_all_responses_are_all(tmp_path: Path, limit: int) -> None:
    """None twice, and their probabilities add up to 1."""
    responses = all_responses(5, 1, limit)
    assert len({tuple(response) for response in responses}) == len(responses)
    save_reference(tmp_path)
    texts, logprobs = log_probabilities(tmp_path, PROMPT, limit)
    assert len(texts) == len(responses)
    assert float(logprobs.exp().sum()) == pytest.approx(1, abs=1e-12)
