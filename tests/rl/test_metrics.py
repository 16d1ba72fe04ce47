import math
import statistics

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlhf.rl.losses import Penalties, ValueSums, clipped_policy_loss, clipped_value_loss, demonstration_loss
from rlhf.rl.metrics import mismatch_metrics, rollout_metrics, update_metrics
from tests.rl.batches import JUNK, Batch, batches


@settings(max_examples=30)
@given(batch=batches(min_length=1), junk=st.sampled_from(JUNK), coef=st.floats(0.01, 2))
def test_what_is_said_of_rollouts_is_what_its_definition_says(batch: Batch, junk: float, coef: float) -> None:
    """Response by response in plain Python; docs/ppo.md defines each metric."""
    assume(len(batch.lengths) > 1)
    logprobs, reference, entropies = (batch.tensor(junk=junk) for _ in range(3))
    scores = torch.randn(len(batch.lengths), generator=batch.generator, dtype=torch.float64)
    ended = torch.arange(len(batch.lengths)) % 2 == 0
    found = rollout_metrics(scores, ended, logprobs, reference, entropies, batch.mask, coef, "k2")
    kls, penalties, informations, spreads = [], [], [], []
    for row, length in enumerate(batch.lengths):
        gaps = [(logprobs[row, t] - reference[row, t]).item() for t in range(length)]
        kls.append(sum(gaps))
        penalties.append(-coef * sum(gap**2 for gap in gaps) / 2)
        informations.append(-logprobs[row, :length].sum().item())
        spreads += entropies[row, :length].tolist()
    count = len(batch.lengths)
    expected = {
        "objective/kl": statistics.mean(kls),
        "objective/kl_stderr": statistics.stdev(kls) / math.sqrt(count),
        "objective/entropy": statistics.mean(informations),
        "objective/non_score_reward": statistics.mean(penalties),
        "objective/rlhf_reward": scores.mean().item() + statistics.mean(penalties),
        "objective/scores": scores.mean().item(),
        "policy/entropy_avg": statistics.mean(spreads),
        "val/num_eos_tokens": (count + 1) // 2,
        "length/mean": statistics.mean(batch.lengths),
        "length/max": max(batch.lengths),
    }
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)


@settings(max_examples=30)
@given(batch=batches(min_length=1), junk=st.sampled_from(JUNK))
def test_the_samplers_distance_is_a_sum_over_tokens_and_a_mean_over_responses(batch: Batch, junk: float) -> None:
    """Response by response in plain Python; the largest gap is that of a single token, of either sign."""
    sampled, trained = batch.tensor(junk=junk), batch.tensor(junk=junk)
    gaps = [(sampled[row, :length] - trained[row, :length]).tolist() for row, length in enumerate(batch.lengths)]
    assert mismatch_metrics(sampled, trained, batch.mask) == pytest.approx(
        {
            "rollout/kl_to_trained": statistics.mean(sum(row) for row in gaps),
            "rollout/largest_gap": max((abs(gap) for row in gaps for gap in row), default=0.0),
        }
    )


@settings(max_examples=30)
@given(first=batches(min_length=1), second=batches(min_length=1))
def test_what_is_said_of_updates_is_of_all_their_tokens(first: Batch, second: Batch) -> None:
    """Means over the tokens of two minibatches, not over the minibatches; the first KL is the first one's alone."""
    policy_sums, value_sums = [], []
    gaps: list[list[float]] = []
    ratio_losses, clipped, kls, entropies_seen, value_losses, values_clipped = [], 0, [], [], [], 0
    penalties = Penalties(0.3, "k2", kl_importance_weights=False, entropy_bonus=0.2)
    for batch in (first, second):
        now, move, reference, advantages, entropies = (batch.tensor(0.3) for _ in range(5))
        values, old_values, returns = (batch.tensor() for _ in range(3))
        tokens = int(batch.mask.sum())
        _, sums = clipped_policy_loss(
            now, entropies, now - move, reference, advantages, batch.mask, clip=0.2, num_tokens=7, penalties=penalties
        )
        policy_sums.append(sums + demonstration_loss(now, batch.mask, coef=0.5, num_tokens=tokens)[1])
        value_sums.append(clipped_value_loss(values, old_values, returns, batch.mask, clip=0.2, num_tokens=7)[1])
        gaps.append(move[batch.mask].tolist())
        for gap, advantage in zip(gaps[-1], advantages[batch.mask].tolist(), strict=True):
            ratio = math.exp(gap)
            limited = min(max(ratio, 0.8), 1.2)
            ratio_losses.append(-min(ratio * advantage, limited * advantage))
            clipped += limited * advantage < ratio * advantage
        kls += (0.3 * (now - reference)[batch.mask].square() / 2).tolist()
        entropies_seen += (-0.2 * entropies[batch.mask]).tolist()
        for value, old, target in zip(*(x[batch.mask].tolist() for x in (values, old_values, returns)), strict=True):
            plain, held = (value - target) ** 2 / 2, (min(max(value, old - 0.2), old + 0.2) - target) ** 2 / 2
            value_losses.append(max(plain, held))
            values_clipped += held > plain
    found = update_metrics(policy_sums, value_sums)
    all_gaps = [gap for part in gaps for gap in part]
    ratios = [math.exp(gap) for gap in all_gaps]
    expected = {
        "loss/value_avg": statistics.mean(value_losses),
        "val/clipfrac_avg": values_clipped / len(value_losses),
        "loss/policy_avg": statistics.mean(ratio_losses),
        "policy/approxkl_avg": statistics.mean(gap**2 for gap in all_gaps) / 2,
        "policy/clipfrac_avg": clipped / len(all_gaps),
        "val/ratio": statistics.mean(ratios),
        "val/ratio_var": statistics.pvariance(ratios),
        "policy/approxkl_first": statistics.mean(gap**2 for gap in gaps[0]) / 2,
        "policy/updates": 2,
        "loss/kl_avg": statistics.mean(kls),
        "loss/entropy_avg": statistics.mean(entropies_seen),
    }
    # Each update's demonstrations have a mean of their own, and these are averaged.
    found.pop("loss/ptx_avg")
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)


def no_value_loss() -> ValueSums:
    zeros = torch.zeros(1, 2)
    return clipped_value_loss(zeros, zeros, zeros, torch.tensor([[True, True]]), clip=0.2, num_tokens=2)[1]


def test_demonstrations_are_averaged_over_updates() -> None:
    """Each update's mean counts alike."""
    sums = []
    for likelihood in (-1.0, -4.0):
        logprobs = torch.full((1, 2), likelihood, dtype=torch.float64)
        mask = torch.tensor([[True, True]])
        _, rollout = clipped_policy_loss(logprobs, logprobs, logprobs, logprobs, logprobs, mask, clip=0.2, num_tokens=2)
        sums.append(rollout + demonstration_loss(logprobs, mask, coef=0.5, num_tokens=2)[1])
    assert update_metrics(sums, [no_value_loss()])["loss/ptx_avg"] == pytest.approx(2.5)


def test_while_the_value_model_warms_up_the_policy_has_no_metrics() -> None:
    """But for the number of its updates."""
    assert update_metrics([], [no_value_loss()]) == {
        "loss/value_avg": 0.0,
        "val/clipfrac_avg": 0.0,
        "policy/updates": 0.0,
    }
