"""The prompts and responses that people are to rank, read from a source of rows."""

from collections.abc import Mapping
from typing import Any

from rlhf.data.readers import read_rows
from rlhf.data.records import ComparisonSet, PreferencePair, Reason, ResponseSet, parse_record
from rlhf.data.validation import malformed
from rlhf.errors import RecordError
from rlhf.store import digest_of

_TELL_OF_COMPARISONS = (
    ComparisonSet.model_fields.keys() | PreferencePair.model_fields
) - ResponseSet.model_fields.keys()


def read_sets(source: str) -> dict[str, ResponseSet]:
    """Read the sets of a source in its order, by their names; of rows with the same prompt and responses, the first.

    Comparison sets are taken too: what they already say of their responses is left out.

    Raises:
        RecordError: a row is malformed, or there are none.
        SettingsError, IndexUnreachableError: the source cannot be read at all.

    """
    sets: dict[str, ResponseSet] = {}
    bad: list[str] = []
    total = 0
    # People compare the responses to held-out prompts too.
    for row in read_rows(source, mixes_splits=True):
        total += 1
        found = [Reason("", row.problem)] if row.problem else _parse(row.value)
        if isinstance(found, list):
            bad.append(f"{row.place}: {'; '.join(map(str, found))}")
        else:
            sets.setdefault(name_of(found), found)
    if bad:
        raise malformed(bad, total, "", 'correct them: a row is {"prompt": …, "responses": [two or more]}')
    if not sets:
        raise RecordError("there are no rows", source, "name a file that has some")
    return sets


def name_of(responses: ResponseSet | ComparisonSet) -> str:
    """Name a set by its content, so that answers stay with it wherever its row moves."""
    content = responses.model_dump(include={"prompt", "responses"})
    return digest_of([content["prompt"], content["responses"]])


def _parse(value: Any) -> ResponseSet | list[Reason]:
    if not isinstance(value, Mapping) or _TELL_OF_COMPARISONS.isdisjoint(value):
        return parse_record(value, ResponseSet)
    found = parse_record(value, ComparisonSet)
    if isinstance(found, list):
        return found
    return ResponseSet(prompt=found.prompt, responses=found.responses, models=found.models)
