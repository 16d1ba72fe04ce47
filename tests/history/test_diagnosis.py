"""What a run's figures are taken to mean: those of five real runs, four of them with a fault, and missing ones.

``faults.json`` has figures of configs/tiny.yaml as it is, with ``ppo.kl.coef`` 0, with PPO from the base model, with a
reward for length, and with all ratings negated; of samples the lengths.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.history.diagnosis import Figures, in_words, symptoms

RUNS: dict[str, Any] = json.loads((Path(__file__).parent / "faults.json").read_text())


def figures_of(name: str) -> Figures:
    run = RUNS[name]
    samples = [row | {"response": "x" * row["response"]} for row in run["samples"]]
    return Figures(**(run | {"samples": samples}))


@pytest.mark.parametrize(
    ("fault", "symptom", "words"),
    [
        ("kl.coef 0", "KL runs away", "Look first at PPO: kl.coef is 0"),
        ("EOS not learned", "Responses do not end", "Look first at SFT or its data: the policy does not write EOS"),
        ("length rewarded", "Score follows length", "Look first at reward model: longer responses score higher"),
        ("pairs flipped", "Score up, judge down", "the wrong way round"),
    ],
)
def test_a_planted_fault_is_the_first_thing_said(fault: str, symptom: str, words: str) -> None:
    run = figures_of(fault)
    found = symptoms(run)
    assert (found[0].name, found[0].holds) == (symptom, True)
    assert words in in_words(run, found)


def test_flipped_pairs_are_told_without_a_judge() -> None:
    """Labels agree with held-out labels that are flipped too; demonstrations, which people wrote, score low."""
    run = figures_of("pairs flipped")
    alone = replace(run, evaluate={})
    found = symptoms(alone)
    assert [symptom.name for symptom in found if symptom.holds] == ["Demonstrations score low"]
    assert "wrong way round" in in_words(alone, found)
    liked = replace(run, evaluate={"judge/delta_low": 0.1})
    assert not any(symptom.holds for symptom in symptoms(liked))


def test_a_healthy_run_has_no_symptom() -> None:
    run = figures_of("healthy")
    found = symptoms(run)
    assert {symptom.holds for symptom in found} == {False}
    assert "finds its responses better" in in_words(run, found)
    assert in_words(run, found).endswith("None of the symptoms below holds.")
    alone = replace(
        run, evaluate={}, iterations=[*run.iterations, {**run.iterations[-1], "alarm/eos": 1.0, "alarm/ratio": 0.0}]
    )
    words = in_words(alone, symptoms(alone))
    assert words.endswith("no judge has looked: rankings may be the wrong way round. Alarms were raised: eos.")


def test_over_optimisation_without_a_penalty_is_not_blamed_on_the_rankings() -> None:
    """Where KL ran away, a judge that falls follows from it; the reward model may be as good as it was."""
    run = figures_of("kl.coef 0")
    fallen = {"judge/delta": -1.0, "judge/delta_low": -1.3, "judge/delta_high": -0.7}
    found = symptoms(replace(run, evaluate={**run.evaluate, **fallen}))
    assert [symptom.name for symptom in found if symptom.holds][:2] == ["KL runs away", "Score up, judge down"]


def test_what_was_not_measured_is_not_known() -> None:
    """Without any figure nothing is claimed; figures that are not finite hold."""
    found = symptoms(Figures())
    assert {symptom.holds for symptom in found} == {None}
    assert in_words(Figures(), found) == "No stage has measured anything yet."
    half = Figures(sft=[{"step": 1, "loss": 7.0}, {"step": 2, "loss": 6.5}])
    assert in_words(half, symptoms(half)) == "SFT's loss went from 7 to 6.5 in 2 steps."
    diverged = Figures(iterations=[{"step": 1, "objective/kl": math.nan, "length/mean": 3.0}])
    assert [symptom.name for symptom in symptoms(diverged) if symptom.holds] == ["KL runs away"]
    assert "None of the symptoms" not in in_words(diverged, symptoms(diverged))
    values = [1.0, 2.0, 3.0, math.nan]
    lost = Figures(
        iterations=[{"step": step, "objective/scores": x, "policy/entropy_avg": x} for step, x in enumerate(values)]
    )
    assert {symptom.name for symptom in symptoms(lost) if symptom.holds} == {"Entropy collapses", "Score stands still"}


def test_scores_that_are_no_numbers_are_left_out() -> None:
    """A sample whose score is not finite says nothing about length."""
    rows = [{"step": 1, "score": score, "response": "x"} for score in (math.nan, "NaN", None, math.inf)]
    run = Figures(iterations=[{"step": 1, "length/mean": 3.0}], samples=rows)
    assert next(one for one in symptoms(run) if one.name == "Score follows length").holds is None
    huge = [{"step": 1, "score": score, "response": "x" * place} for place, score in enumerate((1e300, 2e300, 3e300))]
    follows = symptoms(Figures(iterations=[{"step": 1, "length/mean": 3.0}], samples=huge))
    assert "correlation of score and length 1.00" in next(one for one in follows if one.holds is False).figures


@pytest.mark.parametrize(("method", "setting"), [("GRPO", "mine.kl.coef"), ("DPO", "mine.beta")])
def test_what_is_said_names_the_last_stage_that_ran(method: str, setting: str) -> None:
    """And the settings of its instance; of DPO that which holds the policy near where it began."""
    fallen = {"judge/delta": -1.0, "judge/delta_low": -1.3, "judge/delta_high": -0.7}
    run = replace(figures_of("healthy"), method=method, instance="mine")
    run = replace(run, evaluate={**run.evaluate, **fallen})
    found = symptoms(run)
    words = in_words(run, found)
    assert f"iterations {method}'s mean score" in words
    assert f"or {method} has found its holes." in words
    assert words.endswith(f"then raise {setting}.")
    assert not any("ppo." in symptom.following.replace("docs/ppo.md", "") for symptom in found)
