from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from rlhf.errors import RecordError
from rlhf.models.judge import Judge
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
def judge() -> Judge:
    return Judge.fit(*rated_texts(300, seed=0))


def test_the_judge_orders_texts_that_it_has_not_seen_as_people_do(judge: Judge):
    """Where ratings follow from words, almost every pair of new texts comes out in the right order."""
    texts, ratings = rated_texts(200, seed=1, noise=0.0)
    assert pair_accuracy(judge.rate(texts), ratings, seeded_pairs(200, 2000, seed=0)) > 0.9


def test_ratings_come_out_on_the_scale_that_they_went_in(judge: Judge):
    """A judge's mean difference reads in the annotators' units: new ratings differ by less than half a deviation."""
    texts, ratings = rated_texts(200, seed=1, noise=0.0)
    assert np.sqrt(np.mean((judge.rate(texts) - ratings) ** 2)) < 0.5 * ratings.std()


def test_the_same_ratings_make_the_same_judge(judge: Judge):
    """Nothing in the fit is left to chance, so a rerun of an evaluation gives the same numbers to the last bit."""
    texts, _ = rated_texts(50, seed=2)
    np.testing.assert_array_equal(Judge.fit(*rated_texts(300, seed=0)).rate(texts), judge.rate(texts))


def test_another_scale_of_ratings_changes_only_the_scale(judge: Judge):
    """Whether annotators rate from -4 to 4 or from 0 to 100 changes no order of texts."""
    texts, ratings = rated_texts(300, seed=0)
    rescaled = Judge.fit(texts, 12.5 * ratings + 50)
    new, _ = rated_texts(50, seed=2)
    np.testing.assert_allclose(rescaled.rate(new), 12.5 * judge.rate(new) + 50, atol=0.1)
    assert rescaled.alpha == judge.alpha


def test_a_form_of_a_word_never_seen_is_known_by_its_letters(judge: Judge):
    """The characters carry what whole words cannot: an unseen form lands on its relatives' side."""
    good, bad = judge.rate(["wonderfully", "awfully"])
    assert good > bad + 0.5


def test_noisier_ratings_are_trusted_less():
    """Cross-validation looks at the data: the penalty grows with the noise."""
    clean = Judge.fit(*rated_texts(200, seed=0, noise=0.1))
    noisy = Judge.fit(*rated_texts(200, seed=0, noise=10.0))
    assert noisy.alpha > clean.alpha


def test_texts_that_say_nothing_are_rated_alike(judge: Judge):
    """An empty answer is rated, not refused; and no text at all gives no rating."""
    empty, unknown = judge.rate(["", "¿¡…"])
    assert empty == unknown
    assert np.isfinite(empty)
    assert judge.rate([]).shape == (0,)


def test_too_few_ratings_to_fit_on_are_the_users_to_fix():
    """Four texts cannot be split into five folds, which is said in the user's words."""
    with pytest.raises(RecordError, match="at least 5 rated texts, and there are 4"):
        Judge.fit(["a film"] * 4, [1.0, 2.0, 3.0, 4.0])


def written_out(texts: list[str], ratings: np.ndarray, new: list[str]) -> tuple[float, np.ndarray]:
    """The chosen penalty and the new ratings, from the definitions of tf-idf, ridge regression and cross-validation."""

    def words(text: str) -> list[str]:
        found = text.split()
        return found + [" ".join(pair) for pair in pairwise(found)]

    def letters(text: str) -> list[str]:
        padded = [f" {word} " for word in text.split()]
        return [word[i : i + n] for word in padded for n in range(2, 6) for i in range(max(1, len(word) - n + 1))]

    def weights(known: list[str], grams: Callable[[str], list[str]], least: int) -> Callable[[str], np.ndarray]:
        held = Counter(gram for text in known for gram in set(grams(text)))
        rarity = {gram: 1 + np.log((1 + len(known)) / (1 + n)) for gram, n in held.items() if n >= least}

        def of(text: str) -> np.ndarray:
            counts = Counter(grams(text))
            row = np.array([(1 + np.log(counts[g])) * idf if counts[g] else 0.0 for g, idf in rarity.items()])
            return row / np.linalg.norm(row)

        return of

    parts = (weights(texts, words, 1), weights(texts, letters, 2))

    def features(of: list[str]) -> np.ndarray:
        return np.array([np.concatenate([part(text) for part in parts]) for text in of])

    def predicted(x: np.ndarray, y: np.ndarray, at: np.ndarray, alpha: float) -> np.ndarray:
        centred = x - x.mean(axis=0)
        dual = np.linalg.solve(centred @ centred.T + alpha * np.eye(len(x)), y - y.mean())
        return (at - x.mean(axis=0)) @ centred.T @ dual + y.mean()

    x = features(texts)
    order = np.arange(len(texts))
    np.random.RandomState(0).shuffle(order)
    folds = np.array_split(order, 5)

    def error(alpha: float) -> float:
        return float(
            np.mean(
                [
                    np.mean((predicted(np.delete(x, f, 0), np.delete(ratings, f), x[f], alpha) - ratings[f]) ** 2)
                    for f in folds
                ]
            )
        )

    alpha = min((1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32), key=error)
    return alpha, predicted(x, ratings, features(new), alpha)


@pytest.mark.parametrize("noise", [0.0, 2.0, 3.0, 4.0, 5.0, 1000.0])
def test_the_judge_is_the_ridge_regression_that_predicts_best_across_five_folds(noise: float):
    """On tf-idf weights of 1-2 words and of 2-5 characters within a word, both of length 1, written out."""
    texts, ratings = rated_texts(45, seed=3, noise=noise)
    texts[0] += " dull dull film"  # a count above 1 weighs by its logarithm
    new, _ = rated_texts(20, seed=4)
    alpha, expected = written_out(texts, ratings, [*new, "dull dull dull film"])
    judge = Judge.fit(texts, ratings)
    assert judge.alpha == alpha
    np.testing.assert_allclose(judge.rate([*new, "dull dull dull film"]), expected, atol=1e-3 * ratings.std())
    assert (alpha == 1 / 8) == (noise == 0)
    assert (alpha == 32) == (noise == 1000)


def test_five_rated_texts_are_enough():
    """One for each fold."""
    ratings = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert np.isfinite(Judge.fit(["a film", "a dull film", "a story", "a dull story", "a film"], ratings).rate(["a"]))
