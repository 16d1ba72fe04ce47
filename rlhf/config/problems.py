"""Several mistakes in one pipeline file, reported together."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.errors import SettingsError

# Past these a reader starts over from the top anyway.
SHOWN = 5


@dataclass(frozen=True)
class Problem:
    """One mistake: what is wrong, where it was written, and what to write instead ("" where the rest says it)."""

    what: str
    where: str
    hint: str = ""


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise one SettingsError that shows the first five problems; do nothing where there are none."""
    if not problems:
        return
    if len(problems) == 1:
        raise SettingsError(problems[0].what, problems[0].where, problems[0].hint)
    lines = [f"{len(problems)} settings are wrong"]
    for problem in problems[:SHOWN]:
        hint = f" ({problem.hint})" if problem.hint else ""
        lines.append(f"  {problem.where}: {problem.what}{hint}")
    if len(problems) > SHOWN:
        lines.append(f"  and {len(problems) - SHOWN} more")
    raise SettingsError("\n".join(lines))
