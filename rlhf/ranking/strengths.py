"""Strengths by the model that the settings name."""

from rlhf.config.data import RankSettings
from rlhf.ranking.bradley_terry import Strengths, fit
from rlhf.ranking.comparisons import NOBODY, Comparisons
from rlhf.ranking.crowd import Crowd, fit_crowd
from rlhf.ranking.normalise import fit_each_annotator
from rlhf.ranking.online_elo import fit_online
from rlhf.ranking.plackett_luce import fit_rankings, rankings_of
from rlhf.ranking.shared_scales import Pooled


def strengths_of(
    settings: RankSettings, pooled: Pooled, tie_parameter: float | None = None
) -> tuple[Strengths, Crowd | None]:
    """The strengths of all responses, and what is known of the annotators where they count by their reliability.

    tie_parameter  the model's parameter of ties where it is known; otherwise it is fitted with the strengths
    """
    if settings.model == "plackett-luce":
        unranked = pooled.comparisons.rows(pooled.comparisons.annotator == NOBODY)
        rankings = rankings_of(pooled.tables, pooled.starts[:-1].tolist())
        return fit_rankings(pooled.responses, rankings, unranked, settings.prior_elo), None
    if settings.normalise == "annotator":

        def alone(count: int, comparisons: Comparisons) -> Strengths:
            return fit(count, comparisons, settings.prior_elo, settings.ties, tie_parameter)

        return fit_each_annotator(pooled.responses, pooled.comparisons, alone), None
    return of_comparisons(settings, pooled.responses, pooled.comparisons, tie_parameter)


def of_comparisons(
    settings: RankSettings, count: int, comparisons: Comparisons, tie_parameter: float | None = None
) -> tuple[Strengths, Crowd | None]:
    """The same of ``count`` things of which there are comparisons alone, as of models."""
    if settings.model == "elo":
        return fit_online(count, comparisons, settings.k_factor, settings.orders, settings.seed), None
    if settings.annotators == "reliability":
        crowd = fit_crowd(count, comparisons, settings.prior_elo, settings.ties, tie_parameter)
        return crowd.strengths, crowd
    return fit(count, comparisons, settings.prior_elo, settings.ties, tie_parameter), None
