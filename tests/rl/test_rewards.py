import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.rl.advantages import kl_penalised_rewards, shaped_scores
from rlhf.rl.kl import Estimator, kl_estimates
from tests.rl.batches import JUNK, Batch, batches


@given(batch=batches(), junk=st.sampled_from(JUNK), kl_coef=st.floats(0, 2))
def test_rewards_are_the_penalty_everywhere_and_the_score_at_the_end(batch: Batch, junk: float, kl_coef: float) -> None:
    """Against a loop over each response's tokens; padding and empty rows get nothing."""
    logprobs, reference = batch.tensor(junk=junk), batch.tensor(junk=junk)
    scores = torch.randn(len(batch.lengths), generator=batch.generator, dtype=torch.float64)
    expected = torch.zeros_like(logprobs)
    for i, length in enumerate(batch.lengths):
        for t in range(length):
            expected[i, t] = -kl_coef * (logprobs[i, t] - reference[i, t])
        if length:
            expected[i, length - 1] += scores[i]
    torch.testing.assert_close(kl_penalised_rewards(scores, logprobs, reference, batch.mask, kl_coef), expected)


@given(batch=batches(), estimator=st.sampled_from(["k2", "k3"]))
def test_the_penalty_is_by_the_estimator_that_is_asked_for(batch: Batch, estimator: Estimator) -> None:
    """What it adds to the same scores without a penalty."""
    logprobs, reference = batch.tensor(), batch.tensor()
    scores = torch.zeros(len(batch.lengths), dtype=torch.float64)
    with_penalty, without = (
        kl_penalised_rewards(scores, logprobs, reference, batch.mask, coef, estimator) for coef in (0.5, 0.0)
    )
    torch.testing.assert_close(with_penalty - without, -0.5 * kl_estimates(logprobs, reference, batch.mask, estimator))


@given(batch=batches(min_length=1), kl_coef=st.floats(0, 2))
def test_a_response_s_rewards_sum_to_the_penalised_score(batch: Batch, kl_coef: float) -> None:
    """The objective of the paper is a reward per response; spreading it over tokens must not change its sum."""
    logprobs, reference = batch.tensor(), batch.tensor()
    scores = torch.randn(len(batch.lengths), generator=batch.generator, dtype=torch.float64)
    kl = kl_estimates(logprobs, reference, batch.mask).sum(1)
    rewards = kl_penalised_rewards(scores, logprobs, reference, batch.mask, kl_coef)
    torch.testing.assert_close(rewards.sum(1), scores - kl_coef * kl)


def test_only_responses_that_were_cut_off_pay_for_it() -> None:
    """The penalty is subtracted from their score, or another score replaces it; the others are left alone."""
    scores, ended = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([True, False, False])
    penalised = shaped_scores(scores, ended, clip=None, missing_eos_penalty=0.5, missing_eos_score=None)
    assert penalised.tolist() == [1.0, 1.5, -1.5]
    replaced = shaped_scores(scores, ended, clip=None, missing_eos_penalty=0.5, missing_eos_score=-3.0)
    assert replaced.tolist() == [1.0, -3.0, -3.0]


def test_clipping_never_hides_that_a_response_did_not_end() -> None:
    """It comes before the penalty: a huge score without EOS is worth less than one with it."""
    scores = torch.tensor([9.0, 9.0, -9.0])
    shaped = shaped_scores(
        scores, torch.tensor([True, False, True]), clip=2.0, missing_eos_penalty=1.0, missing_eos_score=None
    )
    assert shaped.tolist() == [2.0, 1.0, -2.0]
