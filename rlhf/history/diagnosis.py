"""Say from a pipeline's figures what happened, and whether reward model, last stage or data are to be looked at.

Pure: figures in, symptoms out. A symptom holds or not, or is not known where its figures are missing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Row = Mapping[str, Any]
KL_PER_TOKEN = 2.0
"""Nats a token beyond which responses have little to do with the policy that training began with."""
ENDS_RARELY = 0.1
"""Share of responses that end, below which a policy has not learned to."""
FOLLOWS_LENGTH = 0.6
"""Correlation of score and length within iterations."""
GROWS = 1.25
"""Factor of mean length over a run."""
BELOW = 0.1
"""Deviations by which the demonstrations' median score lies below the ranked responses': beyond two standard errors of
some hundred texts."""


@dataclass(frozen=True)
class Figures:
    """What a pipeline's stages measured; empty where a stage has no result and no metrics yet."""

    sft: Sequence[Row] = ()
    iterations: Sequence[Row] = ()
    """Rows of metrics, by step; of the last stage where it samples."""
    rm: Mapping[str, float] = field(default_factory=dict[str, float])
    evaluate: Mapping[str, float] = field(default_factory=dict[str, float])
    """Final metrics."""
    quality: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The reward model's quality.json."""
    samples: Sequence[Row] = ()
    """The last stage's, with "step", "response" and "score"."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The last stage's."""
    method: str = "PPO"
    """The last stage, in prose."""
    instance: str = "ppo"
    """Its name in the pipeline."""

    @property
    def pull(self) -> str:
        """Return the setting that holds the policy near where it began."""
        return f"{self.instance}.{'beta' if self.method == 'DPO' else 'kl.coef'}"


@dataclass(frozen=True)
class Symptom:
    """Something that may be wrong with a run, with the figures that say so."""

    name: str
    holds: bool | None
    """None where its figures are missing."""
    figures: str
    meaning: str
    where: str
    """What to look at."""
    following: str
    """What to do next."""


def symptoms(run: Figures) -> list[Symptom]:
    """Return all symptoms, those that hold first; of these the one that explains most is the first."""
    ranked = [
        _score_follows_length(run),
        _never_ends(run),
        # Before the judge, which falls where KL runs away.
        _kl_runs_away(run),
        _score_against_judge(run),
        _demonstrations_score_low(run),
        _reward_model_guesses(run),
        _outside_of_its_data(run),
        _entropy_collapses(run),
        _score_stands_still(run),
        _sft_stands_still(run),
    ]
    return sorted(ranked, key=lambda symptom: {True: 0, False: 1, None: 2}[symptom.holds])


def in_words(run: Figures, found: Sequence[Symptom]) -> str:
    """Return a paragraph: what happened, and what to look at first."""
    parts: list[str] = []
    if run.sft and not (run.rm or run.iterations):
        first, last = run.sft[0], run.sft[-1]
        parts.append(f"SFT's loss went from {_n(first, 'loss')} to {_n(last, 'loss')} in {len(run.sft)} steps.")
    if run.iterations:
        first, last = run.iterations[0], run.iterations[-1]
        parts.append(
            f"Over {len(run.iterations)} iterations {run.method}'s mean score went from "
            f"{_n(first, 'objective/scores')} to {_n(last, 'objective/scores')}, "
            f"at a KL of {_n(last, 'objective/kl')} nats a response from its start."
        )
    if (delta := run.evaluate.get("judge/delta")) is not None:
        low, high = run.evaluate.get("judge/delta_low", math.nan), run.evaluate.get("judge/delta_high", math.nan)
        verdict = "better" if low > 0 else "worse" if high < 0 else "neither better nor worse for certain"
        parts.append(
            f"The judge, which no model was trained on, finds its responses {verdict}: {delta:+.2f} "
            f"(95 % interval {low:+.2f} to {high:+.2f})."
        )
    if (accuracy := run.rm.get("eval/accuracy")) is not None and not run.iterations:
        parts.append(f"The reward model orders {accuracy:.0%} of the held-out pairs as people do.")
    wrong = [symptom for symptom in found if symptom.holds]
    if wrong:
        parts.append(f"Look first at {wrong[0].where}: {wrong[0].meaning} Next: {wrong[0].following}.")
    elif run.iterations:
        unseen = (
            "" if "judge/delta" in run.evaluate else ", but no judge has looked: rankings may be the wrong way round"
        )
        parts.append(f"None of the symptoms below holds{unseen}.")
    raised = {name for row in run.iterations for name, value in row.items() if name.startswith("alarm/") and value}
    if raised:
        names = ", ".join(sorted(name.removeprefix("alarm/") for name in raised))
        parts.append(f"Alarms were raised: {names}.")
    return " ".join(parts) or "No stage has measured anything yet."


def _n(row: Row, name: str) -> str:
    value = row.get(name)
    return "unknown" if value is None else f"{value:.3g}"


def _never_ends(run: Figures) -> Symptom:
    rollouts = run.settings.get("rollouts")
    shares = [
        row["val/num_eos_tokens"] / rollouts for row in run.iterations if rollouts and "val/num_eos_tokens" in row
    ]
    limit = run.settings.get("sampling", {}).get("max_new_tokens")
    return Symptom(
        "Responses do not end",
        min(shares[0], shares[-1]) < ENDS_RARELY if shares else None,
        f"{shares[0]:.0%} ended within {limit} tokens at first, {shares[-1]:.0%} at last" if shares else "",
        "the policy does not write EOS: SFT has not learned it, or the room is too small.",
        "SFT or its data",
        f"train sft for longer on completions that are whole, or raise {run.instance}.sampling.max_new_tokens",
    )


def _score_against_judge(run: Figures) -> Symptom:
    names = ("score/before", "score/after", "judge/delta", "judge/delta_high")
    before, after, delta, high = (run.evaluate.get(name, math.nan) for name in names)
    known = not math.isnan(before + after + high)
    return Symptom(
        "Score up, judge down",
        after > before and high < 0 if known else None,
        f"score {before:+.2f} to {after:+.2f}, judge {delta:+.2f} (at most {high:+.2f})" if known else "",
        "what the reward model likes is not what the judge likes: its rankings may be the wrong way round, or "
        f"{run.method} has found its holes.",
        "reward model",
        f"look at rm's rankings (which response is `chosen`) and at the best samples, then raise {run.pull}",
    )


def _kl_runs_away(run: Figures) -> Symptom:
    kl, length = _last(run.iterations, "objective/kl"), _last(run.iterations, "length/mean")
    coef = run.settings.get("kl", {}).get("coef")
    rate = kl / max(1.0, length) if kl is not None and length is not None else None
    free = coef == 0 and kl is not None and kl > 1
    return Symptom(
        "KL runs away",
        None if rate is None else free or not rate <= KL_PER_TOKEN,
        f"{kl:.3g} nats a response, {rate:.2g} a token; kl.coef {coef}" if rate is not None else "",
        "nothing or too little holds the policy near where it began, so that it forgets how to write."
        if coef != 0
        else "kl.coef is 0: nothing holds the policy near where it began.",
        run.method,
        f"raise {run.pull}, or set a target for it (docs/ppo.md)",
    )


def _score_follows_length(run: Figures) -> Symptom:
    together = _correlation_with_length(run.samples)
    lengths = [row["length/mean"] for row in run.iterations if "length/mean" in row]
    growth = lengths[-1] / max(1.0, lengths[0]) if lengths else None
    return Symptom(
        "Score follows length",
        None if together is None or growth is None else together > FOLLOWS_LENGTH and growth > GROWS,
        f"correlation of score and length {together:.2f}; mean length {lengths[0]:.0f} to {lengths[-1]:.0f} tokens"
        if together is not None and lengths
        else "",
        "longer responses score higher, and responses grow: the reward may pay for length.",
        "reward model",
        "compare scores of short and long responses in the samples; balance lengths in the rankings, or clip the score",
    )


def _correlation_with_length(samples: Sequence[Row]) -> float | None:
    """Return the mean over iterations of the correlation of scores with numbers of characters."""
    by_step: dict[int, list[tuple[float, float]]] = {}
    for row in samples:
        score = row["score"]
        if isinstance(score, (int, float)) and math.isfinite(score) and "step" in row:
            by_step.setdefault(row["step"], []).append((score, len(str(row["response"]))))
    correlations: list[float] = []
    for pairs in by_step.values():
        scores, lengths = np.array(pairs).T
        scores = scores / max(1.0, np.abs(scores).max())  # whose squares may be infinite
        if len(pairs) > 2 and scores.std() > 0 and lengths.std() > 0:
            correlations.append(float(np.corrcoef(scores, lengths)[0, 1]))
    return float(np.mean(correlations)) if correlations else None


def _demonstrations_score_low(run: Figures) -> Symptom:
    """Compare the reward model with what people wrote: no agreement among labels tells that all of them are flipped."""
    scores = run.quality.get("scores", {})
    known = {"quantiles", "demonstrations", "heldout"} <= scores.keys() and 0.5 in scores["quantiles"]
    median = scores["quantiles"].index(0.5) if known else 0
    written, ranked = (scores[name][median] if known else math.nan for name in ("demonstrations", "heldout"))
    liked = run.evaluate.get("judge/delta_low", math.nan) > 0
    return Symptom(
        "Demonstrations score low",
        written < ranked - BELOW and not liked if known else None,
        f"median {written:+.2f}, of held-out ranked responses {ranked:+.2f}" if known else "",
        "the reward model likes demonstrations less than the responses that people ranked: its rankings may be the "
        "wrong way round.",
        "reward model",
        "look at which response of rm's rankings is `chosen`, and let a judge look (docs/evaluate.md)",
    )


def _reward_model_guesses(run: Figures) -> Symptom:
    accuracy, low = run.rm.get("eval/accuracy"), run.rm.get("eval/accuracy_low")
    people = run.rm.get("eval/human_accuracy")
    beside = f", people {people:.0%}" if people is not None else ""
    return Symptom(
        "Reward model guesses",
        None if low is None else low <= 0.5,
        f"orders {accuracy:.0%} of held-out pairs (at least {low:.0%}){beside}" if low is not None else "",
        "on held-out rankings the reward model is not surely better than chance.",
        "reward model",
        "train rm for longer or on more rankings, and look at people's own agreement in rank",
    )


def _outside_of_its_data(run: Figures) -> Symptom:
    share = _last(run.iterations, "score/out_of_range")
    return Symptom(
        "Scores beyond the reward model's data",
        None if share is None else share > 0.1,
        "" if share is None else f"{share:.0%} of the last iteration's scores",
        "the policy writes what the reward model has seen nothing like, and its scores are guesses there.",
        run.method,
        f"take an earlier iteration, raise {run.pull}, or set {run.instance}.score_clip",
    )


def _entropy_collapses(run: Figures) -> Symptom:
    entropies = [row["policy/entropy_avg"] for row in run.iterations if "policy/entropy_avg" in row]
    return Symptom(
        "Entropy collapses",
        not entropies[-1] >= 0.1 * entropies[0] if entropies else None,
        f"{entropies[0]:.2g} to {entropies[-1]:.2g} nats a token" if entropies else "",
        "the policy gives nearly the same response to every prompt.",
        run.method,
        f"lower {run.instance}.policy_learning_rate, raise {run.pull}, or set {run.instance}.entropy_bonus",
    )


def _score_stands_still(run: Figures) -> Symptom:
    means = _first_and_last_third(run.iterations, "objective/scores")
    return Symptom(
        "Score stands still",
        None if means is None else not means[1] > means[0],
        _from_third_to_third(means),
        f"{run.method} does not raise the score.",
        run.method,
        f"raise {run.instance}.policy_learning_rate or {run.instance}.rollouts, and lower {run.pull}",
    )


def _sft_stands_still(run: Figures) -> Symptom:
    means = _first_and_last_third(run.sft, "loss")
    return Symptom(
        "SFT's loss stands still",
        None if means is None else not means[1] < means[0],
        _from_third_to_third(means),
        "SFT does not learn its demonstrations.",
        "SFT or its data",
        "look at sft.optimizer.learning_rate and at the demonstrations",
    )


def _first_and_last_third(rows: Sequence[Row], name: str) -> tuple[float, float] | None:
    """Return a metric's means over the first and the last third of a run; None where it has fewer than three values."""
    values = [row[name] for row in rows if name in row]
    third = len(values) // 3
    return (float(np.mean(values[:third])), float(np.mean(values[-third:]))) if third else None


def _from_third_to_third(means: tuple[float, float] | None) -> str:
    return "" if means is None else f"{means[0]:.3g} in the first third, {means[1]:.3g} in the last"


def _last(rows: Sequence[Row], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if name in row), None)
