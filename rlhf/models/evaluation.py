"""Measure policies and reward models: responses side by side, a judge, agreement with people.

The judge is a regression of people's ratings on a text's words, which no policy was trained to please. It is fitted on
ratings that the reward model has not seen and shares no weights with it, so a policy that exploits the reward model's
errors gains nothing here. Tf-idf weights over words (1-2-grams) measure content; those over characters within words
(2-5-grams) carry over to word forms never seen. Both are linear, so every rating can be traced to n-grams.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_union
from torch import Tensor

from rlhf.attempt.context import Context
from rlhf.config.stages import Precision, RmSettings
from rlhf.data.records import read_rows
from rlhf.errors import RecordError, StageError
from rlhf.ranking.quality import Document, quality
from rlhf.textstats import Floats, distinct_ngrams, paired_interval, win_rate
from rlhf.zero import group

_FOLDS = 5


class TextJudge:
    """Predict people's ratings of texts, fitted to one mean rating for each of ``texts``, on any scale.

    The strength of the ridge penalty ``alpha`` is the one with the smallest squared error over five folds of the texts.
    The n-grams' weights, which do not depend on ratings, are computed once for all folds. The same input gives the same
    judge.

    Raises:
        RecordError: there are fewer texts than folds.
    """

    def __init__(self, texts: Sequence[str], ratings: npt.ArrayLike) -> None:
        if len(texts) < _FOLDS:
            raise RecordError(
                f"the judge is fitted on at least {_FOLDS} rated texts, and there are {len(texts)}",
                next_step="give the judge's split more comparison sets with ratings",
            )
        self._features = make_union(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True),
        )
        search = GridSearchCV(
            Ridge(solver="lsqr"),
            # Powers of two around the best for texts of a sentence; all texts' features have length sqrt(2).
            {"alpha": [2.0**power for power in range(-3, 6)]},
            scoring="neg_mean_squared_error",
            cv=KFold(_FOLDS, shuffle=True, random_state=0),
        )
        search.fit(self._features.fit_transform(texts), np.asarray(ratings, dtype=np.float64))
        self._ridge: Ridge = search.best_estimator_
        self.alpha = float(self._ridge.alpha)

    def rate(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return a rating for each text, in the units of the ratings fitted to; rare extremes may leave their range.

        A text of unknown n-grams only, such as an empty text, gets the rating of an average text.
        """
        return self._ridge.predict(self._features.transform(texts)) if texts else np.empty(0)


def load_judge(folder: Path) -> TextJudge:
    """Return the judge fitted to a data set's ratings."""
    rows = read_rows(folder / "ratings.jsonl")
    return TextJudge([row["text"] for row in rows], [row["rating"] for row in rows])


def ratings(judge: TextJudge, texts: Sequence[Sequence[str]]) -> Floats:
    """Return a judge's ratings ``[P, R]`` of texts ``[R][P]``."""
    return np.stack([judge.rate(of_prompts) for of_prompts in texts], axis=1)


def side_by_side(name: str, values: Mapping[str, Floats]) -> dict[str, float]:
    """Return each policy's mean of a figure, and the mean of its difference from ``before``, with 95 % intervals.

    The difference of ``after`` is ``<name>/delta``, that of another policy ``<name>/<policy>_delta``. Intervals are
    Student's t over prompts, whose responses are averaged first, and paired for differences.

    values  ``[P, R]`` of each policy, ``before`` among them
    """
    of_prompts = {policy: np.mean(figures, axis=1) for policy, figures in values.items()}
    metrics: dict[str, float] = {}
    for policy, figures in of_prompts.items():
        differences = {} if policy == "before" else {"delta" if policy == "after" else f"{policy}_delta": "before"}
        for side, base in {policy: None, **differences}.items():
            less = 0 * figures if base is None else of_prompts[base]
            metrics[f"{name}/{side}"] = float(np.mean(figures - less))
            if len(figures) > 1:  # a single prompt has no interval
                interval = paired_interval(less, figures)
                metrics |= {f"{name}/{side}_low": interval.low, f"{name}/{side}_high": interval.high}
    return metrics


def win_rates(values: Mapping[str, Floats]) -> dict[str, float]:
    """Return how often a later policy's response is the better one than an earlier policy's, for each two of them.

    ``win/<later>_over_<earlier>``, a tie counted as half, with intervals ``_low`` and ``_high`` that hold together:
    with 95 % confidence all m true rates lie in theirs, since each misses its own with probability 0.05 / m at most
    (Bonferroni's inequality; Dunn 1961, Journal of the American Statistical Association 56:52). A prompt is one
    observation, the mean over its responses with the same random numbers.

    values  ``[P, R]`` of each policy, the higher the better
    """
    pairs = list(combinations(values, 2))
    metrics: dict[str, float] = {}
    for earlier, later in pairs:
        difference = np.sign(values[later] - values[earlier])
        rate = win_rate(((difference + 1) / 2).mean(axis=1).tolist(), 1 - 0.05 / len(pairs))
        name = f"win/{later}_over_{earlier}"
        metrics |= {name: rate.mean, f"{name}_low": rate.low, f"{name}_high": rate.high}
    return metrics


def diversity(texts: Mapping[str, list[str]]) -> dict[str, float]:
    """Return the distinct bigrams of each policy's texts, equally many of each."""
    return {f"distinct_2/{policy}": distinct_ngrams(of_policy, 2) for policy, of_policy in texts.items()}


def write_samples(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write the prompts with both responses and their scores, for the user to read."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


LARGEST_DIFFERENCE: dict[Precision, float] = {"fp32": 0.01, "bf16": 0.5}
"""Between a score with padding and without, in deviations; rounding to bf16 was seen to make 0.11 of it."""
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def check_padding(
    alone: Callable[[Sequence[list[int]]], Tensor],
    texts: Sequence[list[int]],
    scores: Tensor,
    deviation: float,
    precision: Precision,
) -> None:
    """Refuse, by a StageError, a model whose score of a text depends on the text's batch or row. A collective.

    alone      scores texts one by one
    scores     of all texts, in batches
    deviation  of the scores of demonstrations
    """
    # Eight texts of all lengths: batches are sorted by length, so the shortest are padded least and the middle most.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    sample = order[:: max(1, len(order) // 8)]
    difference = float((alone([texts[index] for index in sample]) - scores[sample]).abs().max()) / deviation
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
    """Write ``quality.json`` and ``reliability.svg``, and return their figures that belong to the final metrics.

    heldout         held-out sets
    scores          raw, of their responses' ``texts``
    demonstrations  raw scores of the demonstrations
    """
    settings = context.settings
    report = quality(heldout, scores.numpy(), [len(text) for text in texts], settings.eval_pairs, settings.seed)
    mean, deviation = demonstrations.mean().item(), demonstrations.std().item()
    report["scores"] = {
        "quantiles": QUANTILES,
        "heldout": np.quantile((scores.numpy() - mean) / deviation, QUANTILES).tolist(),
        "demonstrations": np.quantile((demonstrations.numpy() - mean) / deviation, QUANTILES).tolist(),
    }
    if group.is_main():
        (context.output / "quality.json").write_text(json.dumps(report, indent=2) + "\n")
        if "calibration" in report:
            draw_reliability(report["calibration"], context.output / "reliability.svg")
        ours, people = report["length_correlation"]["scores"], report["length_correlation"]["people"]
        if ours is not None and people is not None and abs(ours) > abs(people) + 0.2:
            context.note(
                f"scores follow a response's length (Spearman {ours:+.2f}) more than people's ratings do "
                f"({people:+.2f}): a policy may learn to write to a length"
            )
    group.barrier()
    metrics = {
        "eval/accuracy_low": report["accuracy"].get("low"),
        "eval/accuracy_high": report["accuracy"].get("high"),
        "eval/kendall_tau": report.get("kendall_tau", {}).get("mean"),
        "eval/calibration_error": report.get("calibration", {}).get("expected_error"),
        "eval/human_accuracy": report["beside_people"]["all"].get("ties_half", {}).get("human"),
        "eval/human_accuracy_within": report["beside_people"]["within"].get("ties_half", {}).get("human"),
    }
    return {name: value for name, value in metrics.items() if value is not None}


def draw_reliability(calibration: Document, path: Path) -> None:
    """Draw how often the response with the higher score was preferred, against how often the scores predict it."""
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
