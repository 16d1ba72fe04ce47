"""Rank: what annotators said of responses, turned into a strength for each response.

In: comparison sets (``comparisons``: ``train.jsonl``, ``heldout.jsonl``).
Out: the same sets with ``strengths`` and ``standard_errors``, one number a response, and their ``pool``;
``scale.json``, with the Elo points that a strength of 1 stands for; ``leaderboard.json`` where training sets name the
models that wrote the responses.

Every annotator's view of two responses is one comparison. Sets with the same prompt and ratings are one pool: their
responses are also compared across sets, by ratings alone, so that a set of good responses is told from a set of bad
ones. A pool's Bradley-Terry strengths have mean 0; all are divided by the deviation over the training sets, held-out
ones too. Left out: how reliable each annotator is, and strengths across prompts.
"""

import json
from collections.abc import Iterator

import numpy as np

from rlhf.config.data import RankSettings
from rlhf.data.jsonl import read_jsonl, to_line
from rlhf.data.records import ComparisonSet
from rlhf.errors import RecordError
from rlhf.pipeline.context import Context
from rlhf.ranking.bradley_terry import fit
from rlhf.ranking.comparisons import FloatArray, compare, pool_by_model
from rlhf.ranking.normalise import overall_deviation
from rlhf.ranking.pools import Ranked, RatedSet, strengths_of


def run(context: Context[RankSettings]) -> dict[str, float]:
    """Rank every set; final metrics: ``sets``, ``responses``, ``comparisons``, ``tie_share`` and ``deviation_elo``."""
    settings = context.settings
    compared = [compare(len(s.responses), s.ratings, s.rankings, s.winners) for s in _sets(context, "train")]
    wins = [comparisons.wins for comparisons in compared]
    strengths = _strengths(context, "train", wins)
    deviation = overall_deviation([ranked.elo for ranked in strengths])
    if deviation == 0:
        raise RecordError(
            "the annotators prefer no response to another in any set, so there is nothing to learn",
            str(context.inputs["comparisons"] / "train.jsonl"),
            "check that ratings differ, and that rankings run from best to worst",
        )
    _write(context, "train", strengths, deviation)

    heldout = [compare(len(s.responses), s.ratings, s.rankings, s.winners).wins for s in _sets(context, "heldout")]
    _write(context, "heldout", _strengths(context, "heldout", heldout), deviation)

    scale = {"deviation_elo": deviation, "prior_elo": settings.prior_elo}
    (context.output / "scale.json").write_text(json.dumps(scale, indent=2) + "\n", encoding="utf-8")
    _write_leaderboard(context, wins)

    total = float(sum(matrix.sum() for matrix in wins))
    return {
        "sets": float(len(wins)),
        "responses": float(sum(map(len, wins))),
        "comparisons": total,
        "tie_share": sum(comparisons.ties for comparisons in compared) / total,
        "deviation_elo": deviation,
    }


def _sets(context: Context[RankSettings], part: str) -> Iterator[ComparisonSet]:
    # Read anew for each use: texts are large, and the matrices that are kept are small.
    return read_jsonl(context.inputs["comparisons"] / f"{part}.jsonl", ComparisonSet)


def _strengths(context: Context[RankSettings], part: str, wins: list[FloatArray]) -> list[Ranked]:
    settings = context.settings
    sets = [RatedSet(one.prompt, matrix, one.ratings) for one, matrix in zip(_sets(context, part), wins, strict=True)]
    return strengths_of(sets, settings.prior_elo, settings.bridges, settings.seed)


def _write(context: Context[RankSettings], part: str, strengths: list[Ranked], deviation: float) -> None:
    with (context.output / f"{part}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for record, ranked in zip(_sets(context, part), strengths, strict=True):
            found = {
                "strengths": (ranked.elo / deviation).tolist(),
                "standard_errors": (ranked.standard_errors / deviation).tolist(),
                "pool": ranked.pool,
            }
            file.write(to_line(record, **found))


def _write_leaderboard(context: Context[RankSettings], wins: list[FloatArray]) -> None:
    sets = [(s.models, matrix) for s, matrix in zip(_sets(context, "train"), wins, strict=True) if s.models is not None]
    if not sets:
        return
    names, pooled = pool_by_model(sets)
    elo, errors = fit(pooled[None], context.settings.prior_elo)
    rows = [
        {"model": names[i], "elo": elo[0, i], "standard_error": errors[0, i], "comparisons": float(compared)}
        for i, compared in ((i, pooled[i].sum() + pooled[:, i].sum()) for i in np.argsort(-elo[0]))
    ]
    text = json.dumps(rows, indent=2, ensure_ascii=False)
    (context.output / "leaderboard.json").write_text(text + "\n", encoding="utf-8")
