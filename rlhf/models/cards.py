"""The licence that a model's folder states."""

from pathlib import Path
from typing import Any

import yaml

_LONGEST = 1 << 16


def licence_of(folder: Path) -> str | None:
    """The ``license`` in the YAML head of the folder's model card, or None where there is none to read."""
    try:
        with (folder / "README.md").open(encoding="utf-8") as card:
            text = card.read(_LONGEST)
    except (OSError, UnicodeDecodeError):
        return None
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return None
    try:
        head: Any = yaml.safe_load(text[4:].partition("\n---")[0])
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    licence = head.get("license") if isinstance(head, dict) else None
    return licence if isinstance(licence, str) else None
