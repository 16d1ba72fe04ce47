"""The arithmetic task: add two numbers of two digits, having seen the sums of people who err.

A sum is written with its lowest digit first, which a small model can learn to do in one pass. This file stands alone
because stages import it as their reward and judge, and its content is then part of the result's key.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

LETTERS = "0123456789+="
DEMONSTRATIONS = 4000
ERRING = 0.4
"""The share of the demonstrated sums with a wrong digit."""
SEED = 2000
HELDOUT = 500
"""Prompts that no stage trains on, of the 8,100 there are."""


def right(prompt: str) -> str:
    """The sum that a prompt such as ``37+58=`` asks for: ``59``, that is 95."""
    first, second = prompt.removesuffix("=").split("+")
    return str(int(first) + int(second))[::-1]


@cache
def task() -> tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Prompts to train on, prompts held out, and demonstrations as (prompt, sum); always the same ones."""
    random = np.random.RandomState(SEED)
    prompts = [f"{first}+{second}=" for first in range(10, 100) for second in range(10, 100)]
    prompts = [prompts[row] for row in random.permutation(len(prompts))]
    heldout, train = prompts[:HELDOUT], prompts[HELDOUT:]
    demonstrations: list[tuple[str, str]] = []
    for prompt in train[:DEMONSTRATIONS]:
        digits = list(right(prompt))
        if random.rand() < ERRING:
            place = random.randint(len(digits))
            digits[place] = str((int(digits[place]) + random.randint(1, 10)) % 10)
        demonstrations.append((prompt, "".join(digits)))
    return tuple(train), tuple(heldout), tuple(demonstrations)


def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """1 for the right sum, otherwise 0."""
    return [float(response == right(prompt)) for prompt, response in zip(prompts, responses, strict=True)]


def judge(prompt: str, responses: Sequence[str]) -> list[float]:
    """The same of several responses to one prompt, for the stage ``compare``."""
    return reward([prompt] * len(responses), responses)
