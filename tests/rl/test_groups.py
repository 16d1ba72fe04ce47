"""Advantages of groups, the losses of ratios and averages, against slow float64 versions and by their properties."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.rl.advantages import group_advantages, soft_overlong_penalty
from rlhf.rl.losses import Averaging, clipped_policy_loss
from rlhf.rl.metrics import group_metrics

SIZE, GROUPS, TIME, LONGEST = 4, 3, 5, 7
REWARDS = torch.randn(SIZE * GROUPS, generator=torch.Generator().manual_seed(3))


def slow_advantages(rewards: list[float], baseline: str, deviation: str) -> list[float]:
    """One response at a time."""
    found: list[float] = []
    for start in range(0, len(rewards), SIZE):
        group = rewards[start : start + SIZE]
        for place, reward in enumerate(group):
            compared = group if baseline == "mean" else group[:place] + group[place + 1 :]
            found.append(reward - sum(compared) / len(compared))
            spread = {"group": group, "batch": rewards, "none": None}[deviation]
            if spread is not None:
                middle = sum(spread) / len(spread)
                found[-1] /= math.sqrt(sum((one - middle) ** 2 for one in spread) / (len(spread) - 1)) + 1e-4
    return found


@pytest.mark.parametrize("deviation", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
def test_advantages_are_those_of_the_papers(baseline: Any, deviation: Any) -> None:
    """Each response against its group's mean, or against the others' mean, by a deviation or by none."""
    ours = group_advantages(REWARDS.double(), SIZE, baseline=baseline, deviation=deviation)
    slow = slow_advantages(REWARDS.double().tolist(), baseline, deviation)
    torch.testing.assert_close(ours, torch.tensor(slow, dtype=torch.float64))


@pytest.mark.parametrize("deviation", ["group", "batch", "none"])
def test_a_constant_for_a_prompt_changes_no_advantage(deviation: Any) -> None:
    """A hard prompt is no reason to learn less from its responses; with ``batch`` the constant is for all."""
    size = SIZE if deviation == "batch" else 1
    more = torch.arange(GROUPS).repeat_interleave(SIZE) * (size == 1) + 5.0
    before, after = (
        group_advantages(one, SIZE, baseline="mean", deviation=deviation)
        for one in (REWARDS.double(), REWARDS.double() + more)
    )
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize("value", [0.1, -1e6, 1 / 3])
def test_equal_rewards_give_no_gradient_and_are_counted(size: int, value: float) -> None:
    """Exactly 0, for the deviation's floor would make a rounding error a thousand times larger."""
    rewards = torch.full((2 * size,), value)
    rewards[-1] += 1 + abs(value)
    advantages = group_advantages(rewards, size, baseline="mean", deviation="group")
    assert advantages[:size].eq(0).all()
    assert advantages[size:].ne(0).all()
    metrics = group_metrics(rewards, torch.arange(2 * size) >= size, size)
    assert metrics["groups/without_gradient"] == 0.5
    assert metrics["groups/none_ended"] == 0.5


def test_the_overlong_penalty_grows_over_the_buffer() -> None:
    """DAPO, Eq. 13: none before the buffer, -1 at the limit, a line between."""
    lengths = torch.tensor([1, 6, 7, 8, 10])
    assert soft_overlong_penalty(lengths, 10, 4).tolist() == [0, 0, -0.25, -0.5, -1]


def batch() -> dict[str, Tensor]:
    """Responses of lengths 1 to 5, with NaN under padding."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(TIME)[None] < torch.tensor([1, 5, 3, 4, 2, 5])[:, None]
    names = ("logprobs", "old_logprobs", "reference_logprobs", "advantages", "entropies")
    drawn = {name: torch.randn(6, TIME, generator=generator, dtype=torch.float64) * 0.4 - 1 for name in names}
    drawn["advantages"] += 1
    return {name: torch.where(mask, value, math.nan) for name, value in drawn.items()} | {"mask": mask}


def slow_loss(
    given: dict[str, Tensor], ratio: str, average: str, clip: tuple[float, float], dual: float | None
) -> float:
    """One token at a time."""
    responses: list[list[float]] = []
    for row in range(len(given["mask"])):
        length = int(given["mask"][row].sum())
        logs = [float(given["logprobs"][row, t] - given["old_logprobs"][row, t]) for t in range(length)]
        losses: list[float] = []
        for t in range(length):
            log = {"token": logs[t], "sequence": sum(logs) / length, "response": sum(logs)}[ratio]
            r, advantage = math.exp(log), float(given["advantages"][row, t])
            gain = min(r * advantage, min(max(r, 1 - clip[0]), 1 + clip[1]) * advantage)
            losses.append(-max(gain, dual * advantage) if dual is not None and advantage < 0 else -gain)
        responses.append(losses)
    if average == "token":
        return sum(map(sum, responses)) / sum(map(len, responses))
    if average == "constant":
        return sum(map(sum, responses)) / (len(responses) * LONGEST)
    return sum(sum(losses) / len(losses) for losses in responses) / len(responses)


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
@pytest.mark.parametrize("ratio", ["token", "sequence", "response"])
@pytest.mark.parametrize("dual", [None, 1.2])
def test_losses_are_those_of_the_papers_however_they_are_split(ratio: Any, average: Any, dual: float | None) -> None:
    """Each ratio with each average and both clips; micro batches add up, and padding never matters."""
    given = batch()
    settings: dict[str, Any] = {
        "clip": 0.2,
        "clip_high": 0.28,
        "dual_clip": dual,
        "ratio_of": ratio,
        "average": Averaging(average, responses=6, longest=LONGEST),
        "num_tokens": int(given["mask"].sum()),
    }
    whole, _ = clipped_policy_loss(**given, **settings)
    parts = [
        clipped_policy_loss(**{name: value[rows] for name, value in given.items()}, **settings)[0]
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    slow = slow_loss(given, ratio, average, (0.2, 0.28), dual)
    torch.testing.assert_close(whole.item(), slow)
    torch.testing.assert_close(sum(part.item() for part in parts), slow)


def test_dual_clip_bounds_the_loss_of_a_bad_token() -> None:
    """However likely a bad token has become, its surrogate is c times its advantage, and it has no gradient."""
    logprobs = torch.tensor([[0.0, 5.0]], requires_grad=True)
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    bad = torch.tensor([[1.0, -1.0]])
    loss, _ = clipped_policy_loss(logprobs, zeros, zeros, zeros, bad, mask, clip=0.2, dual_clip=3.0, num_tokens=1)
    loss.backward()
    assert loss.item() == pytest.approx(2.0)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-1.0, 0.0]]
