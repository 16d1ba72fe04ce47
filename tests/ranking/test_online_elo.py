import numpy as np
import pytest

from rlhf.randomness import stream
from rlhf.ranking.bradley_terry import ELO_SCALE, fit
from rlhf.ranking.comparisons import Comparisons, compare
from rlhf.ranking.strengths import fit_online
from tests.ranking.drawn import drawn, random_pairs


def test_one_order_is_elos_rule_game_by_game() -> None:
    """Of one comparison there is one order: the winner gains K / 2."""
    found = fit_online(2, compare(2, winners=[[0, 1, 1]]), k_factor=32.0, orders=2, seed=0)
    np.testing.assert_allclose(found.elo, [16, -16])
    found = fit_online(2, compare(2, winners=[[0, 1, 1], [0, 1, 1]]), k_factor=32.0, orders=2, seed=0)
    second = 32 * (1 - 1 / (1 + np.exp(-ELO_SCALE * 32)))
    np.testing.assert_allclose(found.elo, [16 + second, -16 - second])


def test_a_tie_of_equals_moves_nothing_and_the_sum_stays_zero() -> None:
    """What one gains the other loses."""
    np.testing.assert_allclose(fit_online(2, compare(2, winners=[[0, 1, 0.5]]), 32.0, 2, 0).elo, 0)
    rng = np.random.default_rng(0)
    said = drawn(rng, rng.normal(0, 200, 6), *random_pairs(rng, 6, 200))
    assert fit_online(6, said, 16.0, 5, 0).elo.sum() == pytest.approx(0, abs=1e-9)


def test_long_streams_come_near_the_maximum_likelihood_with_errors_that_say_how_near() -> None:
    """Of many comparisons of few, with a small K; the order of the rows given changes nothing but the draw."""
    rng = np.random.default_rng(0)
    truth = np.array([150.0, 50.0, -50.0, -150.0])
    said = drawn(rng, truth, *random_pairs(rng, 4, 4000))
    found = fit_online(4, said, k_factor=4.0, orders=20, seed=0)
    best = fit(4, said, 1000.0).elo
    assert np.abs(found.elo - best).max() < 15
    assert (np.abs(found.elo - truth) < 4 * found.standard_errors).all()


def test_the_seed_decides_the_orders() -> None:
    """The same seed gives the same ratings."""
    rng = np.random.default_rng(0)
    said = drawn(rng, rng.normal(0, 200, 6), *random_pairs(rng, 6, 50))
    one, same, other = (fit_online(6, said, 32.0, 3, seed).elo for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0


def test_errors_are_those_of_the_bootstrap_game_by_game() -> None:
    """Streams drawn with replacement, slowly; a stream that were only shuffled would hardly move with so small a K."""
    rng = np.random.default_rng(0)
    games = [(0, 1, 1.0)] * 12 + [(0, 1, 0.0)] * 8 + [(1, 2, 1.0)] * 10 + [(1, 2, 0.5)] * 10
    streams = np.zeros((500, 3))
    for rating in streams:
        for game in rng.integers(len(games), size=len(games)):
            i, j, outcome = games[game]
            moved = 8.0 * (outcome - 1 / (1 + 10 ** ((rating[j] - rating[i]) / 400)))
            rating[i] += moved
            rating[j] -= moved
    found = fit_online(3, compare(3, winners=[list(game) for game in games]), k_factor=8.0, orders=500, seed=0)
    np.testing.assert_allclose(found.standard_errors, streams.std(axis=0, ddof=1), rtol=0.2)


def test_comparisons_that_were_counted_together_have_their_mean_outcome() -> None:
    """Three wins and a tie of one row are four of 7/8, and bridges that are less than a comparison count as one."""
    for counts, times, outcome in (
        ((3.0, 0.0, 1.0), 4, 7 / 8),
        ((0.3, 0.1, 0.0), 1, 3 / 4),
        ((0.0, 1.0, 1.4), 2, 0.7 / 2.4),
    ):
        wins, losses, ties = np.array(counts)[:, None]
        said = Comparisons(np.array([0]), np.array([1]), wins, losses, ties, np.array([0]))
        rating = 0.0
        for _ in range(times):
            rating += 32 * (outcome - 1 / (1 + 10 ** (-2 * rating / 400)))
        found = fit_online(2, said, k_factor=32.0, orders=2, seed=0)
        np.testing.assert_allclose(found.elo, [rating, -rating])
        np.testing.assert_allclose(found.standard_errors, 0, atol=1e-9)


def test_ratings_are_the_mean_over_orders_and_errors_the_deviation_over_draws() -> None:
    """Game by game in plain Python, through the orders and draws that the seed makes."""
    rng = np.random.default_rng(0)
    said = drawn(rng, rng.normal(0, 200, 4), *random_pairs(rng, 4, 12), "davidson", 1.5)
    games = list(zip(said.first, said.second, said.wins + 0.5 * said.ties, strict=True))
    orders = 5

    def ratings(order: list[int]) -> list[float]:
        now = [0.0] * 4
        for game in order:
            i, j, outcome = games[game]
            moved = 20 * (outcome - 1 / (1 + 10 ** ((now[j] - now[i]) / 400)))
            now[i], now[j] = now[i] + moved, now[j] - moved
        return now

    seeded = stream("online orders", 7)
    permuted = np.array([ratings(seeded.permutation(12).tolist()) for _ in range(orders)])
    resampled = np.array([ratings(row) for row in seeded.integers(12, size=(orders, 12)).tolist()])
    found = fit_online(4, said, k_factor=20.0, orders=orders, seed=7)
    np.testing.assert_allclose(found.elo, permuted.sum(axis=0) / orders, atol=1e-9)
    squares = ((resampled - resampled.mean(axis=0)) ** 2).sum(axis=0)
    np.testing.assert_allclose(found.standard_errors, np.sqrt(squares / (orders - 1)))
