"""An algorithm from another package: a settings class, a stage and its code, with no change here."""

from pathlib import Path

import pytest

from rlhf.config.pipeline import load_pipeline
from rlhf.pipeline.plan import plan
from rlhf.pipeline.stage import stages
from rlhf.store import Store
from tests.stages.bandit import bandit, distance
from tests.stages.reinforce import REINFORCE, ReinforceSettings, run


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
def test_it_finds_the_optimum_of_a_bandit(tmp_path: Path) -> None:
    """The exported policy is the reference times exp(reward / β), normalised: over every response, exactly."""
    context = bandit(tmp_path, ReinforceSettings, iterations=80)
    assert distance(context.inputs["policy"], context) > 0.2
    run(context)
    assert distance(context.output, context) <= 0.03
