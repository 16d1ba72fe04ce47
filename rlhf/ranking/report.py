"""What there is to know of comparison sets before anything is learned from them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from krippendorff import alpha
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from rlhf.data.records import ComparisonSet
from rlhf.ranking.comparisons import NOBODY, FloatArray, merge
from rlhf.ranking.shared_scales import ComparedSet

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
