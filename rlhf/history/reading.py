"""Read what the runs of a pipeline left: states, attempts, metrics, samples, notes, failures.

Everything comes out of the store, also while another machine writes it, and nothing is written. Files of an attempt may
be cut, damaged or gone: lines that cannot be read are left out and counted. A text in them may hold any characters.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlhf.attempt.folder import AttemptFolder, Progress
from rlhf.errors import RlhfError
from rlhf.pipeline.documents import stage_status
from rlhf.pipeline.plan import Planned
from rlhf.pipeline.uploads import attempt_names, read_from_attempt
from rlhf.store import ActionRecord, Store
from rlhf.tracking import MetricsRow, with_floats

Row = dict[str, Any]
SAMPLES = "samples.jsonl"
"""The file of a report's artifact."""


@dataclass(frozen=True)
class Lines:
    """The rows of a file of JSON lines that could be read."""

    rows: tuple[Row, ...] = ()
    damaged: int = 0
    """Lines that were left out. A last line without its end does not count while the file is being written."""

    @classmethod
    def parse(cls, data: bytes | None) -> "Lines":
        """Read the lines of a file, which need not exist."""
        # Split as bytes: a text that a model wrote may contain line ends of other alphabets.
        *lines, cut = (data or b"").split(b"\n")
        rows = [_object(line) for line in lines]
        whole = tuple(row for row in rows if row is not None)
        return cls(whole, len(rows) - len(whole) + bool(cut))

    def only(self, rows: Iterable[Row]) -> "Lines":
        """Keep the rows given, and count the others as damaged."""
        kept = tuple(rows)
        return Lines(kept, self.damaged + len(self.rows) - len(kept))


def _object(line: bytes) -> Row | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@dataclass(frozen=True)
class AttemptHistory:
    """One attempt at a key. Each file is read when it is first asked for, and once."""

    store: Store
    key: str
    name: str

    def _read(self, name: str) -> bytes | None:
        return read_from_attempt(self.store, self.key, self.name, name)

    def _value(self, name: str, parse: Any) -> Any:
        data = self._read(name)
        try:
            return None if data is None else parse(data.decode())
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    @cached_property
    def _folder(self) -> AttemptFolder:
        return AttemptFolder(self.store.root / "work" / self.key / self.name)

    @cached_property
    def metrics(self) -> Lines:
        """Rows as of ``read_metrics`` in rlhf/tracking.py: an int "step", a "time", and numbers, finite or not."""
        lines = Lines.parse(self._read(self._folder.metrics.name))
        return lines.only(row for line in lines.rows if (row := _metrics_row(line)) is not None)

    @cached_property
    def samples(self) -> Lines:
        """Rows with an int "step", "prompt", "response" and "score"; other fields may be missing."""
        lines = Lines.parse(self._read(self._folder.samples.name))
        return lines.only(row for row in lines.rows if _is_sample(row))

    @cached_property
    def newest_samples(self) -> tuple[Row, ...]:
        """The samples of the last step, of the last 64 rows at most: a file of all steps may be large."""
        tail = (self._read(self._folder.samples.name) or b"").rsplit(b"\n", 65)[-65:]
        rows = [row for row in Lines.parse(b"\n".join(tail)).rows if _is_sample(row)]
        return tuple(row for row in rows if row["step"] == rows[-1]["step"])

    @cached_property
    def notes(self) -> Lines:
        """Rows with a "note", a line for the user."""
        lines = Lines.parse(self._read(self._folder.note_lines.name))
        return lines.only(row for row in lines.rows if isinstance(row.get("note"), str))

    @cached_property
    def progress(self) -> Progress | None:
        """How far it is or was; None before its first report."""
        return self._value(self._folder.PROGRESS, Progress.parse)

    @cached_property
    def failure(self) -> RlhfError | None:
        """The error that ended it; None for one that runs, succeeded, or was killed or interrupted."""
        return self._value(self._folder.FAILURE, self._folder.error.parse)


def _metrics_row(line: Row) -> MetricsRow | None:
    row = with_floats(line)
    if type(row.get("step")) is not int:
        return None
    return {name: value for name, value in row.items() if name == "time" or _is_number(value)}


def _is_number(value: Any) -> bool:
    """Return whether a value is a float, or a whole number that one can hold; NaN and infinity are numbers here."""
    return isinstance(value, float) or (isinstance(value, int) and value.bit_length() < sys.float_info.max_exp)


def _is_sample(row: Row) -> bool:
    return type(row.get("step")) is int and {"prompt", "response", "score"} <= row.keys()


@dataclass(frozen=True)
class StageHistory:
    """A stage instance of a pipeline: its state, and the attempts at its present key."""

    planned: Planned
    state: str
    """cached, missing, blocked or unused as in the plan; or running, or failed."""
    why: str
    attempts: tuple[AttemptHistory, ...]
    """Oldest first; none where there is no key yet, or garbage collection has removed them."""

    @property
    def name(self) -> str:
        """The instance's name."""
        return self.planned.name

    @property
    def record(self) -> ActionRecord | None:
        """The action record of its result; None where there is no result yet."""
        return self.planned.record

    @cached_property
    def metrics(self) -> tuple[MetricsRow, ...]:
        """The metrics of all attempts as one run; several rows may share a step."""
        return joined([attempt.metrics.rows for attempt in self.attempts])

    @cached_property
    def samples(self) -> tuple[Row, ...]:
        """The samples of all attempts as one run."""
        return joined([attempt.samples.rows for attempt in self.attempts])

    @property
    def damaged(self) -> int:
        """How many lines of metrics, samples and notes could not be read."""
        return sum(
            lines.damaged for attempt in self.attempts for lines in (attempt.metrics, attempt.samples, attempt.notes)
        )


def joined(attempts: Sequence[Sequence[Row]]) -> tuple[Row, ...]:
    """Return the rows of attempts, oldest first, as one run: from its first step on a later attempt replaces earlier.

    So the steps that a killed attempt did after its last checkpoint are dropped, also before the next attempt, which
    repeats them, has reached them.
    """
    rows: list[Row] = []
    for attempt in attempts:
        if attempt:
            first = min(row["step"] for row in attempt)
            rows = [*(row for row in rows if row["step"] < first), *attempt]
    return tuple(rows)


def stage_history(planned: Planned, store: Store) -> StageHistory:
    """Return the history of a stage instance."""
    state, why = stage_status(planned, store)
    return StageHistory(planned, state, why, attempts_at(planned.key, store))


def evaluated_samples(record: ActionRecord | None, store: Store) -> Lines:
    """Return the samples of a report's result, each with those after training as "response" and "score" too.

    Other fields are "prompt", "before", "score_before" and what the stage adds, such as "kl". Empty for other stages.
    """
    if record is None or all(file.path != SAMPLES for file in store.manifest(record.artifact).files):
        return Lines()
    lines = Lines.parse(store.read_file(record.artifact, SAMPLES))
    needed = {"prompt", "before", "after", "score_before", "score_after"}
    whole = (row for row in lines.rows if needed <= row.keys())
    return lines.only(row | {"response": row["after"], "score": row["score_after"]} for row in whole)


def attempts_at(key: str | None, store: Store) -> tuple[AttemptHistory, ...]:
    """Return the attempts at a key, oldest first."""
    return tuple(AttemptHistory(store, key, name) for name in attempt_names(store, key)) if key else ()


def pipeline_history(stages: Mapping[str, Planned], store: Store) -> dict[str, StageHistory]:
    """Return the history of each stage of a plan, in its order."""
    return {name: stage_history(planned, store) for name, planned in stages.items()}


def earlier_results(planned: Planned, store: Store) -> list[ActionRecord]:
    """Return the other results of a stage instance that are still in the store, by when they were finished.

    They are those that a chain of ``previous`` in the records' provenance connects with its result, or where it has
    none, with its latest one. ``attempts_at(record.key, store)`` are their attempts.
    """
    keys = store.keys()
    records = {key: record for key in keys if (record := store.action(key)) and record.stage == planned.stage.name}
    neighbours: dict[str, set[str]] = {key: set() for key in records}
    for key, record in records.items():
        previous = record.provenance.get("previous")
        if previous in neighbours:
            neighbours[key].add(previous)
            neighbours[previous].add(key)
    waiting = [record.key for record in (planned.record, planned.before) if record and record.key in records]
    connected: set[str] = set()
    while waiting:
        if (key := waiting.pop()) not in connected:
            connected.add(key)
            waiting += neighbours[key]
    own = planned.record.key if planned.record else None
    return sorted(
        (records[key] for key in connected - {own}), key=lambda record: str(record.provenance.get("finished"))
    )


def prompt_text(prompt: Any) -> str:
    """Return a prompt as text: of messages, the last one."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        return str(prompt[-1].get("content", ""))
    return str(prompt)
