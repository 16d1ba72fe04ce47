import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.trl_parity import (
    Comparison,
    apart,
    effect_of_last_step,
    one_step_later,
    one_step_sooner,
    same,
    table,
    whiten_unbiased,
)
from rlhf.rl.advantages import generalised_advantages, kl_penalised_rewards
from rlhf.rl.masks import masked
from tests.rl.batches import Batch, batches

unit = st.floats(0, 1)


def with_step_after(mask: torch.Tensor) -> torch.Tensor:
    """One more step in each row where there is room, as in TRL."""
    return mask | torch.nn.functional.pad(mask[:, :-1], (1, 0), value=False)


@given(batch=batches(min_length=1), discount=unit, gae_lambda=unit)
def test_a_step_after_the_eos_takes_from_advantages_what_the_closed_form_says(
    batch: Batch, discount: float, gae_lambda: float
) -> None:
    """GAE over one step more, which pays the score and has a value, against GAE that ends at the EOS."""
    mask, longer = batch.mask, with_step_after(batch.mask)
    logprobs, reference, values = batch.tensor(), batch.tensor(), batch.tensor()
    scores = batch.tensor()[:, 0]
    rewards = kl_penalised_rewards(scores, logprobs, reference, mask, 0.1)
    later = one_step_later(rewards, scores, mask, longer)
    torch.testing.assert_close(one_step_sooner(later, mask, longer), rewards)

    ours, _ = generalised_advantages(rewards, values, mask, discount, gae_lambda)
    theirs, _ = generalised_advantages(later, values, longer, discount, gae_lambda)
    effect = effect_of_last_step(later, values, mask, longer, discount, gae_lambda)
    torch.testing.assert_close(ours - effect, masked(theirs, mask))


@given(batch=batches(min_length=2))
def test_unbiased_whitening_is_torchs(batch: Batch) -> None:
    """Against mean and unbiased deviation of the real tokens alone."""
    values = batch.tensor(3.0)
    real = values[batch.mask]
    expected = (real - real.mean()) / (real.var() + 1e-8).sqrt()
    torch.testing.assert_close(whiten_unbiased(values, batch.mask)[batch.mask], expected)
    shifted = whiten_unbiased(values, batch.mask, shift_mean=False)[batch.mask]
    torch.testing.assert_close(shifted, expected + real.mean())


@pytest.mark.parametrize(
    ("row", "fine"),
    [
        (same("equal", torch.zeros(2), torch.zeros(2)), True),
        (same("unequal", torch.zeros(2), torch.tensor([0.0, 1e-4])), False),
        (same("no number", torch.zeros(2), torch.tensor([0.0, torch.nan])), False),
        (apart("convention", torch.zeros(1), torch.ones(1), torch.ones(1), "why"), True),
        (apart("more than the convention", torch.zeros(1), torch.ones(1), torch.zeros(1), "why"), False),
        (apart("convention that changes nothing", torch.ones(1), torch.ones(1), torch.ones(1), "why"), False),
    ],
)
def test_a_row_is_fine_only_if_its_figures_are_what_it_says(row: Comparison, fine: bool) -> None:
    """The exit status hangs on it, and the table shows it."""
    assert row.fine == fine
    assert ("NOT AS SAID" in table([row])) != fine


def test_a_difference_in_either_recording_counts() -> None:
    """NaN included, in either order."""
    good, bad = (same("q", torch.zeros(1), torch.full((1,), x)) for x in (0.0, torch.nan))
    assert not good.worst(bad).fine
    assert not bad.worst(good).fine
