"""PPO finds the policy that mathematics says it should."""

from pathlib import Path

import pytest

from rlhf.config.ppo import PpoSettings
from tests.stages.bandit import bandit, distance

pytestmark = [
    pytest.mark.slow,
    # DeepSpeed's and torch's own.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.mark.usefixtures("group")
def test_ppo_finds_the_optimum_of_a_bandit(tmp_path: Path) -> None:
    """The exported policy is the reference times exp(reward / β), normalised: over every response, exactly."""
    from rlhf.stages import ppo

    learning = {
        "value_init": "policy",
        "whiten_advantages": False,
        "gae_lambda": 1,
        "value_clip": None,
        "value_learning_rate": 1e-2,
    }
    context = bandit(tmp_path, PpoSettings, iterations=60, **learning)
    assert distance(context.inputs["policy"], context) > 0.2
    ppo.run(context)
    assert distance(context.output, context) <= 0.03
