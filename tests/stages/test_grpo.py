"""GRPO and RLOO find the policy that mathematics says they should, and a killed run goes on as if it had not been."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

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


@pytest.mark.usefixtures("group")
def test_a_killed_run_goes_on_as_if_unbroken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights bit for bit, and every row but its times, with groups, KL coefficient and optimiser as they were."""
    from rlhf.stages import grpo

    small = {"iterations": 4, "rollouts": 32, "checkpoint_every": 1, "minibatches": 2}
    kl = {"kl": {"coef": 0.5, "target": 0.01, "horizon": 64}}
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole, broken = (bandit(tmp_path / name, GrpoSettings, **small, **kl) for name in ("whole", "broken"))
    grpo.run(whole)

    iterate = grpo.iterate

    def killed(iteration: int, *arguments: Any) -> None:
        if iteration == 2:
            raise InterruptedError
        iterate(iteration, *arguments)

    monkeypatch.setattr(grpo, "iterate", killed)
    with pytest.raises(InterruptedError):
        grpo.run(broken)
    monkeypatch.setattr(grpo, "iterate", iterate)
    grpo.run(broken)

    ours, others = (load_file(context.output / "model.safetensors") for context in (broken, whole))
    assert all(weight.equal(others[name]) for name, weight in ours.items())
    rows = [
        [
            {name: value for name, value in row.items() if not name.startswith(("time", "perf/"))}
            for row in read_metrics(context.folder.metrics)
        ]
        for context in (broken, whole)
    ]
    assert len(rows[0]) == 4
    assert rows[0] == rows[1]
