"""The responses that a stage has collected so far, kept as they come: a killed run writes none of them twice."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.attempt.context import Context
from rlhf.data.jsonl import write_jsonl
from rlhf.data.records import ResponseSet
from rlhf.zero import group

JOURNAL = "written.jsonl"


class Written:
    """Texts by their sample's global index, from 0 on; every rank knows all of them, and rank 0 keeps them in a file.

    To make one is a collective. Of all attempts at the stage's key, the one that got furthest is continued.
    """

    def __init__(self, context: Context[Any]) -> None:
        self._path, self._output = context.attempt / JOURNAL, context.output
        self.texts: list[str] = group.from_main(lambda: self._take_up(context.attempts))

    def left(self, samples: range, at_once: int) -> Iterator[range]:
        """The samples that are not written yet, ``at_once`` a rank; earlier ones than ``samples`` must be there."""
        step = at_once * group.world_size()
        for first in range(max(samples.start, len(self.texts)), samples.stop, step):
            yield range(first, min(first + step, samples.stop))

    def add(self, texts: Sequence[str]) -> None:
        """Keep the next samples' texts."""
        self.texts += texts
        if group.is_main():
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(text) + "\n" for text in texts)

    def write(self, name: str, sets: Sequence[ResponseSet]) -> None:
        """Make a file of the result, once for all ranks."""
        if group.is_main():
            write_jsonl(self._output / name, sets)

    def _take_up(self, attempts: Sequence[Path]) -> list[str]:
        found = max((_read(attempt / JOURNAL) for attempt in attempts), key=len, default=[])
        self._path.write_text("".join(json.dumps(text) + "\n" for text in found), encoding="utf-8")
        return found


def _read(path: Path) -> list[str]:
    if not path.exists():
        return []
    # What a kill left half-written at the end is written again.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
