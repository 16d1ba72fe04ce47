"""The report of a ranking, and the leaderboard of models."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from krippendorff import alpha
from scipy import sparse, stats
from scipy.sparse.csgraph import connected_components

from rlhf.config.data import RankSettings
from rlhf.data.records import ComparisonSet
from rlhf.randomness import stream
from rlhf.ranking.comparisons import NOBODY, Comparisons, FloatArray, add_up, join, merge, renumber
from rlhf.ranking.scales import ComparedSet
from rlhf.ranking.strengths import of_comparisons


def report(records: Iterable[ComparisonSet], compared: Sequence[ComparedSet]) -> dict[str, Any]:
    """Return counts, agreement, and possible faults.

    records  the sets as they were read, in the order of ``compared``
    """
    repeated = unnamed = 0
    names: set[str] = set()
    seen: Counter[str] = Counter()
    for record in records:
        repeated += len(record.responses) - len(set(record.responses))
        seen[repr((record.prompt, sorted(record.responses)))] += 1
        # Annotators without names may have rated any other set too, so they cannot be counted over sets.
        names.update(record.annotators or ())
        unnamed += record.annotators is None and bool(record.ratings or record.rankings)
    pairs = never = cyclic = contradicted = 0
    for item in compared:
        merged = merge(item.size, item.comparisons)
        pairs += len(merged.first)
        never += item.size - len(np.unique(np.concatenate([merged.first, merged.second])))
        up, down = merged.wins > merged.losses, merged.losses > merged.wins
        beats = np.concatenate([merged.first[up], merged.second[down]])
        beaten = np.concatenate([merged.second[up], merged.first[down]])
        majorities = sparse.coo_array((np.ones(len(beats)), (beats, beaten)), shape=(item.size, item.size))
        cyclic += connected_components(majorities, connection="strong")[0] < item.size
        contradicted += _contradictions(item)
    return {
        "sets": len(compared),
        "responses": sum(item.size for item in compared),
        "annotators": len(names),
        "sets_of_unnamed_annotators": unnamed,
        "comparisons": sum(item.comparisons.total for item in compared),
        "pairs": pairs,
        "krippendorff_alpha": agreement(compared),
        "sets_with_cycles": cyclic,
        "responses_never_compared": never,
        "pairs_where_winners_contradict_annotators": contradicted,
        "responses_repeated_in_their_set": repeated,
        "sets_repeated": sum(times - 1 for times in seen.values()),
    }


def _contradictions(compared: ComparedSet) -> int:
    """Count the pairs that the winners and most annotators order differently."""
    nobody = compared.comparisons.annotator == NOBODY
    if nobody.all() or not nobody.any():
        return 0  # a set of winners alone may be too large for a square matrix
    margins = np.zeros((2, compared.size, compared.size))
    for margin, which in zip(margins, (nobody, ~nobody), strict=True):
        merged = merge(compared.size, compared.comparisons.rows(which))
        margin[merged.first, merged.second] = merged.wins - merged.losses
    return int((margins[0] * margins[1] < 0).sum())


MOST_DISTINCT_RATINGS = 200
"""Beyond which ratings are taken for measurements rather than grades."""


def agreement(sets: Sequence[ComparedSet]) -> float | None:
    """Return Krippendorff's alpha (2011) of the annotators' ratings: 1 is full agreement, 0 that of chance.

    Ratings are grades, or measurements where there are very many different values. Without ratings, alpha is that of
    the places in rankings. None where no response has two, or where all values are equal.
    """
    rated = any(compared.ratings_table.size for compared in sets)
    tables = (compared.ratings_table if rated else -compared.table for compared in sets)
    # Alpha does not depend on which annotator gave a value, so a response's values move to the first columns.
    rows = [row[~np.isnan(row)] for table in tables for row in table]
    rows = [row for row in rows if len(row) > 1]
    if not rows or len(distinct := np.unique(np.concatenate(rows))) < 2:
        return None
    values: FloatArray = np.full((max(map(len, rows)), len(rows)), np.nan)
    for column, row in enumerate(rows):
        values[: len(row), column] = row
    level = "ordinal" if len(distinct) <= MOST_DISTINCT_RATINGS else "interval"
    return float(alpha(reliability_data=values, level_of_measurement=level))


def in_words(counts: dict[str, Any]) -> list[str]:
    """Return the report in lines: the counts, then each possible fault."""
    named, unnamed = counts["annotators"], counts["sets_of_unnamed_annotators"]
    people = [f" by {named} annotators"] if named else []
    if unnamed:
        people.append(f" by annotators without names in {unnamed} sets")
    agreed = counts["krippendorff_alpha"]
    lines = [
        f"{counts['sets']} sets of {counts['responses']} responses; {counts['comparisons']:.0f} comparisons of "
        f"{counts['pairs']} pairs{' and'.join(people)}"
        + ("" if agreed is None else f", who agree to {agreed:.2f} (Krippendorff's alpha)")
    ]
    for name, fault in (
        ("sets_with_cycles", "sets where majorities form a cycle"),
        ("responses_never_compared", "responses never compared with another of their set"),
        ("pairs_where_winners_contradict_annotators", "pairs whose winners contradict ratings and rankings"),
        ("responses_repeated_in_their_set", "responses repeated in their set"),
        ("sets_repeated", "repeated sets"),
    ):
        if counts[name]:
            lines.append(f"{counts[name]} {fault}")
    return lines


GROUPS = 30
"""Groups of sets, each left out once for the errors of a leaderboard."""


def leaderboard(settings: RankSettings, sets: Sequence[tuple[Sequence[str], Comparisons]]) -> list[dict[str, Any]]:
    """Return a row for each model, the best first: Elo points with a 95 % interval, and its number of comparisons.

    A model's response to a prompt is good or bad for all annotators of its set, so errors are those over draws of sets
    (:func:`_error_over_sets`), and at least those of the fit, which takes comparisons as independent. Intervals are
    Student's. A single set has no spread over sets: error and interval are None.

    sets  of each set, the model of every response and the comparisons; one set or more
    """
    names, pooled = pool_by_model(sets)
    strengths, _ = of_comparisons(settings, len(names), pooled)
    compared = add_up(pooled.first, pooled.counts, len(names)) + add_up(pooled.second, pooled.counts, len(names))
    groups = min(len(sets), GROUPS)
    errors: Any = np.full(len(names), None)
    low = high = errors
    if groups > 1:
        errors = np.maximum(strengths.standard_errors, _error_over_sets(settings, names, sets, groups))
        half = float(stats.t.ppf(0.975, groups - 1)) * errors
        low, high = strengths.elo - half, strengths.elo + half
    return [
        {
            "model": names[i],
            "elo": strengths.elo[i],
            "standard_error": errors[i],
            "low": low[i],
            "high": high[i],
            "comparisons": float(compared[i]),
        }
        for i in np.argsort(-strengths.elo, kind="stable")
    ]


def _error_over_sets(
    settings: RankSettings, names: Sequence[str], sets: Sequence[tuple[Sequence[str], Comparisons]], groups: int
) -> FloatArray:
    """Return standard errors ``[models]`` of the delete-a-group jackknife.

    Kott 2001, Journal of Official Statistics 17:521. With the sets shuffled into G groups and θ_g fitted without group
    g, the variance is (G - 1) / G Σ_g (θ_g - mean)². It takes G fits where a bootstrap takes hundreds.
    """
    number = {name: index for index, name in enumerate(names)}
    group = stream("sets left out", settings.seed).permutation(np.arange(len(sets)) % groups)
    without: list[FloatArray] = []
    for left_out in range(groups):
        kept, pooled = pool_by_model([sets[i] for i in np.flatnonzero(group != left_out).tolist()])
        strengths, _ = of_comparisons(settings, len(kept), pooled)
        elo = np.zeros(len(names))  # the prior of a model that no other set names
        elo[[number[name] for name in kept]] = strengths.elo
        without.append(elo)
    return np.sqrt(groups - 1) * np.std(without, axis=0)


def pool_by_model(sets: Sequence[tuple[Sequence[str], Comparisons]]) -> tuple[list[str], Comparisons]:
    """Return the models' names in order, and all sets' comparisons as comparisons of these models.

    Comparisons of two responses of the same model are left out.
    """
    names = sorted({name for models, _ in sets for name in models})
    number = {name: index for index, name in enumerate(names)}
    pooled = join([renumber(compared, np.array([number[name] for name in models])) for models, compared in sets])
    return names, pooled.rows(pooled.first != pooled.second)
