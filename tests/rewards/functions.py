"""Reward functions as users write them, good and bad."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Taste:
    """A dataclass, which looks its module up among the loaded ones."""

    like: str


class OddError(Exception):
    """An error that only this file knows."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"odd: {one}, {two}")


def lengths(prompts: list[Any], responses: list[str]) -> list[float]:
    return [len(response) for response in responses]


def numbers(prompts: list[Any], responses: list[str]) -> Any:
    return np.arange(len(responses), dtype=np.float32)


def raises(prompts: list[Any], responses: list[str]) -> list[float]:
    raise OddError(1, 2)


class UnshowableError(Exception):
    """An error that cannot even be written down."""

    def __str__(self) -> str:
        raise self


def raises_what_cannot_be_shown(prompts: list[Any], responses: list[str]) -> list[float]:
    raise UnshowableError


def interrupts(prompts: list[Any], responses: list[str]) -> list[float]:
    raise KeyboardInterrupt


def exits(prompts: list[Any], responses: list[str]) -> list[float]:
    raise SystemExit(3)


def yields_and_raises(prompts: list[Any], responses: list[str]) -> Iterator[float]:
    yield 1.0
    raise OddError(1, 2)


def one_short(prompts: list[Any], responses: list[str]) -> list[float]:
    return [0.0] * (len(responses) - 1)


def nothing(prompts: list[Any], responses: list[str]) -> None:
    return None


def text(prompts: list[Any], responses: list[str]) -> str:
    return "1" * len(responses)


def nan_second(prompts: list[Any], responses: list[str]) -> list[Any]:
    return [0.0, float("nan"), *[0.0] * (len(responses) - 2)]


def text_second(prompts: list[Any], responses: list[str]) -> list[Any]:
    return [0.0, "1", *[0.0] * (len(responses) - 2)]


def bool_second(prompts: list[Any], responses: list[str]) -> list[Any]:
    return [0.0, True, *[0.0] * (len(responses) - 2)]


def none_second(prompts: list[Any], responses: list[str]) -> list[Any]:
    return [0.0, None, *[0.0] * (len(responses) - 2)]


def huge_second(prompts: list[Any], responses: list[str]) -> list[Any]:
    return [0.0, 10**400, *[0.0] * (len(responses) - 2)]


def takes_one(responses: list[str]) -> list[float]:
    return [0.0 for _ in responses]


no_function = 7
