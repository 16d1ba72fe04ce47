"""Losses over lists against slow sums in plain Python, and what must not change them."""

import math
from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.models import reward_losses
from rlhf.models.reward_losses import ListBatch, collate

numbers = st.floats(-3, 3).map(lambda value: round(value, 2))
lists = st.lists(
    st.lists(st.tuples(numbers, st.integers(-2, 2).map(float)), min_size=2, max_size=5), min_size=1, max_size=4
)
"""Of lists: (score, strength) of each response; strengths are often equal."""
Lists = list[list[tuple[float, float]]]


def padded(values: Lists, rubbish: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, strengths and presence, in float64; ``rubbish`` stands where there is no response."""
    most = max(map(len, values))
    table = torch.full((2, len(values), most), rubbish, dtype=torch.float64)
    for row, one in enumerate(values):
        table[:, row, : len(one)] = torch.tensor(one, dtype=torch.float64).T
    present = torch.arange(most)[None] < torch.tensor([len(one) for one in values])[:, None]
    return table[0], table[1], present


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def slow_pairwise(one: list[tuple[float, float]], margin: float, smoothing: float) -> float:
    losses: list[float] = []
    for (r, s), (q, t) in permutations(one, 2):
        if s > t:
            x = r - q - margin * (s - t)
            losses.append(-(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x))
    return mean(losses)


def slow_listwise(one: list[tuple[float, float]]) -> float:
    if len({s for _, s in one}) == 1:
        return 0.0
    total = 0.0
    for r, s in one:
        total -= r - math.log(sum(math.exp(q) for q, t in one if t <= s))
    return total / (len(one) - 1)


@given(lists, st.floats(0, 2), st.floats(0, 0.4))
def test_the_pairwise_loss_is_the_mean_over_pairs_with_an_order(values: Lists, margin: float, smoothing: float) -> None:
    """Each list by itself, whatever it is padded to."""
    found = reward_losses.pairwise(*padded(values, rubbish=9.0), margin, smoothing)
    assert found.tolist() == pytest.approx([slow_pairwise(one, margin, smoothing) for one in values], abs=1e-9)


@given(lists)
def test_the_listwise_loss_is_plackett_luces(values: Lists) -> None:
    """One choice after the other, equals as if each came before the others."""
    found = reward_losses.listwise(*padded(values, rubbish=9.0))
    assert found.tolist() == pytest.approx([slow_listwise(one) for one in values], abs=1e-9)


@given(st.lists(numbers, min_size=2, max_size=5, unique=True))
def test_the_listwise_probabilities_of_all_orders_add_up_to_one(scores: list[float]) -> None:
    """The loss is a likelihood."""
    orders = [
        [(score, float(place)) for score, place in zip(scores, order, strict=True)]
        for order in permutations(range(len(scores)))
    ]
    losses = reward_losses.listwise(*padded(orders)) * (len(scores) - 1)
    assert torch.exp(-losses).sum().item() == pytest.approx(1)


@given(lists, st.floats(0, 0.4), st.integers(0, 2**32))
def test_the_soft_loss_is_the_mean_cross_entropy_over_pairs_of_which_something_is_known(
    values: Lists, smoothing: float, seed: int
) -> None:
    """Each pair once, with the smoothed probability; pairs of which nothing is known count for nothing."""
    scores, _, _ = padded(values, rubbish=9.0)
    generator = torch.Generator().manual_seed(seed)
    preferences = torch.rand((*scores.shape, scores.shape[1]), generator=generator, dtype=torch.float64)
    known = torch.rand(preferences.shape, generator=generator) < 0.7
    wanted: list[float] = []
    for row, one in enumerate(values):
        losses: list[float] = []
        for i, j in combinations(range(scores.shape[1]), 2):
            if j < len(one) and known[row, i, j]:
                p = (1 - smoothing) * preferences[row, i, j].item() + smoothing * (1 - preferences[row, i, j].item())
                gap = one[i][0] - one[j][0]
                losses.append(-p * log_sigmoid(gap) - (1 - p) * log_sigmoid(-gap))
            else:
                preferences[row, i, j] = torch.nan
            preferences[row, j, i] = 1 - preferences[row, i, j]
        wanted.append(mean(losses))
    assert reward_losses.soft(scores, preferences, smoothing).tolist() == pytest.approx(wanted, abs=1e-9)


@given(lists)
def test_accuracy_is_the_share_of_pairs_with_an_order_that_scores_have(values: Lists) -> None:
    """Pair by pair; a list without such a pair has none."""
    scores, strengths, present = padded(values, rubbish=9.0)
    wanted = [mean([float(r > q) for (r, s), (q, t) in permutations(one, 2) if s > t]) for one in values]
    assert reward_losses.accuracy(scores, strengths, present).tolist() == pytest.approx(wanted)


def test_margin_and_smoothing_are_none_unless_they_are_asked_for() -> None:
    """And a list of one response has no order to learn, nor a mean over no pairs."""
    scores, strengths, present = padded([[(1.0, 2.0), (0.5, 0.0)], [(3.0, 1.0)]])
    preferences = torch.full((2, 2, 2), torch.nan, dtype=torch.float64)
    preferences[0, 1, 0] = 0.0
    expected = pytest.approx([-log_sigmoid(0.5), 0.0])
    assert reward_losses.pairwise(scores, strengths, present).tolist() == expected
    assert reward_losses.soft(scores, preferences).tolist() == expected
    assert reward_losses.listwise(scores, strengths, present).tolist() == expected
    assert reward_losses.centring(scores, present).tolist() == [1.5**2, 0.0]
    assert reward_losses.accuracy(scores, strengths, present).tolist() == [1.0, 0.0]


@given(lists)
def test_losses_of_two_responses_are_all_the_same(values: Lists) -> None:
    """Plackett-Luce of two is Bradley-Terry, and so is certainty as a soft label."""
    pairs = [one[:2] for one in values]
    scores, strengths, present = padded(pairs)
    hard = reward_losses.pairwise(scores, strengths, present)
    torch.testing.assert_close(reward_losses.listwise(scores, strengths, present), hard)
    gap = strengths[:, :, None] - strengths[:, None, :]
    certain = torch.where(gap == 0, torch.nan, (gap > 0).double())
    torch.testing.assert_close(reward_losses.soft(scores, certain), hard)


@given(lists, st.floats(-50, 50).map(lambda value: round(value)))
def test_adding_a_constant_to_every_strength_changes_no_loss(values: Lists, shift: float) -> None:
    """The regression's targets are without their mean, which takes the constant along."""
    scores, strengths, present = padded(values)
    for loss in (reward_losses.pairwise, reward_losses.listwise):
        torch.testing.assert_close(loss(scores, strengths + shift, present), loss(scores, strengths, present))

    def centred(targets: Tensor) -> Tensor:
        return targets - targets[present].mean()

    torch.testing.assert_close(
        reward_losses.regression(scores, centred(strengths + shift), present),
        reward_losses.regression(scores, centred(strengths), present),
    )


@given(lists)
def test_adding_a_constant_to_every_score_changes_only_regression_and_centring(values: Lists) -> None:
    """Comparisons see differences."""
    scores, strengths, present = padded(values)
    for loss in (reward_losses.pairwise, reward_losses.listwise):
        torch.testing.assert_close(loss(scores + 5, strengths, present), loss(scores, strengths, present))


@given(lists)
def test_centring_and_regression_are_means_within_a_list(values: Lists) -> None:
    """Over pairs, and over responses."""
    scores, strengths, present = padded(values, rubbish=9.0)
    wanted = [mean([(r + q) ** 2 for (r, _), (q, _) in combinations(one, 2)]) for one in values]
    assert reward_losses.centring(scores, present).tolist() == pytest.approx(wanted)
    wanted = [mean([(r - s) ** 2 for r, s in one]) for one in values]
    assert reward_losses.regression(scores, strengths, present).tolist() == pytest.approx(wanted)


@given(lists)
@settings(max_examples=30)
def test_what_is_padded_has_no_gradient(values: Lists) -> None:
    """Nor does it make that of the others infinite, or no number."""
    scores, strengths, present = padded(values, rubbish=300.0)
    preferences = torch.full((*scores.shape, scores.shape[1]), torch.nan, dtype=torch.float64)
    preferences[:, 1, 0] = 0.7
    for loss in (
        lambda leaf: reward_losses.pairwise(leaf, strengths, present, 1.0, 0.1),
        lambda leaf: reward_losses.listwise(leaf, strengths, present),
        lambda leaf: reward_losses.regression(leaf, strengths, present),
        lambda leaf: reward_losses.centring(leaf, present),
        lambda leaf: reward_losses.soft(leaf, preferences, 0.1),
    ):
        leaf = scores.clone().requires_grad_()
        loss(leaf).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert not leaf.grad[~present].any()


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.8])
def test_the_soft_loss_is_least_where_the_scores_have_the_probability(probability: float) -> None:
    """Unlike the hard loss, which never ends pulling apart; smoothing keeps that from it too."""
    preferences = torch.tensor([[[torch.nan, 1 - probability], [probability, torch.nan]]], dtype=torch.float64)
    best = math.log(probability / (1 - probability))
    leaf = torch.tensor([[0.0, best]], dtype=torch.float64, requires_grad=True)
    reward_losses.soft(leaf, preferences).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().max().item() == pytest.approx(0, abs=1e-12)
    smooth = math.log((1 - 0.2) / 0.2)
    leaf = torch.tensor([[0.0, smooth]], dtype=torch.float64, requires_grad=True)
    strengths, present = torch.tensor([[0.0, 1.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    reward_losses.pairwise(leaf, strengths, present, smoothing=0.2).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().max().item() == pytest.approx(0, abs=1e-12)


def test_lists_of_several_lengths_make_one_batch() -> None:
    """Responses stand in the order of the lists, and a number a response finds its place again."""
    rows = [
        {"ids": [[1, 2], [3]], "strengths": [1.0, -1.0], "preferences": [[math.nan, 0.9], [0.1, math.nan]]},
        {"ids": [[4], [5, 6, 7], [8]], "strengths": [0.5, 0.0, 2.0], "preferences": [[math.nan] * 3] * 3},
    ]
    batch = ListBatch(**collate(rows, padding=0))
    assert batch.input_ids.tolist() == [[1, 2, 0], [3, 0, 0], [4, 0, 0], [5, 6, 7], [8, 0, 0]]
    assert batch.attention_mask.sum(dim=1).tolist() == [2, 1, 1, 3, 1]
    assert batch.arranged(torch.arange(1.0, 6.0)).tolist() == [[1, 2, 0], [3, 4, 5]]
    assert batch.strengths.tolist() == [[1, -1, 0], [0.5, 0, 2]]
    assert batch.preferences[0, 0, 1].item() == pytest.approx(0.9)
    assert batch.preferences[0, :, 2].isnan().all()
    without = [{name: row[name] for name in ("ids", "strengths")} for row in rows]
    assert collate(without, padding=0)["preferences"].isnan().all()


def test_lists_of_two_are_what_trl_computes() -> None:
    """Its loss with margin and centring, computed by its own code on the same scores."""
    from collections import defaultdict
    from types import SimpleNamespace
    from typing import Any

    from trl.trainer.reward_trainer import RewardTrainer

    generator = torch.Generator().manual_seed(0)
    chosen, rejected, margin = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    margin = margin.abs()

    def scored(**_: Any) -> Any:
        return SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])

    model: Any = scored

    class Same:
        """One process."""

        def gather(self, value: Any) -> Any:
            return value

        gather_for_metrics = gather

    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=0.01),
        accelerator=Same(),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(12, 3), "margin": margin}
    theirs = RewardTrainer.compute_loss(trainer, model, inputs)

    scores, strengths = torch.stack([chosen, rejected], dim=1), torch.stack([margin, torch.zeros_like(margin)], dim=1)
    present = torch.ones_like(scores, dtype=torch.bool)
    ours = reward_losses.pairwise(scores, strengths, present, margin=1.0)
    ours = (ours + 0.01 * reward_losses.centring(scores, present)).mean()
    torch.testing.assert_close(ours, theirs)
    share = reward_losses.accuracy(scores, strengths, present).mean().item()
    assert share == pytest.approx(trainer._metrics["train"]["accuracy"][0])
