"""What several rewards say together, with models whose scores are made up."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf import rewards
from rlhf.config.rewards import EndpointSettings, RewardSettings
from rlhf.models.micro_batches import MicroBatch
from rlhf.zero import group

PROMPTS, RESPONSES = ["a", "bb", "ccc"], ["xxxx", "y", "zz"]


class MadeUpModel:
    """Its folder's name times the response's length, of which the range is known or not."""

    def __init__(self, folder: Path, precision: str, micro_batch: MicroBatch, *_: object, **__: object) -> None:
        assert (precision, micro_batch) == ("bf16", MicroBatch(4))
        self._factor = float(folder.name)
        self.range = (1.0, 3.0) if folder.parent.name == "ranged" else None

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        assert prompts == PROMPTS
        return torch.tensor([self._factor * len(response) for response in responses])


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "FrozenReward", MadeUpModel)
    monkeypatch.setattr(group, "from_main", lambda make: make())


def summed(settings: list[RewardSettings], **models: str) -> rewards.Rewards:
    return rewards.Rewards(settings, {role: Path(folder) for role, folder in models.items()}, "bf16", MicroBatch(4))


def test_rewards_add_up_with_their_weights_means_and_deviations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each model is that of its own role, whatever stands between; a function is asked with prompts and responses."""
    (tmp_path / "mine.py").write_text(
        "def reward(prompts, responses):\n"
        "    return [10.0 * len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]\n"
    )

    def endpoint(_: EndpointSettings) -> Any:
        return lambda prompts, responses: [100.0 * len(p) - len(r) for p, r in zip(prompts, responses, strict=True)]

    monkeypatch.setattr(rewards, "EndpointReward", endpoint)
    total = summed(
        [
            RewardSettings(model="rm", weight=0.5),
            RewardSettings(function=f"{tmp_path / 'mine.py'}:reward", weight=-3.0, mean=7.0, std=4.0),
            RewardSettings(endpoint=EndpointSettings(url="http://localhost:1/"), weight=2.0, mean=-1.0, std=0.5),
            RewardSettings(model="pmp", weight=5.0),
        ],
        reward="plain/2",
        reward_2="plain/3",
    )
    expected = [
        0.5 * 2 * len(response)
        - 3 * (10 * len(prompt) + len(response) - 7) / 4
        + 2 * (100 * len(prompt) - len(response) + 1) / 0.5
        + 5 * 3 * len(response)
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    assert total.score(PROMPTS, RESPONSES).tolist() == pytest.approx(expected)
    assert total.out_of_range(torch.tensor([0.0])) == {}


def test_scores_outside_the_one_models_own_range_are_counted_before_its_weight() -> None:
    """The range is of the model's scores: with a weight of -2, those from -6 to -2 are inside."""
    one = summed([RewardSettings(model="rm", weight=-2.0)], reward="ranged/1")
    assert one.out_of_range(torch.tensor([-6.0, -2.0, -1.9, -6.1, 4.0])) == {"score/out_of_range": 3 / 5}
    assert summed([RewardSettings(model="rm")], reward="plain/1").out_of_range(torch.tensor([9.0])) == {}
