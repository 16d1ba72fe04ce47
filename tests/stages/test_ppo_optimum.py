"""PPO finds the policy that mathematics says it should."""

import json
from pathlib import Path

import pytest

from benchmarks import arms
from benchmarks.closed_form import PROMPT, save_reference
from benchmarks.exact import distance_to_optimum
from rlhf.attempt.context import Context
from rlhf.config.ppo import PpoSettings

BETA = 0.5

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
    from stages import ppo

    reference, prompts, attempt, output = (tmp_path / name for name in ("reference", "prompts", "attempt", "output"))
    for folder in (prompts, attempt, output):
        folder.mkdir()
    save_reference(reference)
    (prompts / "train.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    settings = PpoSettings.model_validate(
        {
            "iterations": 60,
            "rollouts": 512,
            "sampling": {"max_new_tokens": 1},
            "rewards": [{"function": f"{arms.__file__}:bandit"}],
            "kl": {"coef": BETA},
            "missing_eos_penalty": 0,
            "whiten_advantages": False,
            "gae_lambda": 1,
            "value_init": "policy",
            "value_clip": None,
            "policy_learning_rate": 1e-2,
            "value_learning_rate": 1e-2,
            "micro_batch_size": 512,
            "checkpoint_every": 1000,
        }
    )
    context = Context(
        stage="ppo",
        key="key",
        settings=settings,
        inputs={"policy": reference, "prompts": prompts},
        output=output,
        attempt=attempt,
        cache=tmp_path,
        attempts=(attempt,),
        tracking={"mode": "disabled"},
    )
    before = distance_to_optimum(reference, reference, PROMPT, 1, arms.bandit, BETA)
    ppo.run(context)
    assert before > 0.2
    assert distance_to_optimum(output, reference, PROMPT, 1, arms.bandit, BETA) <= 0.03
