"""The base of every settings model, and the three marks a field may carry.

A *semantic* field defines the result and enters the stage's key; a *runtime* field says where or how it runs and does
not. A *source* field names data or a model: a built-in word or a pinned hub name enters the key as it is, while of a
local path only the content does, so that moving a file changes no key.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rlhf.config.sources import word_in_key

Role = Literal["semantic", "runtime", "source"]


class Settings(BaseModel):
    """Frozen settings; unknown fields are refused; the text under a field is its help (:mod:`rlhf.config.fields`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def semantic(default: Any = ..., **constraints: Any) -> Any:
    """Mark a field that defines the result: changing it changes the stage's key."""
    return Field(default, json_schema_extra={"role": "semantic"}, **constraints)


def runtime(default: Any = ..., **constraints: Any) -> Any:
    """Mark a field that says where or how a stage runs: changing it changes no key."""
    return Field(default, json_schema_extra={"role": "runtime"}, **constraints)


def source(default: Any = ..., **constraints: Any) -> Any:
    """Mark a field that names data or a model: a word, a hub name, or a local path (its content enters the key)."""
    return Field(default, json_schema_extra={"role": "source"}, **constraints)


def role_of(model: type[Settings], field: str) -> Role | None:
    """Return the mark of a field, or None where it carries none (which a test refuses)."""
    extra = model.model_fields[field].json_schema_extra
    role = extra.get("role") if isinstance(extra, dict) else None
    return role if role in ("semantic", "runtime", "source") else None  # type: ignore[return-value]


def semantic_values(settings: Settings) -> dict[str, Any]:
    """Return the semantic and source fields as JSON values, nested settings included; runtime fields are left out.

    A source that is a local path reads ``"file"``: who makes a key adds the digest of its content.
    """
    values: dict[str, Any] = {}
    dumped = settings.model_dump(mode="json")
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        match role_of(type(settings), name):
            case "semantic":
                values[name] = _semantic_value(value, dumped[name])
            case "source":
                values[name] = word_in_key(value) if isinstance(value, str) else dumped[name]
            case _:
                pass
    return values


def _semantic_value(value: Any, dumped: Any) -> Any:
    if isinstance(value, Settings):
        return semantic_values(value)
    if isinstance(value, list):
        return [_semantic_value(item, other) for item, other in zip(value, dumped, strict=True)]
    return dumped
