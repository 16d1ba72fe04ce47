import math

import pytest
import torch

from rlhf.rl.kl import truncated_importance_weights
from rlhf.rl.losses import clipped_policy_loss

SAMPLER = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
TRAINED = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=torch.float64)


@pytest.mark.parametrize("cap", [0.5, 2.0, 100.0])
def test_the_weights_turn_the_sampler_s_mean_into_the_trained_policy_s_up_to_the_cap(cap: float) -> None:
    """Over all two-token responses, listed: each token counts min(p, cap · q), p being the trained policy's."""
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    mask = torch.ones_like(pairs, dtype=torch.bool)
    weights = truncated_importance_weights(TRAINED[pairs].log(), SAMPLER[pairs].log(), mask, cap)
    likely = SAMPLER[pairs].prod(-1, keepdim=True)
    mass = torch.zeros(4, dtype=torch.float64).index_add(0, pairs.flatten(), (likely * weights).flatten()) / 2
    expected = [min(p, cap * q) for p, q in zip(TRAINED.tolist(), SAMPLER.tolist(), strict=True)]
    torch.testing.assert_close(mass, torch.tensor(expected, dtype=torch.float64))


def test_the_gradient_is_then_that_of_the_trained_policy_s_own_samples() -> None:
    """The first update of PPO on all tokens, each as likely as the sampler has it, without a cap that bites."""
    advantages = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)

    def gradient(weights: torch.Tensor) -> torch.Tensor:
        logits = TRAINED.log().clone().requires_grad_()
        now = logits.log_softmax(-1)[None]
        zeros = torch.zeros_like(now)
        clipped_policy_loss(now, zeros, now, zeros, advantages * weights, mask, clip=0.2, num_tokens=1)[0].backward()
        assert logits.grad is not None
        return logits.grad

    corrected = truncated_importance_weights(TRAINED.log()[None], SAMPLER.log()[None], mask, 100.0)
    torch.testing.assert_close(gradient(SAMPLER * corrected), gradient(TRAINED[None]))
    assert not torch.allclose(gradient(SAMPLER[None]), gradient(TRAINED[None]), atol=0.1)


def test_what_lies_under_padding_is_no_weight() -> None:
    """Not even what is no number."""
    logprobs = torch.tensor([[0.0, math.nan]])
    found = truncated_importance_weights(logprobs, torch.tensor([[math.log(0.8), -math.inf]]), logprobs == 0, 2.0)
    torch.testing.assert_close(found, torch.tensor([[1.25, 1.0]]))
