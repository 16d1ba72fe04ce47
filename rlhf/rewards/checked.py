"""What a reward answered, believed only once it is one finite number a response."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from rlhf.errors import StageError


def checked_scores(answer: Callable[[], Any], source: str, count: int) -> list[float]:
    """Call ``answer`` and take its scores.

    source  the reward's name, for messages
    count   how many responses it was asked about

    Raises:
        StageError: it raised, or did not answer ``count`` finite numbers; the message names the first bad row.
    """
    try:
        answered = answer()
    except Exception as error:
        raise StageError(
            f"the reward raised {type(error).__name__}: {error}", source, "correct it; the run then goes on"
        ) from error
    try:
        scores = list(answered)
    except TypeError:
        kind = type(answered).__name__
        raise StageError(f"the reward answered {kind}, and no list of scores", source, "return a list") from None
    if len(scores) != count:
        raise StageError(
            f"the reward answered {len(scores)} scores for {count} responses", source, "return one score a response"
        )
    for row, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, Real) or not math.isfinite(score):
            raise StageError(
                f"the reward's score of response {row} is {score!r}, and no finite number",
                f"{source}, row {row}",
                "return finite numbers only",
            )
    return [float(score) for score in scores]
