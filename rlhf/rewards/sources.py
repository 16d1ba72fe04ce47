"""The rewards that score responses under PPO: reward models, Python functions and endpoints, added up."""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config.rewards import RewardSettings, role_of_model
from rlhf.config.stages import Precision
from rlhf.errors import PreflightError
from rlhf.models.reward import FrozenReward
from rlhf.models.text import Prompt
from rlhf.rewards.service import EndpointReward, checked_scores
from rlhf.rl.alarms import out_of_range
from rlhf.zero import group


class FunctionReward:
    """The function ``name`` of a Python file, ``file.py:name``."""

    def __init__(self, named: str) -> None:
        self._named = named
        self._function = load_function(named)

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        """Return one score a response; errors are those of :func:`rlhf.rewards.service.checked_scores`."""
        return checked_scores(lambda: self._function(list(prompts), list(responses)), self._named, len(responses))


def load_function(named: str, what: str = "reward", takes: str = "prompts, responses") -> Callable[..., Any]:
    """Import the file, under a unique module name, and return the function.

    what   the function's use, for messages
    takes  its two arguments, for messages

    Raises:
        PreflightError: there is no such file or function, the file cannot be imported, or the function does not take
            two arguments.
    """
    file, _, name = named.rpartition(":")
    path = Path(file).expanduser().absolute()
    # The path is part of the name: files of two folders may have the same name.
    module_name = f"rlhf_{what}_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise PreflightError(f"there is no file {file} with a {what} function", str(path), "correct its path")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look up their module there.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise PreflightError(
            f"the file with the {what} function cannot be imported: {type(error).__name__}: {error}",
            str(path),
            f"python {path}",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise PreflightError(f"{file} has no function {name}", str(path), f"define {name}({takes}) there")
    try:
        with suppress(ValueError):  # written in C, it has no signature: the first call tells
            inspect.signature(function).bind([], [])
    except TypeError:
        message = f"{name} cannot be called with {takes}"
        raise PreflightError(message, str(path), f"define {name}({takes})") from None
    return function


Scorer = Callable[[Sequence[Any], Sequence[str]], list[float]]
"""Returns one score a response to prompts and responses."""


class MainOnly:
    """A reward that rank 0 alone makes and asks: functions need not be safe to run twice, and endpoints cost.

    The constructor is a collective.
    """

    def __init__(self, make: Callable[[], Scorer]) -> None:
        self._made: list[Scorer] = []  # empty on the other ranks
        group.from_main(lambda: self._made.append(make()))

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Return the reward's scores ``[sample]``. A collective."""
        return torch.tensor(group.from_main(lambda: self._made[0](prompts, responses)))


class Rewards:
    """One score a response: the weighted sum of all rewards. The constructor is a collective.

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
        number = 0
        for reward in settings:
            if reward.function is not None:
                self._parts.append(MainOnly(partial(FunctionReward, reward.function)))
            elif reward.endpoint is not None:
                self._parts.append(MainOnly(partial(EndpointReward, reward.endpoint)))
            else:
                self._parts.append(FrozenReward(models[role_of_model(number)], precision, micro_batch_size))
                number += 1

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Return the scores ``[sample]``. A collective.

        Raises:
            RewardError: on every rank, a function or endpoint raised, refused, or returned no scores.
            TryAgainError: on every rank, an endpoint could not be reached.
        """
        total = torch.zeros(len(responses))
        for reward, part in zip(self._settings, self._parts, strict=True):
            # A model has its own mean and deviation; those of the settings are then 0 and 1.
            total += reward.weight * (part.score(prompts, responses) - reward.mean) / reward.std
        return total

    def out_of_range(self, scores: Tensor) -> dict[str, float]:
        """Return ``score/out_of_range``: the share of scores outside the reward model's range on its own data.

        Empty unless a single reward model scores, and recorded that range.
        """
        match self._parts:
            case [FrozenReward(range=(low, high))]:
                return out_of_range(scores / self._settings[0].weight, low, high)
            case _:
                return {}
