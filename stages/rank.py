"""Rank: what annotators said of responses, turned into a strength for each response.

In: comparison sets (``comparisons``: ``train.jsonl``, ``heldout.jsonl``).
Out: the same sets with ``strengths`` and ``standard_errors``, one number a response, and their ``pool``;
``scale.json``, with the Elo points that a strength of 1 stands for and the parameter of ties; ``leaderboard.json``
where training sets name the models that wrote the responses; ``annotators.json`` where annotators count by their
reliability.

Every annotator's view of two responses is one comparison. Sets with the same prompt and ratings are one pool: their
responses are also compared across sets, by ratings alone, so that a set of good responses is told from a set of bad
ones. One fit gives all Bradley-Terry strengths, which have mean 0 where comparisons join them; all are divided by the
deviation over the training sets, held-out ones too. Left out: strengths across prompts.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rlhf.config.data import RankSettings
from rlhf.data.jsonl import read_jsonl, to_line
from rlhf.data.records import ComparisonSet
from rlhf.errors import RecordError
from rlhf.pipeline.context import Context
from rlhf.ranking.bradley_terry import Strengths, fit
from rlhf.ranking.comparisons import NOBODY, Comparisons, add_up, compare, pool_by_model
from rlhf.ranking.crowd import Crowd, fit_crowd
from rlhf.ranking.normalise import overall_deviation
from rlhf.ranking.pools import ComparedSet, Ranked, pool


def run(context: Context[RankSettings]) -> dict[str, float]:
    """Rank every set; final metrics: ``sets``, ``responses``, ``comparisons``, ``tie_share`` and ``deviation_elo``."""
    settings = context.settings
    names: dict[str, int] = {}
    train = _compared(context, "train", names)
    pooled = pool(train, settings.bridges, settings.seed)
    if settings.annotators == "reliability" and not names:
        raise RecordError(
            "rank.annotators is reliability, and there is no annotator: no set has ratings or rankings",
            str(context.inputs["comparisons"] / "train.jsonl"),
            "write what annotators said as ratings or rankings, with their names in annotators, or set "
            "rank.annotators=equal",
        )
    strengths, crowd = _fit(settings, pooled.responses, pooled.comparisons)
    deviation = overall_deviation(strengths.elo)
    if deviation == 0:
        raise RecordError(
            "the annotators prefer no response to another in any set, so there is nothing to learn",
            str(context.inputs["comparisons"] / "train.jsonl"),
            "check that ratings differ, and that rankings run from best to worst",
        )
    _write(context, "train", pooled.share(strengths), deviation)
    _write(context, "heldout", _heldout(context, strengths), deviation)

    scale: dict[str, Any] = {"deviation_elo": deviation, "prior_elo": settings.prior_elo, "ties": settings.ties}
    if strengths.tie_parameter is not None:
        scale["tie_parameter"] = strengths.tie_parameter
    _write_json(context, "scale.json", scale)
    if crowd is not None:
        _write_annotators(context, list(names), crowd)
    _write_leaderboard(context, train)

    total = sum(one.comparisons.total for one in train)
    return {
        "sets": float(len(train)),
        "responses": float(pooled.responses),
        "comparisons": total,
        "tie_share": float(sum(one.comparisons.ties.sum() for one in train)) / total,
        "deviation_elo": deviation,
    }


def _sets(context: Context[RankSettings], part: str) -> Iterator[ComparisonSet]:
    # Read anew for each use: texts are large, and the comparisons that are kept are small.
    return read_jsonl(context.inputs["comparisons"] / f"{part}.jsonl", ComparisonSet)


def _compared(context: Context[RankSettings], part: str, names: dict[str, int]) -> list[ComparedSet]:
    """The comparisons of every set; annotators are numbered through in ``names``, which new ones are added to."""
    found: list[ComparedSet] = []
    for row, one in enumerate(_sets(context, part), start=1):
        size = len(one.responses)
        said = compare(size, one.ratings, one.rankings, one.winners)
        numbers = [names.setdefault(name, len(names)) for name in _annotators(one, f"{part}.jsonl:{row}")]
        # The last entry is that of NOBODY, which is -1.
        said = said._replace(annotator=np.array([*numbers, NOBODY])[said.annotator])
        found.append(ComparedSet(one.prompt, size, said, one.ratings))
    return found


def _annotators(one: ComparisonSet, where: str) -> list[str]:
    """Whose the columns of ratings are, then the rankings; in a set that does not say, they are its own."""
    columns, rankings = len(one.ratings[0]) if one.ratings else 0, len(one.rankings or [])
    if one.annotators is None:
        return [f"{where}, annotator {number}" for number in range(columns + rankings)]
    return one.annotators[:columns] + one.annotators[:rankings]


def _fit(
    settings: RankSettings, count: int, comparisons: Comparisons, tie_parameter: float | None = None
) -> tuple[Strengths, Crowd | None]:
    if settings.annotators == "equal":
        return fit(count, comparisons, settings.prior_elo, settings.ties, tie_parameter), None
    crowd = fit_crowd(count, comparisons, settings.prior_elo, settings.ties, tie_parameter)
    return crowd.strengths, crowd


def _heldout(context: Context[RankSettings], train: Strengths) -> list[Ranked]:
    """The held-out sets' strengths: their own comparisons, seen with the training sets' parameter of ties."""
    settings = context.settings
    compared = _compared(context, "heldout", {})
    if not compared:
        return []
    pooled = pool(compared, settings.bridges, settings.seed)
    strengths, _ = _fit(settings, pooled.responses, pooled.comparisons, train.tie_parameter)
    return pooled.share(strengths)


def _write(context: Context[RankSettings], part: str, strengths: list[Ranked], deviation: float) -> None:
    with (context.output / f"{part}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for record, ranked in zip(_sets(context, part), strengths, strict=True):
            found = {
                "strengths": (ranked.elo / deviation).tolist(),
                "standard_errors": (ranked.standard_errors / deviation).tolist(),
                "pool": ranked.pool,
            }
            file.write(to_line(record, **found))


def _write_annotators(context: Context[RankSettings], names: Sequence[str], crowd: Crowd) -> None:
    """The training part's, the least reliable first."""
    rows = [
        {"name": names[a], "reliability": crowd.reliability[a], "comparisons": crowd.comparisons[a]}
        for a in np.argsort(crowd.reliability, kind="stable")
        if crowd.comparisons[a] > 0
    ]
    _write_json(context, "annotators.json", rows)


def _write_leaderboard(context: Context[RankSettings], train: Sequence[ComparedSet]) -> None:
    sets = [
        (one.models, compared.comparisons)
        for one, compared in zip(_sets(context, "train"), train, strict=True)
        if one.models is not None
    ]
    if not sets:
        return
    settings = context.settings
    names, pooled = pool_by_model(sets)
    strengths, _ = _fit(settings, len(names), pooled)
    each = pooled.wins + pooled.losses + pooled.ties
    compared = add_up(pooled.first, each, len(names)) + add_up(pooled.second, each, len(names))
    rows = [
        {
            "model": names[i],
            "elo": strengths.elo[i],
            "standard_error": strengths.standard_errors[i],
            "comparisons": float(compared[i]),
        }
        for i in np.argsort(-strengths.elo)
    ]
    _write_json(context, "leaderboard.json", rows)


def _write_json(context: Context[RankSettings], name: str, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    (context.output / name).write_text(text + "\n", encoding="utf-8")
