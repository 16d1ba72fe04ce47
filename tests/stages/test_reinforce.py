"""An algorithm from another package: a settings class, a stage and its code, with no change here."""

import json
from pathlib import Path

import pytest

from benchmarks import arms
from benchmarks.closed_form import PROMPT, save_reference
from benchmarks.exact import distance_to_optimum
from rlhf.attempt.context import Context
from rlhf.config.loading import load_pipeline
from rlhf.pipeline.plan import plan
from rlhf.pipeline.stage import stages
from rlhf.store import Store
from tests.stages.reinforce import REINFORCE, ReinforceSettings, run

BETA = 0.5


def test_the_plan_has_the_stage_with_its_settings_and_inputs(tmp_path: Path) -> None:
    """A misspelt setting is refused by its name."""
    known = stages() | {"reinforce": REINFORCE}
    file = tmp_path / "pipeline.yaml"
    file.write_text("data: {}\nmodel: {}\nrank: {}\nsft: {}\nrm: {}\nreinforce: {baseline_decay: 0.5}\n")
    config = load_pipeline(file, [], {name: stage.settings for name, stage in known.items()})
    planned = plan(config, known, Store.open(tmp_path / "store"), ["reinforce"])
    assert list(planned)[-1] == "reinforce"
    assert planned["reinforce"].settings["baseline_decay"] == 0.5
    assert planned["reinforce"].state == "blocked"
    assert "sft" in planned


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("seed", [0, 1])
def test_it_finds_the_optimum_of_a_bandit(tmp_path: Path, seed: int) -> None:
    """The exported policy is the reference times exp(reward / β), normalised: over every response, exactly."""
    reference, prompts, attempt, output = (tmp_path / name for name in ("reference", "prompts", "attempt", "output"))
    for folder in (prompts, attempt, output):
        folder.mkdir()
    save_reference(reference)
    (prompts / "train.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    settings = ReinforceSettings.model_validate(
        {
            "seed": seed,
            "iterations": 80,
            "rollouts": 512,
            "sampling": {"max_new_tokens": 1},
            "rewards": [{"function": f"{arms.__file__}:bandit"}],
            "kl": {"coef": BETA},
            "value_init": "policy",
            "policy_learning_rate": 1e-2,
            "micro_batch_size": 512,
            "checkpoint_every": 1000,
        }
    )
    context = Context(
        stage="reinforce",
        key="key",
        settings=settings,
        inputs={"policy": reference, "prompts": prompts},
        output=output,
        attempt=attempt,
        cache=tmp_path,
        attempts=(attempt,),
        tracking={"mode": "disabled"},
    )
    assert distance_to_optimum(reference, reference, PROMPT, 1, arms.bandit, BETA) > 0.2
    run(context)
    assert distance_to_optimum(output, reference, PROMPT, 1, arms.bandit, BETA) <= 0.03
