"""Rank: what annotators said of responses, turned into a strength for each response.

In: comparison sets (``comparisons``: ``train.jsonl``, ``heldout.jsonl``).
Out: the same sets with ``strengths`` and ``standard_errors``, one number a response, and their ``pool``;
``scale.json``, with the Elo points that a strength of 1 stands for and the parameter of ties; ``leaderboard.json``
where training sets name the models that wrote the responses.

Every annotator's view of two responses is one comparison. Sets with the same prompt and ratings are one pool: their
responses are also compared across sets, by ratings alone, so that a set of good responses is told from a set of bad
ones. One fit gives all Bradley-Terry strengths, which have mean 0 where comparisons join them; all are divided by the
deviation over the training sets, held-out ones too. Left out: how reliable each annotator is, and strengths across
prompts.
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
from rlhf.ranking.comparisons import add_up, compare, pool_by_model
from rlhf.ranking.normalise import overall_deviation
from rlhf.ranking.pools import ComparedSet, Ranked, pool


def run(context: Context[RankSettings]) -> dict[str, float]:
    """Rank every set; final metrics: ``sets``, ``responses``, ``comparisons``, ``tie_share`` and ``deviation_elo``."""
    settings = context.settings
    train = _compared(context, "train")
    pooled = pool(train, settings.bridges, settings.seed)
    strengths = fit(pooled.responses, pooled.comparisons, settings.prior_elo, settings.ties)
    deviation = overall_deviation([strengths.elo])
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


def _compared(context: Context[RankSettings], part: str) -> list[ComparedSet]:
    return [
        ComparedSet(
            one.prompt,
            len(one.responses),
            compare(len(one.responses), one.ratings, one.rankings, one.winners),
            one.ratings,
        )
        for one in _sets(context, part)
    ]


def _heldout(context: Context[RankSettings], train: Strengths) -> list[Ranked]:
    """The held-out sets' strengths: their own comparisons, seen with the training sets' parameter of ties."""
    settings = context.settings
    compared = _compared(context, "heldout")
    if not compared:
        return []
    pooled = pool(compared, settings.bridges, settings.seed)
    strengths = fit(pooled.responses, pooled.comparisons, settings.prior_elo, settings.ties, train.tie_parameter)
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
    strengths = fit(len(names), pooled, settings.prior_elo, settings.ties)
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
