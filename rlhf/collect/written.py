"""What the ranks of ``collect`` have written so far. A file of its own: to annotate needs no torch, which ranks do."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.collect.collection import read_whole_lines
from rlhf.data.records import ResponseSet, write_jsonl
from rlhf.zero import group


class Written:
    """Texts by their sample's global index, from 0 on; every rank has all of them, and rank 0 keeps them in a file.

    Constructing it is a collective. Of all attempts at the stage's key, the one with the most texts is continued.
    """

    def __init__(self, context: Context[Any]) -> None:
        self._path, self._output = context.folder.written, context.output

        def continue_longest() -> list[str]:
            journals = [read_whole_lines(AttemptFolder(attempt).written) for attempt in context.attempts]
            texts: list[str] = max(journals, key=len, default=[])
            self._path.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
            return texts

        self.texts: list[str] = group.from_main(continue_longest)

    def left(self, samples: range, at_once: int) -> Iterator[range]:
        """Yield the samples without a text, ``at_once`` a rank; the samples before ``samples`` must have theirs."""
        step = at_once * group.world_size()
        for first in range(max(samples.start, len(self.texts)), samples.stop, step):
            yield range(first, min(first + step, samples.stop))

    def add(self, texts: Sequence[str]) -> None:
        """Keep the texts of the next samples."""
        self.texts += texts
        if group.is_main():
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(text) + "\n" for text in texts)

    def write(self, name: str, sets: Sequence[ResponseSet]) -> None:
        """Write a file of the result, on rank 0 only."""
        if group.is_main():
            write_jsonl(self._output / name, sets)
