"""Rank: a strength for each response, from annotators' comparisons.

In: comparison sets (``comparisons``: ``train.jsonl``, ``heldout.jsonl``), and those of earlier rounds.
Out: the same sets with ``strengths``, ``standard_errors`` and ``elo``, one number a response, and their ``pool``;
``scale.json``, with the Elo points of a strength of 1 and the parameter of ties; ``report.json``, the comparisons'
counts, agreement and flaws; ``leaderboard.json`` where training sets name the models that wrote the responses;
``annotators.json`` where annotators count by their reliability.

Every annotator's view of two responses is a comparison. Sets with the same prompt and ratings are one pool: their
responses are also compared across sets, by ratings alone, so that a set of good responses ranks above a set of bad
ones. One fit gives all strengths, which have mean 0 where comparisons join them; they are then normalised, held-out
ones by the training sets' scale. Sets of different tasks are never one pool, and a vote counts once whatever the weight
of its task. Left out: strengths across prompts.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rlhf.attempt.context import Context
from rlhf.config.data import RankSettings, ranked_inputs
from rlhf.data.records import ComparisonRow, read_jsonl, to_line
from rlhf.errors import RecordError
from rlhf.ranking.bradley_terry import Strengths
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
from rlhf.ranking.strengths import Crowd, strengths_of

MOST_NAMED = 5
"""Annotators that a message names."""


def run(context: Context[RankSettings]) -> dict[str, float]:
    """Rank every set; final metrics: ``sets``, ``responses``, ``comparisons``, ``tie_share``, ``agreement`` and
    ``deviation_elo``.
    """
    settings, file = context.settings, str(context.inputs["comparisons"] / "train.jsonl")
    names: dict[str, int] = {}
    train = compared_sets(_sets(context, "train"), "train.jsonl", names)
    known = report(_sets(context, "train"), train)
    for line in in_words(known):
        context.note(line)
    if settings.annotators == "reliability" and not names:
        raise RecordError(
            "rank.annotators is reliability, and there is no annotator: no set has ratings or rankings",
            file,
            "write what annotators said as ratings or rankings, with their names in annotators, or set "
            "rank.annotators=equal",
        )

    pooled = _pooled(settings, "train", train, names)
    strengths, crowd = strengths_of(settings, pooled)
    deviation = overall_deviation(strengths.elo)
    if deviation == 0:
        raise RecordError(
            "the annotators prefer no response to another in any set, so there is nothing to learn",
            file,
            "check that ratings differ, and that rankings run from best to worst",
        )
    scaled = normalised(settings.normalise, strengths, pooled.pool_of_response, deviation)
    _write(context, "train", pooled.share(strengths.elo, scaled))

    # Held-out sets have strengths by their own comparisons, on the training sets' scale and parameter of ties.
    ranked: list[Ranked] = []
    if heldout := compared_sets(_sets(context, "heldout"), "heldout.jsonl", names):
        unseen = _pooled(settings, "heldout", heldout, names)
        own, _ = strengths_of(settings, unseen, strengths.tie_parameter)
        ranked = unseen.share(own.elo, normalised(settings.normalise, own, unseen.pool_of_response, deviation))
    _write(context, "heldout", ranked)
    _write_reports(context, train, known, list(names), strengths, crowd, deviation)

    total = sum(compared.comparisons.total for compared in train)
    metrics = {
        "sets": float(len(train)),
        "responses": float(pooled.responses),
        "comparisons": total,
        "tie_share": float(sum(compared.comparisons.ties.sum() for compared in train)) / total,
        "deviation_elo": deviation,
    }
    agreement: float | None = known["krippendorff_alpha"]
    return metrics if agreement is None else metrics | {"agreement": agreement}


def _sets(context: Context[RankSettings], part: str) -> Iterator[ComparisonRow]:
    # Each use reads the files again: texts are large, and the comparisons that are kept are small.
    for role in ("comparisons", *ranked_inputs(context.settings)):
        yield from read_jsonl(context.inputs[role] / f"{part}.jsonl", ComparisonRow)


def _pooled(settings: RankSettings, part: str, compared: Sequence[ComparedSet], names: dict[str, int]) -> Pooled:
    """Return all comparisons of a part.

    Raises RecordError where ``normalise`` is ``annotator`` and an annotator compared only some of the joined responses.
    """
    pooled = pool(compared, settings.bridges, settings.seed)
    if settings.normalise == "annotator":
        partial = with_partial_views(pooled.responses, pooled.comparisons)
        if len(partial):
            named = [*names, "winners or bridges"]  # the last is NOBODY, which is -1
            shown = ", ".join(named[annotator] for annotator in partial[:MOST_NAMED])
            more = f" and {len(partial) - MOST_NAMED} more" if len(partial) > MOST_NAMED else ""
            raise RecordError(
                "rank.normalise is annotator, and not all annotators compared the same responses of a prompt: "
                f"{shown}{more} compared only some of those that others join",
                f"{part}.jsonl",
                "set rank.normalise=dataset, or have each annotator of a set compare all its responses (and "
                "rank.bridges=0 where several sets share a prompt)",
            )
    return pooled


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


def _write_reports(
    context: Context[RankSettings],
    train: Sequence[ComparedSet],
    known: dict[str, Any],
    names: Sequence[str],
    strengths: Strengths,
    crowd: Crowd | None,
    deviation: float,
) -> None:
    settings = context.settings
    scale: dict[str, Any] = {
        "model": settings.model,
        "normalise": settings.normalise,
        "deviation_elo": deviation,
        "prior_elo": settings.prior_elo,
        "ties": settings.ties,
    }
    if strengths.tie_parameter is not None:
        scale["tie_parameter"] = strengths.tie_parameter
    files: dict[str, Any] = {"scale": scale, "report": known}
    if crowd is not None:
        files["annotators"] = [  # of the training sets, the least reliable first
            {"name": names[a], "reliability": crowd.reliability[a], "comparisons": crowd.comparisons[a]}
            for a in np.argsort(crowd.reliability, kind="stable")
            if crowd.comparisons[a] > 0
        ]
    by_model = [
        (row.models, compared.comparisons)
        for row, compared in zip(_sets(context, "train"), train, strict=True)
        if row.models is not None
    ]
    if by_model:
        files["leaderboard"] = leaderboard(settings, by_model)
    for name, value in files.items():
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (context.output / f"{name}.json").write_text(text, encoding="utf-8")
