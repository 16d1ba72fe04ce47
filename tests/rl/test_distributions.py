import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.rl.kl import logprobs_and_entropies, logprobs_of

temperatures = st.floats(0.1, 3.0)


def random_logits(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(5, (2, 3), generator=generator)


@given(seed=st.integers(0, 2**32), temperature=temperatures)
def test_logprobs_and_entropies_are_those_of_the_definition(seed: int, temperature: float) -> None:
    """Against sums of exponentials in plain Python."""
    logits, tokens = random_logits(seed)
    logprobs, entropies = logprobs_and_entropies(logits, tokens, temperature)
    assert torch.equal(logprobs_of(logits, tokens, temperature), logprobs)
    for i in range(2):
        for t in range(3):
            weights = [math.exp(z / temperature) for z in logits[i, t].tolist()]
            p = [w / sum(weights) for w in weights]
            torch.testing.assert_close(logprobs[i, t].item(), math.log(p[int(tokens[i, t])]))
            torch.testing.assert_close(entropies[i, t].item(), -sum(q * math.log(q) for q in p))


def test_without_a_temperature_it_is_1() -> None:
    """The softmax of the logits as they are."""
    logits, tokens = random_logits(0)
    assert torch.equal(logprobs_of(logits, tokens), logprobs_of(logits, tokens, 1.0))
    assert torch.equal(logprobs_and_entropies(logits, tokens)[1], logprobs_and_entropies(logits, tokens, 1.0)[1])


@given(seed=st.integers(0, 2**32), temperature=temperatures)
def test_the_gradient_of_logprobs_is_that_of_finite_differences(seed: int, temperature: float) -> None:
    """The backward pass is written by hand; finite differences know nothing of it."""
    logits, tokens = random_logits(seed)
    assert torch.autograd.gradcheck(lambda z: logprobs_of(z, tokens, temperature), logits.requires_grad_())


@given(seed=st.integers(0, 2**32), temperature=temperatures)
def test_the_gradient_of_entropies_is_that_of_finite_differences(seed: int, temperature: float) -> None:
    """It is what an entropy bonus follows."""
    logits, tokens = random_logits(seed)
    assert torch.autograd.gradcheck(
        lambda z: logprobs_and_entropies(z, tokens, temperature)[1], logits.requires_grad_()
    )


@given(seed=st.integers(0, 2**32), temperature=temperatures)
def test_the_gradient_of_both_is_that_of_finite_differences(seed: int, temperature: float) -> None:
    """They share their passes over the logits."""
    logits, tokens = random_logits(seed)
    assert torch.autograd.gradcheck(lambda z: logprobs_and_entropies(z, tokens, temperature), logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logprobs_are_as_exact_as_float32_whatever_the_model_s_precision(dtype: torch.dtype) -> None:
    """Only the logits are rounded, never the log-probability; the gradient comes back in the logits' type."""
    logits, tokens = random_logits(0, dtype)
    logits.requires_grad_()
    logprobs = logprobs_of(logits, tokens, 0.7)
    exact = torch.log_softmax(logits.detach().double() / 0.7, -1).gather(-1, tokens[..., None])[..., 0]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-6, atol=1e-6)
    logprobs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


def test_logprobs_and_entropies_leave_the_logits_as_they_were() -> None:
    """They work in place on a copy, and must not on what the model returned."""
    logits, tokens = random_logits(0, torch.float32)
    before = logits.clone()
    logits.requires_grad_()
    torch.stack(logprobs_and_entropies(logits, tokens)).sum().backward()
    assert torch.equal(logits, before)


def test_impossible_and_huge_logits_are_no_trouble() -> None:
    """-inf is probability 0, and logits of thousands do not overflow."""
    logits = torch.tensor([[float("-inf"), 5000.0, 5000.0]], requires_grad=True)
    logprobs = logprobs_of(logits, torch.tensor([1]))
    torch.testing.assert_close(logprobs, torch.tensor([-math.log(2)]))
    entropies = logprobs_and_entropies(logits, torch.tensor([1]))[1]
    torch.testing.assert_close(entropies, torch.tensor([math.log(2)]))
    logprobs.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0.5, -0.5]]))


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_logits_under_padding_pass_no_gradient(junk: float) -> None:
    """A position that the loss masks gets exactly 0, though its logits are not finite."""
    logits, tokens = random_logits(0)
    logits[:, 2] = junk
    logits.requires_grad_()
    logprobs, entropies = logprobs_and_entropies(logits, tokens)
    said = logprobs + entropies
    torch.where(torch.tensor([True, True, False]), said, 0.0).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[:, 2].any()
    assert logits.grad[:, :2].any()
