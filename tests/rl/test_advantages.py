from functools import partial

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.rl.advantages import generalised_advantages, masked_moments, whiten
from tests.rl.batches import JUNK, Batch, batches

unit = st.floats(0, 1)


def slow_advantages(rewards: list[float], values: list[float], discount: float, gae_lambda: float) -> list[float]:
    """The definition, an explicit double sum: A_t = sum_l (discount * lambda)^l delta_{t+l}."""
    next_values = [*values, 0.0][1:]
    deltas = [r + discount * n - v for r, n, v in zip(rewards, next_values, values, strict=True)]
    return [
        sum((discount * gae_lambda) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))
    ]


@given(batch=batches(), junk=st.sampled_from(JUNK), discount=unit, gae_lambda=unit)
def test_advantages_are_the_weighted_sum_of_errors(
    batch: Batch, junk: float, discount: float, gae_lambda: float
) -> None:
    """Against the explicit sum over each response alone: so padding, its length and the other rows do not matter."""
    rewards, values = batch.tensor(junk=junk), batch.tensor(junk=junk)
    advantages, returns = generalised_advantages(rewards, values, batch.mask, discount, gae_lambda)
    expected = torch.zeros_like(advantages)
    for i, n in enumerate(batch.lengths):
        row = slow_advantages(rewards[i, :n].tolist(), values[i, :n].tolist(), discount, gae_lambda)
        expected[i, :n] = torch.tensor(row, dtype=torch.float64)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, torch.where(batch.mask, expected + values, 0.0))


@given(batch=batches(), discount=unit)
def test_with_lambda_one_returns_do_not_depend_on_the_values(batch: Batch, discount: float) -> None:
    """The return is then the discounted sum of the rewards that follow, whatever the value model says."""
    rewards = batch.tensor()
    _, some = generalised_advantages(rewards, batch.tensor(), batch.mask, discount, 1.0)
    _, other = generalised_advantages(rewards, batch.tensor(), batch.mask, discount, 1.0)
    torch.testing.assert_close(some, other)


@given(batch=batches())
def test_exact_values_leave_no_advantage(batch: Batch) -> None:
    """Where the values are the sums of the rewards to come, nothing was better or worse than expected."""
    rewards = torch.where(batch.mask, batch.tensor(), 0.0)
    values = rewards.flip(1).cumsum(1).flip(1)
    advantages, _ = generalised_advantages(rewards, values, batch.mask, 1.0, 0.95)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages))


def test_advantages_and_returns_are_constants() -> None:
    """A value model must not be trained through the targets it made."""
    rewards, values = torch.randn(2, 3), torch.randn(2, 3, requires_grad=True)
    advantages, returns = generalised_advantages(rewards, values, torch.ones(2, 3, dtype=torch.bool), 1.0, 0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad


def real_values(values: Tensor, mask: Tensor) -> list[float]:
    return values[mask].tolist()


@given(batch=batches(min_length=1), junk=st.sampled_from(JUNK), scale=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_whitening_is_that_of_the_list_of_real_values(batch: Batch, junk: float, scale: float, shift: float) -> None:
    """Against plain Python over the real tokens, with and without shifting the mean."""
    values = batch.with_padding(batch.tensor(scale) + shift, junk)
    real = real_values(values, batch.mask)
    mean = sum(real) / len(real)
    deviation = (sum((x - mean) ** 2 for x in real) / len(real) + 1e-8) ** 0.5
    moments = masked_moments(values, batch.mask)
    shifted = whiten(values, batch.mask, moments)
    kept = whiten(values, batch.mask, moments, shift_mean=False)
    assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    assert_close(real_values(shifted, batch.mask), [(x - mean) / deviation for x in real])
    assert_close(real_values(kept, batch.mask), [(x - mean) / deviation + mean for x in real])
    assert not shifted[~batch.mask].any()
    assert not kept[~batch.mask].any()


@given(batch=batches(), split=st.integers(0, 5), junk=st.sampled_from(JUNK))
def test_the_moments_of_two_ranks_whiten_as_the_whole_batch(batch: Batch, split: int, junk: float) -> None:
    """Adding up the ranks' moments gives the global batch's, though one rank may hold no real token."""
    values = batch.tensor(junk=junk)
    parts = [(values[:split], batch.mask[:split]), (values[split:], batch.mask[split:])]
    moments = sum((masked_moments(*part) for part in parts), torch.zeros(3, dtype=torch.float64))
    whole = whiten(values, batch.mask, masked_moments(values, batch.mask))
    torch.testing.assert_close(torch.cat([whiten(*part, moments) for part in parts]), whole)


def test_whitening_keeps_float32_and_stays_finite_where_all_values_are_equal() -> None:
    """A batch of equal values has no deviation to divide by; it becomes zeros."""
    values, mask = torch.full((2, 3), 0.7), torch.ones(2, 3, dtype=torch.bool)
    whitened = whiten(values, mask, masked_moments(values, mask))
    torch.testing.assert_close(whitened, torch.zeros(2, 3), atol=1e-3, rtol=0.0)


def test_moments_are_exact_where_float32_sums_are_not() -> None:
    """A small deviation around a large mean survives: the squares are summed in float64."""
    values = 1000 + torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) / 100
    mask = torch.ones_like(values, dtype=torch.bool)
    whitened = whiten(values, mask, masked_moments(values, mask))
    torch.testing.assert_close(whitened.double().var(correction=0).item(), 1.0, atol=0.02, rtol=0.0)


def test_values_that_are_all_alike_are_whitened_to_0() -> None:
    """However large: rounding makes the difference of their moments negative, and no number of it."""
    values = torch.full((1, 9), 1e7 + 0.1, dtype=torch.float64)
    mask = torch.ones(1, 9, dtype=torch.bool)
    assert whiten(values, mask, masked_moments(values, mask)).abs().max() < 1e-3
