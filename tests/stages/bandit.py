"""A bandit whose optimal policy is known, for algorithms that learn from a reward (:mod:`benchmarks.exact`)."""

import json
from pathlib import Path
from typing import Any

from benchmarks import arms
from benchmarks.closed_form import PROMPT, save_reference
from benchmarks.exact import distance_to_optimum
from rlhf.attempt.context import Context
from rlhf.config.policy_gradient import PolicyGradientSettings

BETA = 0.5


def bandit(tmp_path: Path, kind: type[PolicyGradientSettings], **settings: Any) -> Context[Any]:
    """Return a run of one token a response, with two arms that pay and a KL coefficient of ``BETA``."""
    reference, prompts, attempt, output = (tmp_path / name for name in ("reference", "prompts", "attempt", "output"))
    for folder in (prompts, attempt, output):
        folder.mkdir()
    save_reference(reference)
    (prompts / "train.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    common: dict[str, Any] = {
        "rollouts": 512,
        "sampling": {"max_new_tokens": 1},
        "rewards": [{"function": f"{arms.__file__}:bandit"}],
        "kl": {"coef": BETA},
        "missing_eos_penalty": 0,
        "policy_learning_rate": 1e-2,
        "micro_batch_size": 512,
        "checkpoint_every": 1000,
    }
    return Context(
        stage="bandit",
        key="key",
        settings=kind.model_validate(common | settings),
        inputs={"policy": reference, "prompts": prompts},
        output=output,
        attempt=attempt,
        cache=tmp_path,
        attempts=(attempt,),
        tracking={"mode": "disabled"},
    )


def distance(policy: Path, context: Context[Any]) -> float:
    """Return the total variation distance of a policy to the reference times exp(reward / β), normalised."""
    return distance_to_optimum(policy, context.inputs["policy"], PROMPT, 1, arms.bandit, BETA)
