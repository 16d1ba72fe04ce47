"""What scores responses under PPO: reward models, Python functions and endpoints, added up."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config.rewards import RewardSettings, role_of_model
from rlhf.config.training import Precision
from rlhf.models.reward import FrozenReward
from rlhf.models.text import Prompt
from rlhf.rewards.endpoint import EndpointReward
from rlhf.rewards.function import FunctionReward
from rlhf.rl.alarms import out_of_range
from rlhf.zero import group


class MainOnly:
    """A reward that rank 0 alone makes and asks: functions need not be safe to run twice, and endpoints cost.

    make  answers the reward, which answers one score a response. To make one is a collective
    """

    def __init__(self, make: Callable[[], Callable[[Sequence[Any], Sequence[str]], list[float]]]) -> None:
        self._reward: Callable[[Sequence[Any], Sequence[str]], list[float]] | None = None
        group.from_main(partial(self._keep, make))

    def _keep(self, make: Callable[[], Callable[[Sequence[Any], Sequence[str]], list[float]]]) -> None:
        self._reward = make()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Scores ``[sample]`` as the reward gave them. A collective."""

        def ask() -> list[float]:
            assert self._reward is not None, "only rank 0 asks"
            return self._reward(prompts, responses)

        return torch.tensor(group.from_main(ask))


class Rewards:
    """One score a response: the weighted sum of what each reward says. To make one is a collective.

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
        self._parts: list[FrozenReward | MainOnly] = []
        found = 0
        for one in settings:
            if one.function is not None:
                self._parts.append(MainOnly(partial(FunctionReward, one.function)))
            elif one.endpoint is not None:
                self._parts.append(MainOnly(partial(EndpointReward, one.endpoint)))
            else:
                self._parts.append(FrozenReward(models[role_of_model(found)], precision, micro_batch_size))
                found += 1

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Scores ``[sample]``. A collective.

        Raises:
            RewardError: on every rank, a function or endpoint raised, refused, or answered no scores.
            TryAgainError: on every rank, an endpoint could not be reached.
        """
        total = torch.zeros(len(responses))
        for one, part in zip(self._settings, self._parts, strict=True):
            # A model's mean and deviation are its own, and those of the settings are then 0 and 1.
            total += one.weight * (part.score(prompts, responses) - one.mean) / one.std
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
