"""Rewards of the closed-form checks. It stands alone: its content is part of a result's key."""

from collections.abc import Sequence
from itertools import pairwise


def bandit(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:  # noqa: ARG001 - a reward's signature
    """Two arms: ``a`` pays 1 and ``b`` a half; whatever else a model may answer pays nothing."""
    return [{"a": 1.0, "b": 0.5}.get(response, 0.0) for response in responses]


def chain(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:  # noqa: ARG001 - a reward's signature
    """Every ``b`` pays a third, and so does every change from one letter to another: order counts."""
    changes = [sum(one != other for one, other in pairwise(text)) for text in responses]
    return [(text.count("b") + change) / 3 for text, change in zip(responses, changes, strict=True)]
