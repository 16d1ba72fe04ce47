"""Models ranked by what people said of their responses."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from rlhf.config.data import RankSettings
from rlhf.randomness import stream
from rlhf.ranking.comparisons import Comparisons, FloatArray, add_up, join, renumber
from rlhf.ranking.strengths import of_comparisons

GROUPS = 30
"""Of sets, each left out once for the errors of a leaderboard."""


def pool_by_model(sets: Sequence[tuple[Sequence[str], Comparisons]]) -> tuple[list[str], Comparisons]:
    """All sets' comparisons as ones of the models that wrote the responses: names in order, and the comparisons.

    Comparisons of two responses of one model say nothing of models and are left out.
    """
    names = sorted({name for models, _ in sets for name in models})
    number = {name: index for index, name in enumerate(names)}
    pooled = join([renumber(compared, np.array([number[name] for name in models])) for models, compared in sets])
    apart = pooled.first != pooled.second
    return names, pooled.rows(apart)


def leaderboard(settings: RankSettings, sets: Sequence[tuple[Sequence[str], Comparisons]]) -> list[dict[str, Any]]:
    """A row for each model, the best first: Elo points with a 95 % interval, and how often it was compared.

    What a model wrote for a set is good or bad for all that set's raters, so errors are those over draws of sets
    (:func:`_error_over_sets`), and at least those of the fit, which takes comparisons as independent. Intervals are
    Student's. Of a single set no spread over sets is known: error and interval are None.

    sets  of each set, the model of every response and the comparisons; at least one
    """
    names, pooled = pool_by_model(sets)
    strengths, _ = of_comparisons(settings, len(names), pooled)
    each = pooled.wins + pooled.losses + pooled.ties
    compared = add_up(pooled.first, each, len(names)) + add_up(pooled.second, each, len(names))
    groups = min(len(sets), GROUPS)
    errors = half = np.full(len(names), np.nan)
    if groups > 1:
        errors = np.maximum(strengths.standard_errors, _error_over_sets(settings, names, sets, groups))
        half = float(stats.t.ppf(0.975, groups - 1)) * errors
    known = groups > 1
    return [
        {
            "model": names[i],
            "elo": strengths.elo[i],
            "standard_error": errors[i] if known else None,
            "low": strengths.elo[i] - half[i] if known else None,
            "high": strengths.elo[i] + half[i] if known else None,
            "comparisons": float(compared[i]),
        }
        for i in np.argsort(-strengths.elo, kind="stable")
    ]


def _error_over_sets(
    settings: RankSettings, names: Sequence[str], sets: Sequence[tuple[Sequence[str], Comparisons]], groups: int
) -> FloatArray:
    """``[models]``: the delete-a-group jackknife's standard errors (Kott 2001, Journal of Official Statistics 17:521).

    With the sets shuffled into G groups and θ_g fitted without group g, the variance is (G - 1) / G Σ_g (θ_g - mean)².
    It takes G fits where a bootstrap takes hundreds.
    """
    number = {name: index for index, name in enumerate(names)}
    group = stream("sets left out", settings.seed).permutation(np.arange(len(sets)) % groups)
    without: list[FloatArray] = []
    for left_out in range(groups):
        kept, pooled = pool_by_model([one for one, member in zip(sets, group, strict=True) if member != left_out])
        strengths, _ = of_comparisons(settings, len(kept), pooled)
        elo = np.zeros(len(names))  # a model that no other set names is back at its prior
        elo[[number[name] for name in kept]] = strengths.elo
        without.append(elo)
    return np.sqrt(groups - 1) * np.std(without, axis=0)
