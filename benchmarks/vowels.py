"""The reward of ``benchmarks.agreement``. It stands alone: its content is part of a result's key."""

from collections.abc import Sequence


def vowels(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:  # noqa: ARG001 - a reward's signature
    """The share of a response's letters that are vowels, 0 to 4."""
    return [4 * sum(map(text.count, "aeiou")) / max(1, len(text)) for text in responses]
