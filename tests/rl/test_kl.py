import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.rl.kl import Estimator, adapted_coefficient, kl_estimates
from tests.rl.batches import JUNK, Batch, batches

ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3")
SLOW = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(batch=batches(), junk=st.sampled_from(JUNK))
def test_estimates_are_those_of_the_definition(estimator: Estimator, batch: Batch, junk: float) -> None:
    """Against a loop over tokens in plain Python; padding gives 0 whatever it holds."""
    logprobs, reference = batch.tensor(junk=junk), batch.tensor(junk=junk)
    expected = torch.zeros_like(logprobs)
    for i, length in enumerate(batch.lengths):
        for t in range(length):
            expected[i, t] = SLOW[estimator]((logprobs[i, t] - reference[i, t]).item())
    torch.testing.assert_close(kl_estimates(logprobs, reference, batch.mask, estimator), expected)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@given(batch=batches(), junk=st.sampled_from(JUNK))
def test_the_gradient_is_that_of_the_real_tokens_alone(estimator: Estimator, batch: Batch, junk: float) -> None:
    """As a term of the loss: d for k2, 1 - exp(-d) for k3, and exactly 0 on padding, NaN there or not."""
    logprobs, reference = batch.tensor(junk=junk).requires_grad_(), batch.tensor(junk=junk)
    kl_estimates(logprobs, reference, batch.mask, estimator).sum().backward()
    d = torch.where(batch.mask, logprobs.detach() - reference, 0.0)
    expected = d if estimator == "k2" else 1 - (-d).exp()
    torch.testing.assert_close(logprobs.grad, expected)


def distributions(gap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A policy and a reference over four tokens, as log-probabilities."""
    policy = torch.tensor([[1.0, 0.0, -2.0, 0.5]], dtype=torch.float64)
    other = torch.tensor([[0.0, 0.3, 1.0, -1.0]], dtype=torch.float64)
    return torch.log_softmax(policy, -1), torch.log_softmax(policy + gap * (other - policy), -1)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: Estimator) -> None:
    """Weighted by the policy's own probabilities they are the exact divergence, however far apart the two are."""
    policy, reference = distributions(1.0)
    estimate = (policy.exp() * kl_estimates(policy, reference, policy <= 0, estimator)).sum()
    torch.testing.assert_close(estimate, (policy.exp() * (policy - reference)).sum())


def test_k2_is_nearly_unbiased_where_the_policy_is_near_its_reference() -> None:
    """Its bias is of third order in the distance."""
    policy, reference = distributions(0.01)
    estimate = (policy.exp() * kl_estimates(policy, reference, policy <= 0, "k2")).sum()
    exact = (policy.exp() * (policy - reference)).sum()
    assert abs(estimate / exact - 1) < 0.02


@given(batch=batches())
def test_k2_and_k3_are_never_negative(batch: Batch) -> None:
    """Unlike k1: it is what they are for."""
    for estimator in ("k2", "k3"):
        assert (kl_estimates(batch.tensor(), batch.tensor(), batch.mask, estimator) >= 0).all()


def test_k1_in_the_loss_would_do_nothing_and_k2_pulls_towards_the_reference() -> None:
    """The expected gradient over the policy's own samples: 0 for k1, that of the exact divergence for k2."""
    start, reference = distributions(1.0)
    expected: dict[str, torch.Tensor] = {}
    for estimator in ("k1", "k2"):
        logits = start.clone().requires_grad_()
        logprobs = torch.log_softmax(logits, -1)
        # The samples' probabilities are constants in a loss over samples.
        (logprobs.detach().exp() * kl_estimates(logprobs, reference, logprobs <= 0, estimator)).sum().backward()
        assert logits.grad is not None
        expected[estimator] = logits.grad
    logits = start.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, -1)
    (logprobs.exp() * (logprobs - reference)).sum().backward()
    torch.testing.assert_close(expected["k1"], torch.zeros_like(start))
    torch.testing.assert_close(expected["k2"], logits.grad)


@given(
    coef=st.floats(1e-3, 10),
    kl=st.floats(-1, 100),
    target=st.floats(0.1, 20),
    horizon=st.integers(1, 20_000),
    responses=st.integers(1, 100_000),
)
def test_the_controller_moves_towards_its_target_and_never_far(
    coef: float, kl: float, target: float, horizon: int, responses: int
) -> None:
    """Too much KL raises β, too little lowers it, by at most a fifth over the horizon, and never to 0 or below."""
    moved = adapted_coefficient(coef, kl, target, horizon, responses)
    assert 0.79 * coef < moved < 1.21 * coef
    assert abs(moved / coef - 1) <= 0.2 * responses / horizon + 1e-12
    assert (moved > coef) == (kl > target) or math.isclose(moved, coef)
    assert adapted_coefficient(coef, target, target, horizon, responses) == coef


@given(kl=st.floats(-1, 100), share=st.floats(0.001, 1))
def test_the_controller_is_ziegler_s_where_the_horizon_is_longer(kl: float, share: float) -> None:
    """Section 2.2, written out."""
    error = sorted([-0.2, (kl - 6.0) / 6.0, 0.2])[1]
    responses = round(10_000 * share)
    assert adapted_coefficient(0.5, kl, 6.0, 10_000, responses) == pytest.approx(0.5 * (1 + error * responses / 10_000))


def test_the_controller_holds_a_policy_at_its_target() -> None:
    """A made-up policy whose KL falls as β grows ends at the target, from far above and from far below."""
    for coef in (0.001, 10.0):
        for _ in range(4000):
            coef = adapted_coefficient(coef, 1 / coef, 6.0, 1000, 64)
        assert 1 / coef == pytest.approx(6.0, rel=0.02)


@pytest.mark.parametrize(
    ("kl", "responses", "factor"),
    [(6.6, 50, 1.05), (5.4, 50, 0.95), (60.0, 50, 1.1), (0.0, 50, 0.9), (-3.0, 100, 0.8), (6.6, 900, 1.1)],
)
def test_the_controller_is_that_of_the_paper(kl: float, responses: int, factor: float) -> None:
    """A target of 6 nats and a horizon of 100 responses: a tenth too much over half of it is a twentieth."""
    assert adapted_coefficient(0.3, kl, 6.0, 100, responses) == pytest.approx(0.3 * factor)
