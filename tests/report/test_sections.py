"""What a stage's figures become on the page."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.ranking.quality import quality
from rlhf.report import sections as report_sections
from rlhf.report.sections import sections

TWO = {"score/before": 0.0, "score/after": 1.0, "score/delta": 1.0, "score/delta_low": 0.5, "score/delta_high": 1.5}
LENGTHS = {"length/before": 9.0, "length/after": 9.0, "length/ppo": 8.0, "length/best_of_4": 7.0}
MANY = {
    "score/before": 0.0,
    "score/ppo": 1.25,
    "score/best_of_4": 0.75,
    "kl/ppo": 3.5,
    "kl/best_of_4": 0.636,
    "win/ppo_over_before": 0.75,
    "win/ppo_over_before_low": 0.5,
    "win/ppo_over_before_high": 0.9,
}


def parts(metrics: dict[str, float]) -> dict[str, Any]:
    stage = SimpleNamespace(stage=SimpleNamespace(name="evaluate"))
    history: Any = SimpleNamespace(name="e", planned=stage, record=SimpleNamespace(metrics=metrics), attempts=[])
    (section,) = sections(history, store=None)  # type: ignore[arg-type] - evaluate reads nothing of it
    return {part["title"]: part for part in section["parts"]}


def test_several_policies_stand_side_by_side_and_over_their_kl() -> None:
    """A column each, their win rates, and a point each of the frontier; before and after alone have a difference."""
    many = parts(MANY | {name: LENGTHS[name] for name in ("length/before", "length/ppo", "length/best_of_4")})
    table = many["Policies side by side, with 95 % intervals"]
    assert table["header"] == ("", "before", "ppo", "best_of_4")
    assert ["score", "0.00", "1.25", "0.75"] in table["rows"]
    assert ["KL, nats a response", "", "3.50", "0.64"] in table["rows"]
    assert ["ppo over before", "0.75 (0.50 to 0.90)"] in many["Win rates, with intervals that hold together at 95 %"][
        "rows"
    ]
    values = json.dumps(many["Frontier"]["spec"])
    assert all(f'"run": "{name}"' in values for name in ("before", "ppo", "best_of_4"))
    assert '"kl": 3.5, "score": 1.25' in values

    two = parts(TWO | {name: LENGTHS[name] for name in ("length/before", "length/after")})
    assert "Frontier" not in two
    table = two["Before and after, with 95 % intervals"]
    assert ["score", "0.00", "1.00", "+1.00 (+0.50 to +1.50)"] in table["rows"]


@pytest.mark.parametrize("number", [1, 2, 3, 12])
def test_few_heldout_sets_have_sections_too(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """One set has no interval, and quarters of few pairs may be empty; no figure of theirs is missed."""
    sets = [{"responses": ["a", "b", "c"], "strengths": [1.0, 0.0, -1.0], "pool": pool} for pool in range(number)]
    measured = quality(sets, [2.0, 1.0, 0.5] * number, [3, 4, 5] * number, n_pairs=20, seed=0)
    monkeypatch.setattr(report_sections, "result_file", lambda *_: measured)
    stage = SimpleNamespace(stage=SimpleNamespace(name="rm"))
    history: Any = SimpleNamespace(name="rm", planned=stage, record=None, metrics=[], attempts=[])
    titles = [part["title"] for (section,) in [sections(history, store=None)] for part in section["parts"]]  # type: ignore[arg-type]
    assert "Accuracy beside people" in titles
