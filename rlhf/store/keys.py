"""Canonical JSON, digests and keys: what makes two results the same result."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from rlhf.errors import RequestError

_SURROGATE = re.compile("[\ud800-\udfff]")


def canonical_json(value: object) -> bytes:
    """Write a value as the one JSON text it has: sorted keys, no whitespace, UTF-8, shortest floats that read back.

    Keys sort by code point. 1, 1.0 and true are three values; a tuple is written as a list. Raises RequestError, naming
    the place, for what has no stable form: NaN and infinities, keys that are no strings, unpaired surrogates, and every
    type that JSON does not have.
    """
    try:
        _refuse_unstable(value, "value")
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise _unstable("value", "is nested too deeply or holds itself") from None
    except ValueError as error:  # an integer of more digits than Python writes
        raise _unstable("value", f"cannot be written: {error}") from error
    return text.encode()


def digest_of(value: object) -> str:
    """Take the SHA-256 over a value's canonical JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def digest_file(path: str | Path) -> str:
    """Take the SHA-256 of a file's bytes, 64 hexadecimal digits. Raises OSError where the file cannot be read."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(stage: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Make the key of a stage's result.

    ``settings`` are the semantic ones only; ``inputs`` maps each role to the digest of the artifact, or of the part of
    it, that the stage reads.
    """
    return digest_of({"stage": stage, "version": version, "settings": dict(settings), "inputs": dict(inputs)})


def _refuse_unstable(value: object, place: str) -> None:
    if value is None or isinstance(value, bool | int):
        return
    if isinstance(value, str):
        if _SURROGATE.search(value):
            raise _unstable(place, "is text with an unpaired surrogate")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _unstable(place, f"is {value}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(cast("list[object]", value)):
            _refuse_unstable(item, f"{place}[{index}]")
    elif isinstance(value, dict):
        for name, item in cast("dict[object, object]", value).items():
            if not isinstance(name, str):
                raise _unstable(place, f"has a key of type {type(name).__name__}, {name!r}")
            _refuse_unstable(name, f"{place}: key {name!r}")
            _refuse_unstable(item, f"{place}.{name}")
    else:
        raise _unstable(place, f"is of type {type(value).__name__}")


def _unstable(place: str, why: str) -> RequestError:
    return RequestError(
        f"What must be hashed has no stable form: {place} {why}.",
        where=place,
        next_step="Use finite numbers, text, true, false, null, lists, and objects whose keys are text.",
    )
