"""The uninvolved judge: a regression of people's ratings on a text's words, which no policy was trained to please.

It is fitted on ratings that the reward model has not seen and shares no weights with it, so a policy that merely found
the reward model's blind spots gains nothing here. Tf-idf weights over words (1-2-grams) see what is said; those over
characters within words (2-5-grams) carry over to word forms never seen. Both are linear, so every rating can be traced
to n-grams.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import FeatureUnion, make_union

from rlhf.errors import RecordError

_FOLDS = 5
# Powers of two around what texts of a sentence need; the features of a text have length sqrt(2), whatever its size.
_ALPHAS = tuple(2.0**power for power in range(-3, 6))


class Judge:
    """Rates texts as the people would have whose ratings it was fitted on; made by `Judge.fit`."""

    def __init__(self, features: FeatureUnion, ridge: Ridge) -> None:
        self._features = features
        self._ridge = ridge

    @classmethod
    def fit(cls, texts: Sequence[str], ratings: npt.ArrayLike) -> Self:
        """Fit to one mean rating a text, on any scale. The same input gives the same judge.

        The strength of the ridge penalty is the one with the smallest squared error over five folds of these texts.
        The n-grams' weights, which know no ratings, are computed once for all folds.

        Raises RecordError where there are fewer texts than folds.
        """
        if len(texts) < _FOLDS:
            raise RecordError(
                f"the judge is fitted on at least {_FOLDS} rated texts, and there are {len(texts)}",
                next_step="give the judge's split more comparison sets with ratings",
            )
        features = make_union(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True),
        )
        matrix = features.fit_transform(texts)
        search = GridSearchCV(
            Ridge(solver="lsqr"),
            {"alpha": _ALPHAS},
            scoring="neg_mean_squared_error",
            cv=KFold(_FOLDS, shuffle=True, random_state=0),
        )
        search.fit(matrix, np.asarray(ratings, dtype=np.float64))
        return cls(features, search.best_estimator_)

    @property
    def alpha(self) -> float:
        """The strength of the ridge penalty that cross-validation chose."""
        return float(self._ridge.alpha)

    def rate(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return one rating a text, in the units of the ratings fitted on; rare extremes may leave their range.

        A text of unknown n-grams only, an empty one included, gets the rating of an average text.
        """
        if not texts:
            return np.empty(0)
        return self._ridge.predict(self._features.transform(texts))
