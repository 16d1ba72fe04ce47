import math
from dataclasses import fields
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.rl.kl import Estimator
from rlhf.rl.losses import Penalties, PolicySums, clipped_value_loss, demonstration_loss
from rlhf.rl.losses import clipped_policy_loss as whole_policy_loss
from tests.rl.batches import JUNK, Batch, batches

clips = st.floats(0.01, 0.5)


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float | None, num_tokens: int
) -> tuple[Tensor, PolicySums]:
    """The surrogate alone: with no penalty beside it, entropies and the reference must not matter."""
    nothing = torch.full_like(advantages, float("nan"))
    return whole_policy_loss(
        logprobs, nothing, old_logprobs, nothing, advantages, mask, clip=clip, num_tokens=num_tokens
    )


def near(batch: Batch, values: Tensor, spread: float = 0.3) -> Tensor:
    """Old values close enough to the new for some tokens to be clipped and some not."""
    return values + spread * torch.randn(values.shape, generator=batch.generator, dtype=torch.float64)


@given(batch=batches(min_length=1), junk=st.sampled_from(JUNK), clip=clips)
def test_the_policy_loss_and_its_sums_are_those_of_the_definition(batch: Batch, junk: float, clip: float) -> None:
    """Against a loop over tokens in plain Python."""
    logprobs, advantages = batch.tensor(junk=junk), batch.tensor(junk=junk)
    old = near(batch, logprobs)
    loss, sums = clipped_policy_loss(logprobs, old, advantages, batch.mask, clip=clip, num_tokens=10)
    losses, ratios, clipped = [], [], 0
    for i, length in enumerate(batch.lengths):
        for t in range(length):
            ratio, advantage = math.exp(logprobs[i, t] - old[i, t]), advantages[i, t].item()
            limited = min(max(ratio, 1 - clip), 1 + clip)
            losses.append(-min(ratio * advantage, limited * advantage))
            clipped += limited * advantage < ratio * advantage
            ratios.append(ratio)
    n, mean = len(ratios), sum(ratios) / len(ratios)
    torch.testing.assert_close(loss.item(), sum(losses) / 10)
    torch.testing.assert_close(sums.mean_loss.item(), sum(losses) / n)
    torch.testing.assert_close(sums.clip_fraction.item(), clipped / n)
    torch.testing.assert_close(sums.approximate_kl.item(), sum(math.log(r) ** 2 for r in ratios) / n / 2)
    torch.testing.assert_close(sums.mean_ratio.item(), mean)
    torch.testing.assert_close(sums.ratio_variance.item(), sum((r - mean) ** 2 for r in ratios) / n)


@given(batch=batches(min_length=1), junk=st.sampled_from(JUNK), clip=clips)
def test_the_value_loss_and_its_sums_are_those_of_the_definition(batch: Batch, junk: float, clip: float) -> None:
    """Against a loop over tokens in plain Python."""
    values, returns = batch.tensor(junk=junk), batch.tensor(junk=junk)
    old = near(batch, values)
    loss, sums = clipped_value_loss(values, old, returns, batch.mask, clip=clip, num_tokens=10)
    losses, clipped = [], 0
    for i, length in enumerate(batch.lengths):
        for t in range(length):
            value, before, target = values[i, t].item(), old[i, t].item(), returns[i, t].item()
            limited = min(max(value, before - clip), before + clip)
            losses.append(max((value - target) ** 2, (limited - target) ** 2) / 2)
            clipped += (limited - target) ** 2 > (value - target) ** 2
    torch.testing.assert_close(loss.item(), sum(losses) / 10)
    torch.testing.assert_close(sums.mean_loss.item(), sum(losses) / len(losses))
    torch.testing.assert_close(sums.clip_fraction.item(), clipped / len(losses))


@given(batch=batches(min_length=1), clip=clips)
def test_gradients_are_those_of_finite_differences(batch: Batch, clip: float) -> None:
    """Random values lie off the kinks, where the losses have no derivative."""
    logprobs, other = batch.tensor(), batch.tensor()
    old, mask = near(batch, logprobs), batch.mask
    policy = partial(clipped_policy_loss, old_logprobs=old, advantages=other, mask=mask, clip=clip, num_tokens=3)
    value = partial(clipped_value_loss, old_values=old, returns=other, mask=mask, clip=clip, num_tokens=3)
    assert torch.autograd.gradcheck(lambda x: policy(x)[0], logprobs.clone().requires_grad_(), eps=1e-8, atol=1e-4)
    assert torch.autograd.gradcheck(lambda x: value(x)[0], logprobs.clone().requires_grad_(), eps=1e-8, atol=1e-4)


@given(batch=batches(), clip=st.floats(0, 10))
def test_the_first_update_is_the_plain_policy_gradient_for_any_clip(batch: Batch, clip: float) -> None:
    """Where old and new policy are the same the ratio is 1: the gradient is -A / tokens, and nothing is clipped."""
    logprobs, advantages = batch.tensor().requires_grad_(), batch.tensor()
    loss, sums = clipped_policy_loss(logprobs, logprobs, advantages, batch.mask, clip=clip, num_tokens=5)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.where(batch.mask, -advantages / 5, 0.0))
    assert sums.clipped == 0
    assert sums.squared_log_ratio == 0
    assert sums.ratio == sums.squared_ratio == sums.tokens


@pytest.mark.parametrize("junk", JUNK)
@given(batch=batches(), clip=clips)
def test_what_lies_under_padding_never_matters(junk: float, batch: Batch, clip: float) -> None:
    """Losses, sums and gradients are the same bits with NaN or infinity in the padding of any input."""
    new, old, target = batch.tensor(), batch.tensor(), batch.tensor()
    for loss_of in (clipped_policy_loss, clipped_value_loss):
        outcomes = []
        for filler in (0.0, junk):
            x = batch.with_padding(new, filler).requires_grad_()
            others = batch.with_padding(old, filler), batch.with_padding(target, filler)
            loss, sums = loss_of(x, *others, batch.mask, clip=clip, num_tokens=4)
            loss.backward()
            assert x.grad is not None
            outcomes.append((loss, sums.to_tensor(), x.grad))
        for clean, dirty in zip(*outcomes, strict=True):
            assert torch.equal(clean, dirty)


@given(batch=batches(), clip=clips, split=st.integers(0, 5))
def test_parts_add_up_to_the_whole_however_the_batch_is_split(batch: Batch, clip: float, split: int) -> None:
    """Micro batches and ranks must not change the objective, its gradient or what is reported."""
    tensors = batch.tensor(), batch.tensor(), batch.tensor(), batch.mask
    for loss_of in (clipped_policy_loss, clipped_value_loss):
        whole, whole_sums = loss_of(*tensors, clip=clip, num_tokens=7)
        first, first_sums = loss_of(*(x[:split] for x in tensors), clip=clip, num_tokens=7)
        second, second_sums = loss_of(*(x[split:] for x in tensors), clip=clip, num_tokens=7)
        torch.testing.assert_close(first + second, whole)
        torch.testing.assert_close(first_sums.to_tensor() + second_sums.to_tensor(), whole_sums.to_tensor())


def test_sums_survive_the_vector_that_ranks_add() -> None:
    """Field by field, in order; adding sums adds their vectors."""
    sums = PolicySums(*(torch.tensor(float(i), dtype=torch.float64) for i in range(9)))
    assert PolicySums.from_tensor(sums.to_tensor()) == sums
    assert (sums + sums).squared_ratio == 10


def test_sums_are_kept_in_float64_whatever_the_model_computes_in() -> None:
    """Those of many micro batches lose nothing."""
    batch = [torch.randn(2, 3) for _ in range(5)]
    mask = torch.ones(2, 3, dtype=torch.bool)
    penalties = Penalties(0.1, "k2", entropy_bonus=0.1)
    _, policy = whole_policy_loss(*batch, mask, clip=0.2, num_tokens=6, penalties=penalties)  # pyright: ignore[reportCallIssue] - five tensors
    _, demonstrations = demonstration_loss(batch[0], mask, coef=1.0, num_tokens=6)
    _, value = clipped_value_loss(*batch[:3], mask, clip=0.2, num_tokens=6)  # pyright: ignore[reportCallIssue] - three
    for sums in (policy, demonstrations, value):
        assert {getattr(sums, field.name).dtype for field in fields(sums)} == {torch.float64}


def test_sums_carry_no_graph() -> None:
    """They are reported, and would keep a micro batch's activations alive."""
    now = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    penalties = Penalties(0.1, "k2", entropy_bonus=0.1)
    policy = whole_policy_loss(now, now, now, now, now, mask, clip=0.2, num_tokens=6, penalties=penalties)[1]
    demonstrations = demonstration_loss(now, mask, coef=1.0, num_tokens=6)[1]
    value = clipped_value_loss(now, now, now, mask, clip=0.2, num_tokens=6)[1]
    assert not any(sums.to_tensor().requires_grad for sums in (policy, demonstrations, value))


def test_rounding_makes_no_variance_negative() -> None:
    """Ratios that are all alike have the variance 0."""
    values = torch.tensor([3.0, 0, 0, 0, 3.3, 3.63 - 1e-9, 0, 0, 0], dtype=torch.float64)
    assert PolicySums.from_tensor(values).ratio_variance == 0


def test_only_the_first_input_is_trained() -> None:
    """Old values, advantages and returns are constants even where they still carry a graph."""
    new, old, target = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    for loss_of in (clipped_policy_loss, clipped_value_loss):
        loss_of(new, old, target, torch.ones(2, 3, dtype=torch.bool), clip=0.2, num_tokens=6)[0].backward()
    assert new.grad is not None
    assert old.grad is None
    assert target.grad is None


@given(batch=batches(min_length=1), junk=st.sampled_from(JUNK), kl=st.floats(0.01, 2), bonus=st.floats(0.01, 2))
def test_penalties_add_kl_and_subtract_entropy(batch: Batch, junk: float, kl: float, bonus: float) -> None:
    """Against sums over the real tokens; value and gradient do not see what lies under padding."""
    tensors = [batch.tensor(junk=junk) for _ in range(4)]
    logprobs, entropies = tensors[0].requires_grad_(), tensors[1].requires_grad_()
    old, reference = tensors[0].detach().clone(), tensors[2]
    none = torch.zeros_like(old)
    penalties = Penalties(kl, "k2", entropy_bonus=bonus)
    loss, sums = whole_policy_loss(
        logprobs, entropies, old, reference, none, batch.mask, clip=0.2, num_tokens=5, penalties=penalties
    )
    loss.backward()
    real = batch.mask
    distance = torch.where(real, old - reference, 0.0)
    kl_term, entropy_term = kl * distance.square().sum() / 2, -bonus * torch.where(real, entropies, 0.0).sum()
    torch.testing.assert_close(loss, (kl_term + entropy_term) / 5)
    torch.testing.assert_close(sums.kl_term, kl_term)
    torch.testing.assert_close(sums.entropy_term, entropy_term.detach())
    torch.testing.assert_close(logprobs.grad, kl * distance / 5)
    torch.testing.assert_close(entropies.grad, torch.where(real, -bonus / 5, 0.0).double())


def kl_gradient(estimator: Estimator, *, weights: bool) -> tuple[Tensor, Tensor]:
    """The expected gradient of the KL term over all responses of two tokens of three, and that of the divergence.

    The responses are those of a policy whose logits are about one away. The divergence is the sum of the two tokens'
    KL(policy ‖ reference), the second's being the mean over the first tokens that this policy sampled.
    """
    generator = torch.Generator().manual_seed(0)
    # The first row holds the first token's logits, the others those of the second after each first.
    logits, reference, away = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    now, fixed = logits.log_softmax(-1), reference.log_softmax(-1)
    old = (logits.detach() + away).log_softmax(-1)
    penalties = Penalties(0.7, estimator, weights)
    mask = torch.ones(1, 2, dtype=torch.bool)

    def of_response(table: Tensor, first: int, second: int) -> Tensor:
        return torch.stack([table[0, first], table[1 + first, second]])[None]

    total = torch.zeros((), dtype=torch.float64)
    for first, second in product(range(3), range(3)):
        here, before, there = (of_response(table, first, second) for table in (now, old, fixed))
        none = torch.zeros_like(before)
        loss, _ = whole_policy_loss(here, none, before, there, none, mask, clip=0.2, num_tokens=1, penalties=penalties)
        total = total + before.sum().exp() * loss
    divergences = (now.exp() * (now - fixed)).sum(-1)
    exact = 0.7 * (divergences[0] + old[0].exp() @ divergences[1:])
    found, expected = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (total, exact))
    return found, expected


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_weighted_kl_in_the_loss_pulls_along_the_divergence_whoever_sampled(estimator: Estimator) -> None:
    """By enumeration; without weights the gradient is another."""
    found, expected = kl_gradient(estimator, weights=True)
    torch.testing.assert_close(found, expected)
    found, expected = kl_gradient(estimator, weights=False)
    assert (found - expected).norm() > 0.3 * expected.norm()


@given(batch=batches(min_length=1), junk=st.sampled_from(JUNK))
def test_without_clipping_the_losses_are_the_plain_ones(batch: Batch, junk: float) -> None:
    """-r A and half the squared error, whatever the distance from the old ones; nothing counts as clipped."""
    new, old, target = (batch.tensor(junk=junk) for _ in range(3))
    loss, sums = clipped_policy_loss(new, old, target, batch.mask, clip=None, num_tokens=3)
    real = batch.mask
    torch.testing.assert_close(loss, -((new - old).exp() * target)[real].sum() / 3)
    assert sums.clipped == 0
    loss, sums = clipped_value_loss(new, old, target, batch.mask, clip=None, num_tokens=3)
    torch.testing.assert_close(loss, (new - target)[real].square().sum() / 6)
    assert sums.clipped == 0


@given(batch=batches(min_length=1), junk=st.sampled_from(JUNK), coef=st.floats(0.01, 30))
def test_demonstrations_add_their_negative_log_likelihood(batch: Batch, junk: float, coef: float) -> None:
    """Weighted in the loss and its gradient, unweighted in what is reported; all other sums stay as they were."""
    logprobs = batch.tensor(junk=junk).requires_grad_()
    loss, sums = demonstration_loss(logprobs, batch.mask, coef=coef, num_tokens=6)
    loss.backward()
    mean = -logprobs.detach()[batch.mask].sum() / 6
    torch.testing.assert_close(loss.detach(), coef * mean)
    torch.testing.assert_close(sums.demonstrations, mean)
    torch.testing.assert_close(logprobs.grad, torch.where(batch.mask, -coef / 6, 0.0).double())
    assert not sums.to_tensor()[:-1].any()
