"""What scores responses under PPO: reward models, Python functions and endpoints, added up."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlhf.config.rewards import RewardSettings, role_of_model
from rlhf.config.training import Precision
from rlhf.models.reward import FrozenReward
from rlhf.models.text import Prompt
from rlhf.rewards.function import FunctionReward
from rlhf.rl.alarms import out_of_range
from rlhf.zero import group


class Rewards:
    """One score a response: the weighted sum of what each reward says.

    models  role to plain reward-model folder
    """

    def __init__(
        self,
        settings: Sequence[RewardSettings],
        models: Mapping[str, Path],
        precision: Precision,
        micro_batch_size: int,
    ) -> None:
        self._settings = settings
        self._parts: list[FrozenReward | FunctionReward] = []
        found = 0
        for one in settings:
            if one.function is not None:
                self._parts.append(FunctionReward(one.function))
            else:
                self._parts.append(FrozenReward(models[role_of_model(found)], precision, micro_batch_size))
                found += 1

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Scores ``[sample]``. A collective."""
        total = torch.zeros(len(responses))
        for one, part in zip(self._settings, self._parts, strict=True):
            if isinstance(part, FrozenReward):
                scores = part.score(prompts, responses)
            else:
                answered = group.from_main(lambda part=part: part(list(prompts), list(responses)))
                scores = (torch.tensor(answered) - one.mean) / one.std
            total += one.weight * scores
        return total

    def out_of_range(self, scores: Tensor) -> dict[str, float]:
        """``score/out_of_range``: the share of scores outside the range that the reward model gave its own data, where
        one reward model is all that scores and recorded that range.
        """
        match self._parts:
            case [FrozenReward(range=(low, high))]:
                return out_of_range(scores / self._settings[0].weight, low, high)
            case _:
                return {}
