import math
from itertools import combinations, pairwise, product
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


@pytest.mark.parametrize("together", [False, True])
def test_intervals_of_accuracy_hold_the_truth_about_as_often_as_they_say(*, together: bool) -> None:
    """Pairs that share a set are not independent, nor are sets of one block of raters, whose scores stand and fall
    together: of 50 times 20 sets, or 10 blocks of two, anything from 86 % is within chance of 95.
    """
    rng = np.random.default_rng(5)
    found: list[Any] = []
    for seed in range(50):
        sets, truth = rated(20, seed, annotators=1)
        sets = [one | {"pool": number // 4} for number, one in enumerate(sets)]
        if together:
            sets = [one | {"annotators": [f"block {number // 2}"]} for number, one in enumerate(sets)]
        blur = np.repeat(rng.choice([0.1, 4.0], 10 if together else 20), 8 if together else 4)
        scores = truth + blur * rng.normal(size=len(truth))
        found.append(quality(sets, scores, np.ones(len(scores)), 400, seed=seed)["accuracy"])
    mean = float(np.mean([one["share"] for one in found]))
    assert np.mean([one["low"] <= mean <= one["high"] for one in found]) >= 0.86
    stated = np.mean([one["high"] - one["low"] for one in found]) / 2
    actual = float(np.std([one["share"] for one in found])) * float(stats.t.ppf(0.975, 9 if together else 19))
    assert stated == pytest.approx(actual, rel=0.25)
    assert {one["draws"] for one in found} == {10 if together else 20}


def test_too_few_blocks_of_raters_leave_each_set_a_draw() -> None:
    """Nine groups of raters are below the least, ten are not; all pairs of one draw have no interval."""
    sets, truth = rated(20, seed=0)
    for groups, draws in ((9, 20), (10, 10), (1, 20)):
        named = [one | {"annotators": [f"{number % groups}, {n}" for n in range(6)]} for number, one in enumerate(sets)]
        assert quality(named, truth, np.ones(80), 1000, seed=0)["accuracy"]["draws"] == draws
    assert "low" not in quality(sets[:1], truth[:4], np.ones(4), 1000, seed=0)["accuracy"]


def slow_beside_people(sets: list[Set], scores: Any, *, within: bool, ties_half: bool) -> tuple[float, float]:
    """Pair by pair and rater by rater, as the definition reads: the human figure and that of the scores."""
    items = [(number, one, index) for number, one in enumerate(sets) for index in range(len(one["responses"]))]
    human = ours = weight = 0.0
    for (a, (first, one, i)), (b, (second, other, j)) in combinations(enumerate(items), 2):
        if one["pool"] != other["pool"] or (within and first != second):
            continue
        row, column = one["ratings"][i], other["ratings"][j]
        rated_row, rated_column = ([k for k, value in enumerate(x) if value is not None] for x in (row, column))
        if len(rated_row) < 2 or len(rated_column) < 2:
            continue
        same = [(k, k) for k in rated_row if first == second and k in rated_column]
        asked = same or list(product(rated_row, rated_column))
        for k, m in asked:
            gap = np.mean([row[o] for o in rated_row if o != k]) - np.mean([column[o] for o in rated_column if o != m])
            own = 0.0 if one["responses"][i] == other["responses"][j] else row[k] - column[m]
            if gap != 0 and (ties_half or own != 0):
                weight += 1 / len(asked)
                human += (0.5 + 0.5 * float(np.sign(own * gap))) / len(asked)
                ours += (0.5 + 0.5 * float(np.sign((scores[a] - scores[b]) * gap))) / len(asked)
    return human / weight, ours / weight


@pytest.mark.parametrize("ties", ["ties_half", "ties_left_out"])
@pytest.mark.parametrize("pairs", ["all", "within"])
def test_people_and_scores_answer_the_same_questions(pairs: str, ties: str) -> None:
    """The slow count, with ties of raters and of scores, sets that share a pool, and a text that stands twice."""
    rng = np.random.default_rng(3)
    sets: list[Set] = [
        {
            "responses": [f"{number}{letter}" for letter in "abcd"],
            "ratings": rng.integers(-2, 3, (4, 3)).astype(float).tolist(),
            "pool": number // 3,
        }
        for number in range(6)
    ]
    sets[1]["responses"][2] = sets[1]["responses"][0]
    scores = rng.integers(0, 5, 24).astype(float)
    scores[6] = scores[4]
    found = quality(sets, scores, np.ones(24), 10_000, seed=0)["beside_people"][pairs][ties]
    human, ours = slow_beside_people(sets, scores, within=pairs == "within", ties_half=ties == "ties_half")
    assert (found["human"], found["scores"]) == (pytest.approx(human), pytest.approx(ours))


@pytest.mark.parametrize("pairs", ["all", "within"])
def test_who_did_not_rate_a_response_is_not_asked_of_it(pairs: str) -> None:
    """The same slow count where ratings are missing: of two raters' responses on, and of the two by the same person."""
    rng = np.random.default_rng(8)
    sets: list[Set] = []
    for number in range(6):
        ratings: Any = rng.integers(-2, 3, (4, 4)).astype(float).tolist()
        for row, column in rng.integers(0, 4, (7, 2)):
            ratings[row][column] = None
        responses = [f"{number}{letter}" for letter in "abcd"]
        sets.append({"responses": responses, "ratings": ratings, "pool": number // 3, "strengths": [0.0] * 4})
    raters = [sum(value is not None for value in row) for one in sets for row in one["ratings"]]
    assert {1, 2, 3} <= set(raters), "the case has every kind"
    scores = rng.integers(0, 9, 24).astype(float)
    found = quality(sets, scores, np.ones(24), 10_000, seed=0)["beside_people"][pairs]["ties_half"]
    human, ours = slow_beside_people(sets, scores, within=pairs == "within", ties_half=True)
    assert (found["human"], found["scores"]) == (pytest.approx(human), pytest.approx(ours))


def test_a_person_named_in_two_sets_is_asked_as_that_person_across_them() -> None:
    """Ann orders all as the others' means do, and some of the others would not, if they were asked."""
    sets: list[Set] = [
        {"responses": ["a", "b"], "ratings": [[9, 1, 1, 2], [9, 1, 1, 2]], "annotators": ["ann", "p", "q", "r"]},
        {"responses": ["c", "d"], "ratings": [[1, 0, 1, 3], [1, 0, 1, 3]], "annotators": ["x", "y", "z", "ann"]},
    ]
    sets = [one | {"pool": 0} for one in sets]
    across = quality(sets, [3.0, 3.0, 0.0, 0.0], np.ones(4), 100, seed=0)["beside_people"]["all"]["ties_half"]
    assert across["human"] == 1
    unnamed = [{name: value for name, value in one.items() if name != "annotators"} for one in sets]
    mixed = quality(unnamed, [3.0, 3.0, 0.0, 0.0], np.ones(4), 100, seed=0)["beside_people"]["all"]["ties_half"]
    assert mixed["human"] < 1


def test_a_tie_of_annotators_is_half_right_and_no_preference() -> None:
    """Each of three gives one pair equal ratings: right two times in three and half the third."""
    one = {"responses": ["a", "b"], "ratings": [[1, 1, 0], [0, 0, 0]], "pool": 0}
    found = quality([one], [1.0, 0.0], [1, 1], 10, seed=0)["beside_people"]["within"]
    assert found["ties_half"] == {"human": pytest.approx(2.5 / 3), "scores": 1, "pairs": 1}
    assert found["ties_left_out"] == {"human": 1, "scores": 1, "pairs": 1}


def test_identical_texts_are_half_right_wherever_scores_are_judged() -> None:
    """A text twice in a set has one quality: neither rounding nor chance among raters makes an order of it."""
    one = {"responses": ["same", "same"], "ratings": [[2, 2, 1], [0, 0, -1]], "pool": 0}
    for scores in ([1e-3, 0.0], [0.0, 1e-3]):
        found = quality([one], scores, [1, 1], 10, seed=0)
        assert found["accuracy"]["share"] == found["accuracy_within"]["share"] == 0.5
        assert found["beside_people"]["within"]["ties_half"] == {"human": 0.5, "scores": 0.5, "pairs": 1}
        assert "ties_left_out" not in found["beside_people"]["within"]
        assert found["calibration"]["expected_error"] == 0


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
    assert found["beside_people"] == {"all": {}, "within": {}}
    assert "kendall_tau" not in found


def test_independent_pairs_have_students_interval_of_their_mean() -> None:
    """Twelve sets of one pair each, of which scores order eight as people do and one not at all."""
    right = np.array([1.0] * 8 + [0.5] + [0.0] * 3)
    sets: list[Set] = [{"responses": ["a", "b"], "strengths": [1.0, 0.0], "pool": number} for number in range(12)]
    scores = np.stack([right, 1 - right], axis=1).ravel()
    found = quality(sets, scores, np.ones(24), 100, seed=0)["accuracy"]
    low, high = stats.t.interval(0.95, 11, loc=right.mean(), scale=stats.sem(right))
    assert found["share"] == pytest.approx(8.5 / 12)
    assert (found["low"], found["high"]) == pytest.approx((low, high))


def test_the_mean_tau_has_students_interval_over_sets() -> None:
    """Set by set; a set without an order of its own has no correlation and does not count."""
    sets, truth = rated(6, seed=0)
    scores = truth + np.random.default_rng(1).normal(size=24)
    scores[:4] = 1.0
    taus = []
    for number, one in enumerate(sets[1:], start=1):
        tau: Any = stats.kendalltau(scores[4 * number : 4 * number + 4], np.mean(one["ratings"], axis=1))
        taus.append(float(tau.statistic))
    found = quality(sets, scores, np.ones(24), 100, seed=0)["kendall_tau"]
    low, high = stats.t.interval(0.95, 4, loc=np.mean(taus), scale=stats.sem(taus))
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((np.mean(taus), low, high))
    assert found["sets"] == 5


def ranked_by(strengths: list[list[float]], pools: list[int]) -> list[Set]:
    """Sets of which nothing but strengths is known."""
    return [
        {"responses": [f"{number}.{index}" for index in range(len(one))], "strengths": one, "pool": pool}
        for number, (one, pool) in enumerate(zip(strengths, pools, strict=True))
    ]


def slow_share(rights: list[tuple[float, set[int]]]) -> tuple[float, float, float]:
    """A share and its interval, summed draw by draw; of each pair whether it is right, and the draws that it is of."""
    share = float(np.mean([right for right, _ in rights]))
    draws = {draw for _, both in rights for draw in both}
    variance = 0.0
    for draw in draws:
        mine = [right - share for right, both in rights if draw in both]
        variance += sum(a * b for a in mine for b in mine)
    variance *= len(draws) / (len(draws) - 1)
    variance -= sum((right - share) ** 2 for right, both in rights if len(both) == 2)
    variance = max(variance, sum((right - share) ** 2 for right, _ in rights))
    half = float(stats.t.ppf(0.975, len(draws) - 1)) * math.sqrt(variance) / len(rights)
    return share, max(0.0, share - half), min(1.0, share + half)


def judged(sets: list[Set], scores: Any, *, within: bool) -> list[tuple[float, float, set[int]]]:
    """Of each pair of a pool with an order: whether scores have it, how far the strengths are apart, and its sets."""
    items = [(number, one["pool"], value) for number, one in enumerate(sets) for value in one["strengths"]]
    return [
        (0.5 + 0.5 * float(np.sign((x - y) * (scores[a] - scores[b]))), abs(x - y), {first, second})
        for (a, (first, pool, x)), (b, (second, other, y)) in combinations(enumerate(items), 2)
        if pool == other and x != y and (first == second or not within)
    ]


@pytest.mark.parametrize(("n_sets", "seed"), [(2, 0), (3, 1), (5, 2), (9, 3)])
def test_a_share_and_its_interval_are_those_of_the_slow_sum(n_sets: int, seed: int) -> None:
    """Of pairs within sets and across, with ties of scores; the quarters by gap are the pairs from edge to edge."""
    rng = np.random.default_rng(seed)
    sets = ranked_by(rng.integers(0, 6, (n_sets, 4)).astype(float).tolist(), [0] * n_sets)
    scores = np.concatenate([one["strengths"] for one in sets]) + rng.integers(-4, 5, 4 * n_sets)
    found = quality(sets, scores, np.ones(4 * n_sets), 10_000, seed=0)
    for name, within in (("accuracy", False), ("accuracy_within", True)):
        pairs = judged(sets, scores, within=within)
        assert (found[name]["pairs"], found[name]["draws"]) == (len(pairs), n_sets)
        slow = slow_share([(right, both) for right, _, both in pairs])
        assert (found[name]["share"], found[name]["low"], found[name]["high"]) == pytest.approx(slow)
    pairs = judged(sets, scores, within=False)
    edges = sorted({float(edge) for edge in np.quantile([gap for _, gap, _ in pairs], [0, 0.25, 0.5, 0.75, 1])})
    rows = found["accuracy_by_gap"]
    assert [(row["gap_from"], row["gap_to"]) for row in rows] == list(pairwise(edges))
    for row, last in zip(rows, [False] * (len(rows) - 1) + [True], strict=True):
        low, high = row["gap_from"], row["gap_to"]
        inside = [(right, both) for right, gap, both in pairs if low <= gap < high or (last and gap == high)]
        assert row["pairs"] == len(inside)
        if not inside:
            assert set(row) == {"gap_from", "gap_to", "pairs"}
            continue
        slow = slow_share(inside)
        assert (row["share"], row["low"], row["high"]) == pytest.approx(slow)


def test_an_interval_is_at_least_that_of_independent_pairs() -> None:
    """Two sets of three with one mistake each, of which the sums by set are 0."""
    sets = ranked_by([[2.0, 1.0, 0.0]] * 2, [0, 1])
    found = quality(sets, [2.0, 0.0, 1.0] * 2, np.ones(6), 100, seed=0)["accuracy"]
    half = float(stats.t.ppf(0.975, 1)) * math.sqrt(4 / 9 + 8 / 9) / 6
    assert found == {
        "share": pytest.approx(2 / 3),
        "pairs": 6,
        "draws": 2,
        "low": pytest.approx(max(0.0, 2 / 3 - half)),
        "high": 1.0,
    }


def test_of_fewer_than_four_pairs_there_are_no_quarters() -> None:
    """And of four there are."""
    for count, rows in ((3, 0), (4, 4)):
        sets = ranked_by([[float(gap), -float(gap)] for gap in range(1, count + 1)], list(range(count)))
        assert len(quality(sets, np.arange(2 * count), np.ones(2 * count), 100, seed=0)["accuracy_by_gap"]) == rows


def slow_tau(one: list[float], other: list[float]) -> float:
    """Kendall's τ_b, pair by pair."""
    signs = [(np.sign(a - b), np.sign(c - d)) for (a, c), (b, d) in combinations(zip(one, other, strict=True), 2)]
    ordered = [sum(pair[side] != 0 for pair in signs) for side in (0, 1)]
    return float(sum(a * b for a, b in signs)) / math.sqrt(ordered[0] * ordered[1])


@pytest.mark.parametrize("n_sets", [2, 5])
def test_kendalls_tau_is_the_mean_over_sets_with_students_interval(n_sets: int) -> None:
    """Sets in which people or scores have no order are left out, and so are responses that nobody rated."""
    rng = np.random.default_rng(n_sets)
    sets: list[Set] = [
        {"responses": list("abcd"), "ratings": [[0.1 * value] for value in rng.permutation(4)], "pool": number}
        for number in range(n_sets)
    ]
    sets[0]["ratings"][1] = [None]
    sets[1]["ratings"][0] = sets[1]["ratings"][2]
    for number, one in enumerate(sets):
        one["responses"] = [f"{number}{text}" for text in one["responses"]]
        one["strengths"] = [0.0] * 4
    scores = [rng.permutation(4).astype(float).tolist() for _ in sets]
    taus = []
    for one, row in zip(sets, scores, strict=True):
        known = [index for index in range(4) if one["ratings"][index] != [None]]
        taus.append(slow_tau([row[index] for index in known], [one["ratings"][index][0] for index in known]))
    silent: list[Set] = [
        {"responses": ["x", "y"], "ratings": [[1.0], [1.0]], "pool": 90, "strengths": [0.0] * 2},
        {"responses": ["u", "v"], "ratings": [[1.0], [2.0]], "pool": 91, "strengths": [0.0] * 2},
        {"responses": ["s", "t"], "ratings": [[1.0], [None]], "pool": 92, "strengths": [0.0] * 2},
    ]
    values = [*np.concatenate(scores), 0.0, 1.0, 3.0, 3.0, 0.0, 1.0]
    found = quality(sets + silent, values, np.ones(len(values)), 100, seed=0)["kendall_tau"]
    half = float(stats.t.ppf(0.975, n_sets - 1)) * float(np.std(taus, ddof=1)) / math.sqrt(n_sets)
    mean = float(np.mean(taus))
    assert found == {
        "mean": pytest.approx(mean),
        "low": pytest.approx(mean - half),
        "high": pytest.approx(mean + half),
        "sets": n_sets,
    }


def test_calibration_is_the_slow_count_over_tenths_of_what_was_said() -> None:
    """Comparison by comparison: ratings with ties, winners, equal scores, and scores beyond any doubt."""
    rng = np.random.default_rng(4)
    sets: list[Set] = [
        {
            "responses": [f"{number}{letter}" for letter in "abc"],
            "ratings": rng.integers(0, 3, (3, 2)).astype(float).tolist(),
            "winners": [[0, 2, 1.0], [1, 2, 0.5], [2, 1, 0.0]],
            "pool": number,
        }
        for number in range(8)
    ]
    scores = rng.normal(0, 1.5, 24)
    scores[4] = scores[3]
    scores[6] = scores[7] + 50
    # One set with one comparison, alone in its tenth.
    sets.append({"responses": ["x", "y"], "winners": [[0, 1, 1.0]], "strengths": [1.0, 0.0], "pool": 8})
    scores = np.append(scores, [math.log(0.72 / 0.28), 0.0])
    said: list[float] = []
    won: list[float] = []
    for number, one in enumerate(sets):
        views = [
            (i, j, 0.5 + 0.5 * float(np.sign(one["ratings"][i][k] - one["ratings"][j][k])))
            for i, j in combinations(range(len(one.get("ratings", []))), 2)
            for k in range(2)
        ]
        for i, j, outcome in views + one["winners"]:
            gap = scores[3 * number + i] - scores[3 * number + j]
            said.append(1 / (1 + math.exp(-abs(gap))))
            won.append(0.5 if gap == 0 else outcome if gap > 0 else 1 - outcome)
    found = quality(sets, scores, np.ones(26), 100, seed=0)["calibration"]
    rows, error = [], 0.0
    for tenth in range(10):
        low, high = 0.5 + tenth / 20, 0.55 + tenth / 20
        inside = [n for n, value in enumerate(said) if low <= value < high or (tenth == 9 and value == 1)]
        if inside:
            predicted, observed = (float(np.mean([of[n] for n in inside])) for of in (said, won))
            error += abs(predicted - observed) * len(inside) / len(said)
            rows.append({"predicted": predicted, "observed": observed, "comparisons": float(len(inside))})
    assert len(rows) > 6
    assert min(row["comparisons"] for row in rows) == 1, "the case has a bin of a single comparison"
    assert len(found["bins"]) == len(rows)
    for row, slow in zip(found["bins"], rows, strict=True):
        assert row == pytest.approx(slow)
    assert found["expected_error"] == pytest.approx(error)


def test_without_comparisons_there_is_no_calibration() -> None:
    """Nor a length that people prefer, where there are fewer than three responses or all are of one strength."""
    found = quality(ranked_by([[1.0, 0.0]], [0]), [1.0, 0.0], [1, 2], 10, seed=0)
    assert "calibration" not in found
    assert found["length_correlation"] == {"scores": None, "people": None}
    found = quality(ranked_by([[0.5, 0.0, 1.0]], [0]), [0.1, 0.1, 0.1], [1, 2, 3], 10, seed=0)
    assert found["length_correlation"] == {"scores": None, "people": pytest.approx(0.5)}
