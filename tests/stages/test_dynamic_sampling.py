"""Groups that teach nothing are replaced by those of further prompts, as often as the settings allow."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlhf.config.grpo import GrpoSettings
from rlhf.tracking import read_metrics
from tests.stages.bandit import bandit

pytestmark = [
    pytest.mark.slow,
    # DeepSpeed's and torch's own.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.usefixtures("group"),
]
REWARDS = """
def of_some(prompts, responses):
    return [float(response == "a") if prompt == "x" else 0.0 for prompt, response in zip(prompts, responses)]

def of_none(prompts, responses):
    return [0.5] * len(responses)
"""
GROUPS, SIZE = 8, 4


def trained(folder: Path, reward: str, most: int) -> tuple[Any, list[dict[str, Any]], list[dict[str, Any]]]:
    """Two iterations of a half of whose prompts no response is better; the context, metrics and what was learned."""
    from rlhf.stages import grpo

    folder.mkdir()
    (folder / "rewards.py").write_text(REWARDS)
    context = bandit(
        folder,
        GrpoSettings,
        iterations=2,
        rollouts=GROUPS * SIZE,
        responses_per_prompt=SIZE,
        rewards=[{"function": f"{folder / 'rewards.py'}:{reward}"}],
        kl={"coef": 0.0},
        dynamic_sampling=most,
        samples_kept=GROUPS * SIZE,
    )
    (context.inputs["prompts"] / "train.jsonl").write_text('{"prompt": "x"}\n{"prompt": "a"}\n')
    grpo.run(context)
    rows = [json.loads(line) for line in context.folder.samples.read_text().splitlines()]
    return context, read_metrics(context.folder.metrics), [row for row in rows if "watched" not in row]


def test_groups_of_equal_scores_are_replaced_and_the_others_stay(tmp_path: Path) -> None:
    """More are learned from; each is still of one prompt, and what had a gradient is where it was."""
    _, plainly, before = trained(tmp_path / "plainly", "of_some", 0)
    _, metrics, after = trained(tmp_path / "replaced", "of_some", 4)
    assert [row["groups/replaced"] for row in plainly] == [0, 0]
    assert all(row["groups/draws"] > 1 and row["groups/replaced"] >= GROUPS / 2 for row in metrics)
    for now, then in zip(metrics, plainly, strict=True):
        assert now["groups/without_gradient"] < then["groups/without_gradient"]
    for start in range(0, GROUPS * SIZE, SIZE):  # of the first iteration, whose policy is the same
        old, new = before[start : start + SIZE], after[start : start + SIZE]
        assert len({row["prompt"] for row in new}) == 1
        if len({row["score"] for row in old}) > 1:
            assert new == old


def test_where_nothing_has_a_gradient_draws_are_counted_and_end(tmp_path: Path) -> None:
    """All groups are replaced by others, as often as is allowed; then no weight moves."""
    context, metrics, _ = trained(tmp_path / "none", "of_none", 3)
    assert [row["groups/draws"] for row in metrics] == [3, 3]
    assert [row["groups/replaced"] for row in metrics] == [3 * GROUPS] * 2
    assert [row["groups/without_gradient"] for row in metrics] == [1, 1]
    trained_weights, reference = (
        load_file(folder / "model.safetensors") for folder in (context.output, context.inputs["policy"])
    )
    assert all(weight.equal(reference[name]) for name, weight in trained_weights.items())
