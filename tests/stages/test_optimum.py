"""PPO, GRPO and RLOO find the policy that mathematics says they should."""

from pathlib import Path
from typing import Any

import pytest

from rlhf.config.grpo import GrpoSettings, RlooSettings
from rlhf.config.policy_gradient import PolicyGradientSettings
from rlhf.config.ppo import PpoSettings
from rlhf.tracking import read_metrics
from tests.stages.bandit import bandit, distance

pytestmark = [
    pytest.mark.slow,
    # DeepSpeed's and torch's own.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
PPO: dict[str, Any] = {
    "value_init": "policy",
    "whiten_advantages": False,
    "gae_lambda": 1,
    "value_clip": None,
    "value_learning_rate": 1e-2,
}
# A group's deviation would give each prompt a β of its own.
GRPO: dict[str, Any] = {"deviation": "none", "average": "constant"}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param(PpoSettings, PPO, id="ppo"),
        pytest.param(GrpoSettings, GRPO, id="grpo"),
        pytest.param(RlooSettings, {}, id="rloo"),
    ],
)
def test_the_optimum_of_a_bandit_is_found(
    tmp_path: Path, kind: type[PolicyGradientSettings], settings: dict[str, Any]
) -> None:
    """The exported policy is the reference times exp(reward / β), normalised: over every response, exactly."""
    from rlhf.stages import grpo, ppo

    context = bandit(tmp_path, kind, iterations=60, samples_kept=0, **settings)
    assert distance(context.inputs["policy"], context) > 0.2
    (ppo if kind is PpoSettings else grpo).run(context)
    assert distance(context.output, context) <= 0.03
    rows = read_metrics(context.folder.metrics)
    assert len(rows) == 60
    assert all(("loss/value_avg" in row) == (kind is PpoSettings) for row in rows)
    assert all(0 <= row.get("groups/without_gradient", 0) <= 1 for row in rows)
