"""The leaderboard of models and the report of a ranking."""

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


MOST_DISTINCT_RATINGS = 200
"""Beyond which ratings are taken for measurements rather than grades."""


def report(records: Iterable[ComparisonSet], compared: Sequence[ComparedSet]) -> dict[str, Any]:
    """Counts, agreement, and what may be wrong.

    records     the sets as they were read, in the order of ``compared``
    """
    repeated = unnamed = 0
    names: set[str] = set()
    seen: Counter[str] = Counter()
    for one in records:
        repeated += len(one.responses) - len(set(one.responses))
        seen[repr((one.prompt, sorted(one.responses)))] += 1
        # Who rated a set that names nobody may have rated any other: such people cannot be counted over sets.
        names.update(one.annotators or ())
        unnamed += one.annotators is None and bool(one.ratings or one.rankings)
    pairs = never = cyclic = contradicted = 0
    for one in compared:
        merged = merge(one.size, one.comparisons)
        pairs += len(merged.first)
        never += one.size - len(np.unique(np.concatenate([merged.first, merged.second])))
        cyclic += _is_cyclic(one)
        contradicted += _contradictions(one)
    return {
        "sets": len(compared),
        "responses": sum(one.size for one in compared),
        "annotators": len(names),
        "sets_of_unnamed_annotators": unnamed,
        "comparisons": sum(one.comparisons.total for one in compared),
        "pairs": pairs,
        "krippendorff_alpha": agreement(compared),
        "sets_with_cycles": cyclic,
        "responses_never_compared": never,
        "pairs_where_winners_contradict_annotators": contradicted,
        "responses_repeated_in_their_set": repeated,
        "sets_repeated": sum(times - 1 for times in seen.values()),
    }


def in_words(found: dict[str, Any]) -> list[str]:
    """The report in lines: what there is, and then what deserves a look."""
    agreement_shown = found["krippendorff_alpha"]
    lines = [
        f"{found['sets']} sets of {found['responses']} responses; {found['comparisons']:.0f} comparisons of "
        f"{found['pairs']} pairs{_by_whom(found['annotators'], found['sets_of_unnamed_annotators'])}"
        + ("" if agreement_shown is None else f", who agree to {agreement_shown:.2f} (Krippendorff's alpha)")
    ]
    for name, said in (
        ("sets_with_cycles", "sets where majorities go round in a circle"),
        ("responses_never_compared", "responses that nobody compared with another of their set"),
        ("pairs_where_winners_contradict_annotators", "pairs whose winners contradict ratings and rankings"),
        ("responses_repeated_in_their_set", "responses that stand twice in their set"),
        ("sets_repeated", "sets that are there twice"),
    ):
        if found[name]:
            lines.append(f"{found[name]} {said}")
    return lines


def _by_whom(annotators: int, unnamed: int) -> str:
    known = [f"{annotators} annotators"] if annotators else []
    nameless = [f"annotators without names in {unnamed} sets"] if unnamed else []
    return "".join(f"{word} by {people}" for word, people in zip(("", " and"), known + nameless, strict=False))


def agreement(sets: Sequence[ComparedSet]) -> float | None:
    """Krippendorff's alpha (2011) of what annotators gave the same responses: 1 is full agreement, 0 that of chance.

    Ratings are grades, or measurements where there are very many different ones. Where nobody rated, it is of the
    places in rankings. None where no response has two, or where all say the same of everything.
    """
    tables = [one.ratings_table for one in sets if one.ratings_table.size] or [
        -one.table for one in sets if one.table.size
    ]
    # Which annotator gave a value does not count, so that a response's values stand side by side.
    rows = [row[~np.isnan(row)] for table in tables for row in table]
    rows = [row for row in rows if len(row) > 1]
    if not rows or len(distinct := np.unique(np.concatenate(rows))) < 2:
        return None
    values: FloatArray = np.full((max(map(len, rows)), len(rows)), np.nan)
    for column, row in enumerate(rows):
        values[: len(row), column] = row
    level = "ordinal" if len(distinct) <= MOST_DISTINCT_RATINGS else "interval"
    return float(alpha(reliability_data=values, level_of_measurement=level))


def _is_cyclic(one: ComparedSet) -> bool:
    """Whether each of some responses is beaten, by majority, by the one before it all the way round."""
    merged = merge(one.size, one.comparisons)
    up, down = merged.wins > merged.losses, merged.losses > merged.wins
    beats = np.concatenate([merged.first[up], merged.second[down]])
    beaten = np.concatenate([merged.second[up], merged.first[down]])
    graph = sparse.coo_array((np.ones(len(beats)), (beats, beaten)), shape=(one.size, one.size))
    number, _ = connected_components(graph, connection="strong")
    return number < one.size


def _contradictions(one: ComparedSet) -> int:
    """Pairs of which winners say one thing and most annotators the other."""
    nobody = one.comparisons.annotator == NOBODY
    if nobody.all() or not nobody.any():
        return 0
    margins = [np.zeros((one.size, one.size)) for _ in range(2)]
    for margin, which in zip(margins, (nobody, ~nobody), strict=True):
        merged = merge(one.size, one.comparisons.rows(which))
        margin[merged.first, merged.second] = merged.wins - merged.losses
    return int((margins[0] * margins[1] < 0).sum())
