"""Records as JSONL files of our own: one object a line, absent fields left out."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

M = TypeVar("M", bound=BaseModel)


def to_line(record: BaseModel, **more: Any) -> str:
    """Write a record, and fields beside it, as one line with its end."""
    return json.dumps(record.model_dump(exclude_none=True) | more, ensure_ascii=False) + "\n"


def write_jsonl(path: Path, records: Iterable[BaseModel]) -> int:
    """Write records one a line and return their number; the folder is made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(to_line(record))
            count += 1
    return count


def read_jsonl(path: Path, model: type[M]) -> Iterator[M]:
    """Read the records of a file that the data stage wrote, one by one."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield model.model_validate_json(line)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file that a stage wrote, as they are."""
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]
