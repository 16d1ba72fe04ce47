"""What a reward model's folder says of how good it is, and the checks that it must pass to be one."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rlhf.attempt.context import Context
from rlhf.config.stages import RmSettings
from rlhf.config.training import Precision
from rlhf.errors import StageError
from rlhf.ranking.quality import Document, quality
from rlhf.zero import group

CHECKED_ALONE = 8
"""Texts that are scored once more without padding."""
LARGEST_DIFFERENCE: dict[Precision, float] = {"fp32": 0.01, "bf16": 0.5}
"""Of a score with padding and without, in deviations; rounding to bf16 was seen to make 0.11 of it."""
NOTABLE_CORRELATION = 0.2
"""By how much scores may follow length more than people do before it is told."""
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def check_padding(
    alone: Callable[[Sequence[list[int]]], Tensor],
    texts: Sequence[list[int]],
    scores: Tensor,
    deviation: float,
    precision: Precision,
) -> None:
    """Refuse a model whose score of a text depends on what it was padded to, or on what shared its row. A collective.

    alone      scores texts one by one
    scores     of all texts, in batches
    deviation  of its scores of demonstrations

    Raises:
        StageError: it does.
    """
    # Sorted by length, batches hold texts of about one length: the shortest are padded least of all, the middle most.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    some = order[:: max(1, len(order) // CHECKED_ALONE)]
    difference = float((alone([texts[index] for index in some]) - scores[some]).abs().max()) / deviation
    if difference > LARGEST_DIFFERENCE[precision]:
        raise StageError(
            f"a text's score depends on the batch that it is in, by up to {difference:.2g} deviations",
            "the reward model",
            "its pad token may be read as text: give the tokenizer one of its own",
        )


def write_quality(
    context: Context[RmSettings],
    heldout: Sequence[Any],
    scores: Tensor,
    demonstrations: Tensor,
    texts: Sequence[list[int]],
) -> dict[str, float]:
    """Write ``quality.json`` and ``reliability.svg``, and return what of it belongs among the final metrics.

    heldout         held-out sets
    scores          raw, of their responses' ``texts``
    demonstrations  raw scores of the demonstrations
    """
    settings = context.settings
    found = quality(heldout, scores.numpy(), [len(text) for text in texts], settings.eval_pairs, settings.seed)
    mean, deviation = demonstrations.mean().item(), demonstrations.std().item()
    found["scores"] = {
        "quantiles": QUANTILES,
        "heldout": np.quantile((scores.numpy() - mean) / deviation, QUANTILES).tolist(),
        "demonstrations": np.quantile((demonstrations.numpy() - mean) / deviation, QUANTILES).tolist(),
    }
    if group.is_main():
        (context.output / "quality.json").write_text(json.dumps(found, indent=2) + "\n")
        if "calibration" in found:
            draw_reliability(found["calibration"], context.output / "reliability.svg")
        _warn_of_length(context, found["length_correlation"])
    group.barrier()
    shown = {
        "eval/accuracy_low": found["accuracy"].get("low"),
        "eval/accuracy_high": found["accuracy"].get("high"),
        "eval/kendall_tau": found.get("kendall_tau", {}).get("mean"),
        "eval/calibration_error": found.get("calibration", {}).get("expected_error"),
        "eval/human_accuracy": found["beside_people"]["all"].get("ties_half", {}).get("human"),
        "eval/human_accuracy_within": found["beside_people"]["within"].get("ties_half", {}).get("human"),
    }
    return {name: value for name, value in shown.items() if value is not None}


def _warn_of_length(context: Context[RmSettings], correlation: Document) -> None:
    scores, people = correlation["scores"], correlation["people"]
    if scores is not None and people is not None and abs(scores) > abs(people) + NOTABLE_CORRELATION:
        context.note(
            f"scores follow a response's length (Spearman {scores:+.2f}) more than people's ratings do "
            f"({people:+.2f}): PPO may learn to write to a length"
        )


def draw_reliability(calibration: Document, path: Path) -> None:
    """Draw how often a response was preferred against how often its score says so."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = calibration["bins"]
    # The same bytes from the same numbers: an artifact is named by its content.
    with mpl.rc_context({"svg.hashsalt": "reliability"}):
        figure = Figure(figsize=(4.5, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", label="as often as said")
        sizes = np.array([row["comparisons"] for row in rows])
        axes.scatter(
            [row["predicted"] for row in rows],
            [row["observed"] for row in rows],
            s=20 + 180 * sizes / sizes.max(),
            label="held-out comparisons (area: how many)",
        )
        axes.set(
            xlabel="how often the higher score is preferred, by the scores",
            ylabel="how often it was, by annotators",
            xlim=(0.48, 1.02),
            ylim=(0.3, 1.02),
            title=f"expected calibration error {calibration['expected_error']:.3f}",
        )
        axes.legend(loc="lower right", fontsize="small")
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
