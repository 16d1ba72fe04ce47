"""GRPO and RLOO find the policy that mathematics says they should."""

from pathlib import Path
from typing import Any

import pytest

from rlhf.config.grpo import GrpoSettings, RlooSettings
from rlhf.tracking import read_metrics
from tests.stages.bandit import bandit, distance

pytestmark = [
    pytest.mark.slow,
    # DeepSpeed's and torch's own.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("kind", "settings"), [(GrpoSettings, {"deviation": "none", "average": "constant"}), (RlooSettings, {})]
)
def test_the_optimum_of_a_bandit_is_found(tmp_path: Path, kind: type[GrpoSettings], settings: dict[str, Any]) -> None:
    """The exported policy is the reference times exp(reward / β), normalised; without a deviation, which has no β."""
    from rlhf.stages import grpo

    context = bandit(tmp_path, kind, iterations=60, **settings)
    assert distance(context.inputs["policy"], context) > 0.2
    grpo.run(context)
    assert distance(context.output, context) <= 0.03
    rows = read_metrics(context.folder.metrics)
    assert len(rows) == 60
    assert all(0 <= row["groups/without_gradient"] <= 1 and "loss/value_avg" not in row for row in rows)
