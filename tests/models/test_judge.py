import math
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from sklearn.model_selection import KFold

from rlhf.errors import RecordError
from rlhf.models.evaluation import TextJudge
from rlhf.textstats import pair_accuracy, seeded_pairs

WORTH = {"wonderful": 2.0, "moving": 1.0, "funny": 1.5, "dull": -1.5, "awful": -2.0, "tedious": -1.0}
FILLERS = ["film", "story", "actor", "scene", "camera", "evening", "script", "picture", "audience", "director"]


def rated_texts(n_texts: int, seed: int, noise: float = 0.3) -> tuple[list[str], np.ndarray]:
    """Texts of eight words, rated by the worth of their words and the noise of a few annotators."""
    rng = np.random.default_rng(seed)
    words = [[*rng.choice(list(WORTH), 2), *rng.choice(FILLERS, 6)] for _ in range(n_texts)]
    ratings = np.array([sum(WORTH.get(word, 0.0) for word in text) for text in words])
    return [" ".join(text) for text in words], ratings + rng.normal(0, noise, n_texts)


@pytest.fixture(scope="module")
def judge() -> TextJudge:
    return TextJudge(*rated_texts(300, seed=0))


def test_the_judge_orders_texts_that_it_has_not_seen_as_people_do(judge: TextJudge):
    """Where ratings follow from words, almost every pair of new texts comes out in the right order."""
    texts, ratings = rated_texts(200, seed=1, noise=0.0)
    assert pair_accuracy(judge.rate(texts), ratings, seeded_pairs(200, 2000, seed=0)) > 0.9


def test_ratings_come_out_on_the_scale_that_they_went_in(judge: TextJudge):
    """A judge's mean difference reads in the annotators' units: new ratings differ by less than half a deviation."""
    texts, ratings = rated_texts(200, seed=1, noise=0.0)
    assert np.sqrt(np.mean((judge.rate(texts) - ratings) ** 2)) < 0.5 * ratings.std()


def test_the_same_ratings_make_the_same_judge(judge: TextJudge):
    """Nothing in the fit is left to chance, so a rerun of an evaluation gives the same numbers to the last bit."""
    texts, _ = rated_texts(50, seed=2)
    np.testing.assert_array_equal(TextJudge(*rated_texts(300, seed=0)).rate(texts), judge.rate(texts))


def test_another_scale_of_ratings_changes_only_the_scale(judge: TextJudge):
    """Whether annotators rate from -4 to 4 or from 0 to 100 changes no order of texts."""
    texts, ratings = rated_texts(300, seed=0)
    rescaled = TextJudge(texts, 12.5 * ratings + 50)
    new, _ = rated_texts(50, seed=2)
    np.testing.assert_allclose(rescaled.rate(new), 12.5 * judge.rate(new) + 50, atol=0.1)
    assert rescaled.alpha == judge.alpha


def test_a_form_of_a_word_never_seen_is_known_by_its_letters(judge: TextJudge):
    """The characters carry what whole words cannot: an unseen form lands on its relatives' side."""
    good, bad = judge.rate(["wonderfully", "awfully"])
    assert good > bad + 0.5


def words_of(text: str) -> list[str]:
    words = re.findall(r"\w\w+", text.lower())
    return words + [" ".join(pair) for pair in pairwise(words)]


def letters_of(text: str) -> list[str]:
    padded = [f" {word} " for word in text.lower().split()]
    grams: list[str] = []
    for word in padded:
        for length in range(2, 6):
            grams += [word[at : at + length] for at in range(max(1, len(word) - length + 1))]
            if length >= len(word):  # a word shorter than the n-gram counts once
                break
    return grams


def tf_idf(grams: list[list[str]], least: int) -> np.ndarray:
    """Rows of length 1: (1 + ln count) (ln((1 + n) / (1 + df)) + 1) of n-grams that at least so many texts have."""
    seen = Counter(gram for row in grams for gram in set(row))
    kept = {gram: place for place, gram in enumerate(sorted(gram for gram, df in seen.items() if df >= least))}
    matrix = np.zeros((len(grams), len(kept)))
    for number, row in enumerate(grams):
        for gram, count in Counter(row).items():
            if gram in kept:
                idf = math.log((1 + len(grams)) / (1 + seen[gram])) + 1
                matrix[number, kept[gram]] = (1 + math.log(count)) * idf
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def ridge(known: np.ndarray, ratings: np.ndarray, new: np.ndarray, alpha: float) -> np.ndarray:
    """The regression with an intercept, solved in its dual form."""
    middle, mean = known.mean(axis=0), ratings.mean()
    centred = known - middle
    weights = np.linalg.solve(centred @ centred.T + alpha * np.eye(len(known)), ratings - mean)
    return mean + (new - middle) @ (centred.T @ weights)


@pytest.mark.parametrize(("noise", "alpha"), [(0.0, 2**-3), (1.0, None), (10.0, 2**5)])
def test_the_judge_is_the_ridge_regression_that_its_folds_choose(noise: float, alpha: float | None):
    """Against tf-idf and ridge written out, at both ends of the penalties on offer and between them."""
    texts, ratings = rated_texts(80, seed=3, noise=noise)
    texts = [text if number % 7 else f"{text} {text.split()[0]} ox" for number, text in enumerate(texts)]
    matrix = np.hstack([tf_idf([words_of(text) for text in texts], 1), tf_idf([letters_of(text) for text in texts], 2)])
    errors: dict[float, float] = {}
    for power in range(-3, 6):
        parts = KFold(5, shuffle=True, random_state=0).split(matrix)
        squares = [(ridge(matrix[a], ratings[a], matrix[b], 2.0**power) - ratings[b]) ** 2 for a, b in parts]
        errors[2.0**power] = float(np.mean([row.mean() for row in squares]))
    best = min(errors, key=errors.__getitem__)
    assert alpha is None or best == alpha
    judge = TextJudge(texts, ratings)
    assert judge.alpha == best
    np.testing.assert_allclose(judge.rate(texts), ridge(matrix, ratings, matrix, best), atol=0.01)


def test_five_rated_texts_are_enough():
    """One for each fold."""
    texts, ratings = rated_texts(5, seed=0)
    assert np.isfinite(TextJudge(texts, ratings).rate(texts)).all()


def test_noisier_ratings_are_trusted_less():
    """Cross-validation looks at the data: the penalty grows with the noise."""
    clean = TextJudge(*rated_texts(200, seed=0, noise=0.1))
    noisy = TextJudge(*rated_texts(200, seed=0, noise=10.0))
    assert noisy.alpha > clean.alpha


def test_texts_that_say_nothing_are_rated_alike(judge: TextJudge):
    """An empty answer is rated, not refused; and no text at all gives no rating."""
    empty, unknown = judge.rate(["", "¿¡…"])
    assert empty == unknown
    assert np.isfinite(empty)
    assert judge.rate([]).shape == (0,)


def test_too_few_ratings_to_fit_on_are_the_users_to_fix():
    """Four texts cannot be split into five folds, which is said in the user's words."""
    with pytest.raises(RecordError, match="at least 5 rated texts, and there are 4"):
        TextJudge(["a film"] * 4, [1.0, 2.0, 3.0, 4.0])
