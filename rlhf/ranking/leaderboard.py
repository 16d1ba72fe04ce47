"""Models ranked by what people said of their responses."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf.config.data import RankSettings
from rlhf.ranking.comparisons import Comparisons, add_up, join, renumber
from rlhf.ranking.strengths import of_comparisons


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

    sets  of each set, the model of every response and the comparisons; at least one
    """
    names, pooled = pool_by_model(sets)
    strengths, _ = of_comparisons(settings, len(names), pooled)
    each = pooled.wins + pooled.losses + pooled.ties
    compared = add_up(pooled.first, each, len(names)) + add_up(pooled.second, each, len(names))
    half = 1.96 * strengths.standard_errors
    return [
        {
            "model": names[i],
            "elo": strengths.elo[i],
            "standard_error": strengths.standard_errors[i],
            "low": strengths.elo[i] - half[i],
            "high": strengths.elo[i] + half[i],
            "comparisons": float(compared[i]),
        }
        for i in np.argsort(-strengths.elo, kind="stable")
    ]
