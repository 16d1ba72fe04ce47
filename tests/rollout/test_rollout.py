"""A rollout of which some samples are replaced by those of another one."""

import pytest
import torch

from rlhf.rollout.rollout import Rollout
from rlhf.rollout.sequences import lay_out

PAD = 9


def rollout_of(prompts: list[list[int]], responses: list[list[int]]) -> Rollout:
    """With each id's tenth as its log-probability, and responses that an odd id ends."""
    sequences = lay_out(prompts, responses, PAD)
    return Rollout(
        prompts=[str(ids) for ids in prompts],
        texts=[str(ids) for ids in responses],
        sequences=sequences,
        ended=torch.tensor([ids[-1] % 2 == 1 for ids in responses]),
        logprobs=torch.where(sequences.mask, sequences.ids[:, -sequences.time :] / 10, 0.0),
    )


@pytest.mark.parametrize("others", [[[1], [2]], [[1, 2, 3, 4, 5], [6]]], ids=["shorter prompts", "longer prompts"])
def test_other_samples_come_into_the_place_of_some(others: list[list[int]]) -> None:
    """As if all had been laid out together, whichever prompts are longer."""
    prompts = [[1, 2, 3], [4], [5, 6], [7]]
    responses = [[11, 12, 13, 14], [15], [16, 17], [18, 19]]
    written = [[21, 22, 23, 24], [25]]
    expected = rollout_of(
        [prompts[0], others[0], prompts[2], others[1]], [responses[0], written[0], responses[2], written[1]]
    )
    found = rollout_of(prompts, responses).with_samples(torch.tensor([1, 3]), rollout_of(others, written), PAD)
    assert (found.prompts, found.texts) == (expected.prompts, expected.texts)
    assert found.ended.equal(expected.ended)
    assert found.logprobs.equal(expected.logprobs)
    assert found.mask.equal(expected.mask)
    real = expected.sequences.attention_mask.bool()
    width = real.shape[1]
    assert found.sequences.attention_mask[:, -width:].bool().equal(real)
    assert not found.sequences.attention_mask[:, :-width].any()
    assert found.sequences.ids[:, -width:].equal(expected.sequences.ids)
    assert found.sequences.ids[:, :-width].eq(PAD).all()
