"""Rank: what annotators said of responses, turned into a strength for each response.

In: comparison sets (``comparisons``: ``train.jsonl``, ``heldout.jsonl``), and those of earlier rounds.
Out: the same sets with ``strengths``, ``standard_errors`` and ``elo``, one number a response, and their ``pool``;
``scale.json``, with the Elo points that a strength of 1 stands for and the parameter of ties; ``report.json``, what is
known of the comparisons; ``leaderboard.json`` where training sets name the models that wrote the responses;
``annotators.json`` where annotators count by their reliability.

Every annotator's view of two responses is one comparison. Sets with the same prompt and ratings are one pool: their
responses are also compared across sets, by ratings alone, so that a set of good responses is told from a set of bad
ones. One fit gives all strengths, which have mean 0 where comparisons join them; they are then normalised, held-out
ones by the training sets' scale. Left out: strengths across prompts.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rlhf.attempt.context import Context
from rlhf.config.data import RankSettings, ranked_inputs
from rlhf.data.records import ComparisonSet, read_jsonl, to_line
from rlhf.errors import RecordError
from rlhf.ranking.bradley_terry import Strengths
from rlhf.ranking.crowd import Crowd
from rlhf.ranking.report import in_words, leaderboard, report
from rlhf.ranking.scales import (
    ComparedSet,
    Pooled,
    Ranked,
    compared_sets,
    normalised,
    overall_deviation,
    pool,
    with_partial_views,
)
from rlhf.ranking.strengths import strengths_of

MOST_NAMED = 5
"""Annotators that a message names."""


def run(context: Context[RankSettings]) -> dict[str, float]:
    """Rank every set; final metrics: ``sets``, ``responses``, ``comparisons``, ``tie_share``, ``agreement`` and
    ``deviation_elo``.
    """
    settings = context.settings
    names: dict[str, int] = {}
    train = compared_sets(_sets(context, "train"), "train.jsonl", names)
    found = report(_sets(context, "train"), train)
    for line in in_words(found):
        context.note(line)
    if settings.annotators == "reliability" and not names:
        raise RecordError(
            "rank.annotators is reliability, and there is no annotator: no set has ratings or rankings",
            str(context.inputs["comparisons"] / "train.jsonl"),
            "write what annotators said as ratings or rankings, with their names in annotators, or set "
            "rank.annotators=equal",
        )

    pooled = _pooled(context, "train", train, names)
    strengths, crowd = strengths_of(settings, pooled)
    deviation = overall_deviation(strengths.elo)
    if deviation == 0:
        raise RecordError(
            "the annotators prefer no response to another in any set, so there is nothing to learn",
            str(context.inputs["comparisons"] / "train.jsonl"),
            "check that ratings differ, and that rankings run from best to worst",
        )
    scaled = normalised(settings.normalise, strengths, pooled.pool_of_response, deviation)
    _write(context, "train", pooled.share(strengths.elo, scaled))
    _write(context, "heldout", _heldout(context, strengths, deviation))

    scale: dict[str, Any] = {
        "model": settings.model,
        "normalise": settings.normalise,
        "deviation_elo": deviation,
        "prior_elo": settings.prior_elo,
        "ties": settings.ties,
    }
    if strengths.tie_parameter is not None:
        scale["tie_parameter"] = strengths.tie_parameter
    _write_json(context, "scale.json", scale)
    _write_json(context, "report.json", found)
    if crowd is not None:
        _write_json(context, "annotators.json", _annotators(list(names), crowd))
    by_model = [
        (one.models, compared.comparisons)
        for one, compared in zip(_sets(context, "train"), train, strict=True)
        if one.models is not None
    ]
    if by_model:
        _write_json(context, "leaderboard.json", leaderboard(settings, by_model))

    total = sum(one.comparisons.total for one in train)
    metrics = {
        "sets": float(len(train)),
        "responses": float(pooled.responses),
        "comparisons": total,
        "tie_share": float(sum(one.comparisons.ties.sum() for one in train)) / total,
        "deviation_elo": deviation,
    }
    agreement: float | None = found["krippendorff_alpha"]
    return metrics if agreement is None else metrics | {"agreement": agreement}


def _sets(context: Context[RankSettings], part: str) -> Iterator[ComparisonSet]:
    # Read anew for each use: texts are large, and the comparisons that are kept are small.
    for role in ("comparisons", *ranked_inputs(context.settings)):
        yield from read_jsonl(context.inputs[role] / f"{part}.jsonl", ComparisonSet)


def _pooled(
    context: Context[RankSettings], part: str, compared: Sequence[ComparedSet], names: dict[str, int]
) -> Pooled:
    """All comparisons of a part; with ``normalise: annotator``, only if no annotator saw a part of what others joined.

    Raises:
        RecordError: somebody did.
    """
    settings = context.settings
    pooled = pool(compared, settings.bridges, settings.seed)
    if settings.normalise == "annotator":
        partial = with_partial_views(pooled.responses, pooled.comparisons)
        if len(partial):
            named = [*names, "winners or bridges"]  # the last is NOBODY, which is -1
            shown = ", ".join(named[who] for who in partial[:MOST_NAMED])
            more = f" and {len(partial) - MOST_NAMED} more" if len(partial) > MOST_NAMED else ""
            raise RecordError(
                "rank.normalise is annotator, and not all annotators compared the same responses of a prompt: "
                f"{shown}{more} compared only some of those that others join",
                f"{part}.jsonl",
                "set rank.normalise=dataset, or have each annotator of a set compare all its responses (and "
                "rank.bridges=0 where several sets share a prompt)",
            )
    return pooled


def _heldout(context: Context[RankSettings], train: Strengths, deviation: float) -> list[Ranked]:
    """The held-out sets' strengths: their own comparisons, on the training sets' scale and parameter of ties."""
    settings = context.settings
    names: dict[str, int] = {}
    compared = compared_sets(_sets(context, "heldout"), "heldout.jsonl", names)
    if not compared:
        return []
    pooled = _pooled(context, "heldout", compared, names)
    strengths, _ = strengths_of(settings, pooled, train.tie_parameter)
    scaled = normalised(settings.normalise, strengths, pooled.pool_of_response, deviation)
    return pooled.share(strengths.elo, scaled)


def _write(context: Context[RankSettings], part: str, strengths: list[Ranked]) -> None:
    with (context.output / f"{part}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for record, ranked in zip(_sets(context, part), strengths, strict=True):
            file.write(
                to_line(
                    record,
                    strengths=ranked.strengths.tolist(),
                    standard_errors=ranked.standard_errors.tolist(),
                    elo=ranked.elo.tolist(),
                    pool=ranked.pool,
                )
            )


def _annotators(names: Sequence[str], crowd: Crowd) -> list[dict[str, Any]]:
    """The training part's, the least reliable first."""
    return [
        {"name": names[a], "reliability": crowd.reliability[a], "comparisons": crowd.comparisons[a]}
        for a in np.argsort(crowd.reliability, kind="stable")
        if crowd.comparisons[a] > 0
    ]


def _write_json(context: Context[RankSettings], name: str, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    (context.output / name).write_text(text + "\n", encoding="utf-8")
