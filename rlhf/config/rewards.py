"""What scores responses: reward models, Python functions and HTTP endpoints, alone or added up."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import model_validator

from rlhf.config.base import Settings, runtime, semantic, source
from rlhf.config.services import ServiceSettings


class EndpointSettings(ServiceSettings):
    """An HTTP service that answers ``{"prompts": […], "responses": […]}`` with ``{"scores": […]}``."""

    batch_size: int = runtime(64, ge=1)
    """Rows of one request."""


class RewardSettings(Settings):
    """One reward: a model, a function or an endpoint. Without any of them it is the model of stage ``rm``."""

    model: str | None = semantic(None, min_length=1)
    """Stage whose reward model scores: text goes in, so it may have another size, architecture and tokenizer than the
    policy's."""
    function: str | None = source(None)
    """``file.py:name`` of a Python function ``reward(prompts, responses) -> list[float]``; its file's content is part
    of the key."""
    endpoint: EndpointSettings | None = semantic(None)
    """A service that scores."""
    weight: float = semantic(1.0, allow_inf_nan=False)
    """What the score is multiplied by before it is added to the others'."""
    mean: float = semantic(0.0, allow_inf_nan=False)
    """Subtracted from a function's or endpoint's scores; a reward model has a normaliser of its own."""
    std: float = semantic(1.0, gt=0, allow_inf_nan=False)
    """What they are then divided by."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_to_rm(cls, values: Any) -> Any:
        if isinstance(values, dict) and not any(values.get(name) for name in ("model", "function", "endpoint")):
            return values | {"model": "rm"}
        return values

    @model_validator(mode="after")
    def _is_one_thing(self) -> "RewardSettings":
        given = [name for name in ("model", "function", "endpoint") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"a reward is one of model, function and endpoint, and this one has {' and '.join(given)}")
        if self.function is not None and not names_a_function(self.function):
            raise ValueError(f"function {self.function!r} is not of the form file.py:name")
        if self.model is not None and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError("mean and std are for functions and endpoints; a reward model has its own normaliser")
        return self


def names_a_function(text: str) -> bool:
    """Tell whether a text is of the form ``file.py:name``."""
    file, colon, name = text.rpartition(":")
    return bool(colon) and file.endswith(".py") and name.isidentifier()


def rewards_are_sound(rewards: Sequence[RewardSettings]) -> None:
    """Raise ValueError where rewards cannot stand beside each other."""
    models = [reward.model for reward in rewards if reward.model]
    for model in models:
        if models.count(model) > 1:
            raise ValueError(f"reward model {model!r} is named twice; give it one entry and add the weights")
    if all(reward.weight == 0 for reward in rewards):
        raise ValueError("all rewards have weight 0, so there is nothing to learn")


def reward_inputs(rewards: Sequence[RewardSettings]) -> dict[str, str]:
    """The inputs of a stage that scores: role to instance. The first model's role is ``reward``."""
    models = [reward.model for reward in rewards if reward.model]
    return {role_of_model(index): model for index, model in enumerate(models)}


def role_of_model(index: int) -> str:
    """The role of the reward model ``index`` among the rewards that are models."""
    return "reward" if index == 0 else f"reward_{index + 1}"


def reward_sources(rewards: Sequence[RewardSettings]) -> dict[str, Path]:
    """The files with reward functions, whose content is part of the key."""
    return {
        f"rewards.{index}.function": Path(reward.function.rpartition(":")[0])
        for index, reward in enumerate(rewards)
        if reward.function is not None
    }
