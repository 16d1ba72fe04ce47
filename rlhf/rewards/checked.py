"""What a reward answered, believed only once it is one finite number a response."""

from collections.abc import Callable
from numbers import Real
from typing import Any

from rlhf.errors import RewardError

# Scores are added up in single precision, in which a larger number is infinite.
LARGEST = 3.4e38


def checked_scores(
    answer: Callable[[], Any], source: str, count: int, first: int = 0, name: str = "the reward"
) -> list[float]:
    """Call ``answer`` and take its scores.

    source  the reward's name, for messages
    count   how many responses it was asked about
    first   the row, in the whole batch, of the first of them
    name    what messages call who answers

    Raises:
        RewardError: it raised, or did not answer ``count`` finite numbers; the message names the first bad row.
    """
    rows = f"{source}, rows {first} to {first + count - 1}"
    try:
        answered = answer()
        # A generator runs the reward's code only here. Text is refused as a whole: its letters are no scores.
        scores = list(answered) if hasattr(answered, "__iter__") and not isinstance(answered, str | bytes) else None
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        # Signals end ranks in other ways: an interrupt that comes out of a reward is the reward's own.
        raise RewardError(f"{name} raised {_described(error)}", rows, f"correct {name}") from error
    if scores is None:
        kind = type(answered).__name__
        raise RewardError(f"{name} answered {kind}, and no list of scores", rows, "return a list of numbers")
    if len(scores) != count:
        raise RewardError(
            f"{name} answered {len(scores)} scores for {count} responses", rows, "return one score a response"
        )
    for row, score in enumerate(scores, start=first):
        if not _is_finite(score):
            raise RewardError(
                f"{name}'s score of response {row} is {_shortened(repr(score))}, and no finite number",
                f"{source}, row {row}",
                "return finite numbers only",
            )
    return [float(score) for score in scores]


def _is_finite(score: Any) -> bool:
    # Real takes in numpy's numbers, and also Python's truth values, which are no scores.
    if isinstance(score, bool) or not isinstance(score, Real):
        return False
    size: Any = abs(score)
    return bool(size <= LARGEST)


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {_shortened(str(error))}"
    except Exception:  # noqa: BLE001 - its __str__ is the user's code too
        return type(error).__name__


def _shortened(text: str, limit: int = 200) -> str:
    # Half a surrogate pair could not be written anywhere, and the error would be lost with it.
    text = " ".join(text.encode(errors="backslashreplace").decode().split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
