"""Settings of rewards: models, functions and services, and the services' endpoints."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import field_validator, model_validator

from rlhf.config.base import Settings, runtime, semantic, source

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class ServiceSettings(Settings):
    """Settings that all services share."""

    url: str = semantic()
    """Address that rows are posted to: https, or http on this machine."""
    version: str = semantic("")
    """Your name for the service's version: change it when its answers change, so that results of the old ones are no
    hits."""
    allowed_hosts: list[str] = runtime([])
    """Hosts that prompts and responses may be sent to; this machine is always allowed."""
    token_variable: str | None = runtime(None, min_length=1)
    """Environment variable with a bearer token; null sends none."""
    timeout_s: float = runtime(30.0, gt=0)
    """Seconds that one request may take."""
    retries: int = runtime(3, ge=0)
    """How often a request is repeated that reached no server, ran out of time, or was answered 429 or 5xx."""
    max_bytes: int = runtime(1 << 20, ge=64)
    """Longest answer that is read."""

    @field_validator("token_variable")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        # The value is not repeated: it may be the token.
        if value is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
            raise ValueError("it is the name of an environment variable, in capitals, and not the token itself")
        return value

    @model_validator(mode="after")
    def _host_is_allowed(self) -> "ServiceSettings":
        try:
            parts = urlsplit(self.url)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"url {self.url!r} is no address: {error}") from error
        host = parts.hostname or ""
        is_one_word = self.url.isprintable() and not any(map(str.isspace, self.url))
        if parts.scheme not in ("http", "https") or not host or port == 0 or not is_one_word:
            raise ValueError(f"url {self.url!r} is no http or https address")
        if parts.username or parts.password:
            raise ValueError("url holds a name or password; put a token into the environment and set token_variable")
        if host not in LOOPBACK and parts.scheme != "https":
            raise ValueError(f"url must be https for a host other than this machine, and it is {self.url!r}")
        if host not in LOOPBACK and host not in self.allowed_hosts:
            raise ValueError(f"prompts and responses would go to {host!r}; add it to allowed_hosts if they may")
        return self


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
    """Factor of the score in the sum of all rewards."""
    mean: float = semantic(0.0, allow_inf_nan=False)
    """Subtracted from a function's or endpoint's scores; a reward model has a normaliser of its own."""
    std: float = semantic(1.0, gt=0, allow_inf_nan=False)
    """Divides the scores after ``mean`` is subtracted."""

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
    """Return whether a text is of the form ``file.py:name``."""
    file, colon, name = text.rpartition(":")
    return bool(colon) and file.endswith(".py") and name.isidentifier()


def rewards_are_sound(rewards: Sequence[RewardSettings]) -> None:
    """Raise ValueError for rewards that cannot be added up."""
    models = [reward.model for reward in rewards if reward.model]
    for model in models:
        if models.count(model) > 1:
            raise ValueError(f"reward model {model!r} is named twice; give it one entry and add the weights")
    if all(reward.weight == 0 for reward in rewards):
        raise ValueError("all rewards have weight 0, so there is nothing to learn")


def reward_inputs(rewards: Sequence[RewardSettings]) -> dict[str, str]:
    """Return the reward models of a stage that scores, role to instance. The first model's role is ``reward``."""
    models = [reward.model for reward in rewards if reward.model]
    return {role_of_model(index): model for index, model in enumerate(models)}


def role_of_model(index: int) -> str:
    """Return the role of the reward model ``index``, counted from 0 among the rewards that are models."""
    return "reward" if index == 0 else f"reward_{index + 1}"


def reward_sources(rewards: Sequence[RewardSettings]) -> dict[str, Path]:
    """Return the files with reward functions, whose content is part of the key."""
    return {
        f"rewards.{index}.function": Path(reward.function.rpartition(":")[0])
        for index, reward in enumerate(rewards)
        if reward.function is not None
    }
