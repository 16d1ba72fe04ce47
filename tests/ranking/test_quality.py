from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rlhf.ranking.quality import quality

Set = dict[str, Any]


def rated(n_sets: int, seed: int, noise: float = 1.0, annotators: int = 6) -> tuple[list[Set], Any]:
    """Sets of four responses of known quality, seen by annotators with noise; sets, and the true qualities."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 1, (n_sets, 4))
    ratings = truth[:, :, None] + rng.normal(0, noise, (n_sets, 4, annotators))
    sets = [
        {"prompt": "p", "responses": list("abcd"), "ratings": one.tolist(), "strengths": [0.0] * 4, "pool": number}
        for number, one in enumerate(ratings)
    ]
    return sets, truth.ravel()


def test_good_scores_are_told_from_noise_with_intervals() -> None:
    """The interval holds the value, is narrow for many sets, and a coin's holds a half."""
    sets, truth = rated(80, seed=0)
    good = quality(sets, truth, np.arange(len(truth)), 10_000, seed=0)
    assert good["accuracy"]["low"] < good["accuracy"]["share"] < good["accuracy"]["high"]
    assert good["accuracy"]["low"] > 0.75
    assert good["accuracy"]["pairs"] == 80 * 6
    coin = quality(sets, np.random.default_rng(1).normal(size=len(truth)), np.ones(len(truth)), 10_000, seed=0)
    assert coin["accuracy"]["low"] < 0.5 < coin["accuracy"]["high"]
    assert good["kendall_tau"]["low"] > coin["kendall_tau"]["high"]
    shares = [row["share"] for row in good["accuracy_by_gap"]]
    assert len(shares) == 4
    assert shares[-1] > shares[0]
    assert sum(row["pairs"] for row in good["accuracy_by_gap"]) == 80 * 6


def test_intervals_of_accuracy_hold_the_truth_about_as_often_as_they_say() -> None:
    """Pairs that share a set are not independent: with pairs drawn instead of sets, intervals would be far too narrow.

    Of 300 draws they held it in 92 %; of 60, anything above 82 % is within chance of that.
    """
    population, scores = [], []
    rng = np.random.default_rng(5)
    for seed in range(60):
        sets, truth = rated(40, seed)
        # Some sets are scored well and others hardly: their pairs stand and fall together.
        blur = np.repeat(rng.choice([0.1, 4.0], 40), 4)
        population.append(sets)
        scores.append(truth + blur * rng.normal(size=len(truth)))
    found = [
        quality(sets, score, np.ones(len(score)), 10_000, seed=0)["accuracy"]
        for sets, score in zip(population, scores, strict=True)
    ]
    mean = float(np.mean([one["share"] for one in found]))
    assert 0.82 <= np.mean([one["low"] <= mean <= one["high"] for one in found]) <= 1.0


def test_annotators_are_measured_as_the_scores_are() -> None:
    """Against the mean of the others, on the same pairs; the slow way, set by set and annotator by annotator."""
    sets, truth = rated(6, seed=2, annotators=3)
    theirs: list[float] = []
    ours: list[float] = []
    for number, one in enumerate(sets):
        table, scores = np.array(one["ratings"]), truth[4 * number : 4 * number + 4]
        for annotator in range(3):
            mean = np.delete(table, annotator, axis=1).mean(axis=1)
            for i, j in combinations(range(4), 2):
                right = mean[i] > mean[j]
                theirs.append(float((table[i, annotator] > table[j, annotator]) == right))
                ours.append(float((scores[i] > scores[j]) == right))
    found = quality(sets, truth, np.ones(24), 10_000, seed=0)["annotators"]
    assert found == {
        "share": pytest.approx(np.mean(theirs)),
        "scores": pytest.approx(np.mean(ours)),
        "pairs": 6 * 3 * 6,
    }


def test_calibration_error_is_small_for_the_model_and_large_for_the_sure() -> None:
    """Winners drawn with the scores' own probabilities; scores ten times as large claim too much."""
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 1, 400)
    sets: list[Set] = []
    for number in range(200):
        gap = scores[2 * number] - scores[2 * number + 1]
        chance = 1 / (1 + np.exp(-gap))
        winners = [[0, 1, int(rng.random() < chance)] for _ in range(20)]
        sets.append(
            {"prompt": "p", "responses": ["a", "b"], "winners": winners, "strengths": [1.0, 0.0], "pool": number}
        )
    right = quality(sets, scores, np.ones(400), 1000, seed=0)["calibration"]
    sure = quality(sets, 10 * scores, np.ones(400), 1000, seed=0)["calibration"]
    assert right["expected_error"] < 0.03
    assert sure["expected_error"] > 0.15
    assert sum(row["comparisons"] for row in right["bins"]) == 4000
    assert all(0.5 <= row["predicted"] <= 1 for row in right["bins"])


def test_length_is_held_against_scores_only_beside_people() -> None:
    """Rank correlations of both with the number of tokens."""
    sets, truth = rated(20, seed=0)
    lengths = np.argsort(np.argsort(truth))
    found = quality(sets, truth, lengths, 1000, seed=0)["length_correlation"]
    people = np.array([np.mean(row) for one in sets for row in one["ratings"]])
    assert found["scores"] == pytest.approx(1)
    rho: Any = stats.spearmanr(people, lengths)
    assert found["people"] == pytest.approx(float(rho.statistic))
    assert quality(sets, truth, np.ones(80), 1000, seed=0)["length_correlation"]["scores"] is None


def test_what_the_data_does_not_tell_is_absent() -> None:
    """Rankings alone: nobody's ratings, so no annotators' accuracy; one set has no interval of its mean."""
    sets = [
        {"prompt": "p", "responses": ["a", "b", "c"], "rankings": [[0, 1, 2]], "strengths": [1.0, 0.0, -1.0], "pool": 0}
    ]
    found = quality(sets, [3.0, 2.0, 1.0], [1, 2, 3], 100, seed=0)
    assert found["accuracy"]["share"] == 1
    assert "annotators" not in found
    assert "kendall_tau" not in found
