"""What each setting means and takes, read from the settings models."""

import ast
import inspect
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

from rlhf.config.base import Role, Settings, role_of

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class FieldHelp:
    """A setting as users see it."""

    path: str
    """Dotted, relative to the stage's section: ``kl.coef``."""
    type: str
    """What it takes, in words: ``a number above 0``."""
    default: str
    """The default as JSON, or the word ``required``."""
    role: Role | None
    """Whether it is part of the stage's key."""
    help: str
    """Its description."""


def describe(model: type[Settings], prefix: str = "", defaults: Settings | None = None) -> list[FieldHelp]:
    """Describe every setting of a settings model, those of nested sections after the section itself.

    prefix    of the paths: ``kl.`` in section ``kl``
    defaults  a section's default in the model that holds it, which may differ from the section's own class
    """
    described: list[FieldHelp] = []
    schema, texts = model.model_json_schema(), texts_under_fields(model)
    # Runtime settings come last, also the inherited ones.
    for name, info in sorted(model.model_fields.items(), key=lambda field: role_of(model, field[0]) == "runtime"):
        value = getattr(defaults, name) if defaults is not None else info.get_default(call_default_factory=True)
        described.append(
            FieldHelp(
                path=prefix + name,
                type=in_words(schema["properties"][name], schema),
                default="required" if defaults is None and info.is_required() else _shown(value),
                role=role_of(model, name),
                help=" ".join(texts.get(name, "").split()),
            )
        )
        section = section_type(info.annotation)
        if section is not None:
            described += describe(section, f"{prefix}{name}.", value if isinstance(value, section) else None)
    return described


def texts_under_fields(model: type[Settings]) -> dict[str, str]:
    """Return the text under each field in the source, of inherited fields too.

    Pydantic would read the texts when it makes the class, which takes a sixth of the time of every command.
    """
    texts: dict[str, str] = {}
    for parent in reversed(model.__mro__):
        if not issubclass(parent, Settings):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, under in pairwise(body.body):
            match field, under:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = text
                case _:
                    pass
    return texts


def _shown(value: Any) -> str:
    if isinstance(value, Settings):
        return "{…}"
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return json.dumps(value, ensure_ascii=False, default=str)


def section_type(annotation: Any) -> type[Settings] | None:
    """Return the settings model of a ``Section`` or ``Section | None`` field; None for other fields."""
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, Settings):
            return option
    return None


def schema_at(model: type[Settings], path: tuple[str | int, ...]) -> tuple[Schema, Schema] | None:
    """Return the JSON schema of the setting at ``path`` and the whole schema it refers to; None where there is none."""
    whole = model.model_json_schema()
    schemas: list[Schema] = [whole]
    for key in path:
        inner: list[Any] = []
        for option in (option for schema in schemas for option in _options(schema, whole)):
            if isinstance(key, int):
                inner.append(option.get("items"))
            else:
                inner.append(option.get("properties", {}).get(key, option.get("additionalProperties")))
        schemas = [schema for schema in inner if isinstance(schema, Mapping)]
    return (schemas[0], whole) if schemas else None


def names_at(model: type[Settings], path: tuple[str | int, ...]) -> list[str]:
    """Return the names of the settings in the section at ``path``."""
    schema = schema_at(model, path)
    return [name for option in _options(*schema) for name in option.get("properties", {})] if schema else []


def _options(schema: Schema, whole: Schema) -> list[Schema]:
    if "$ref" in schema:
        return _options(whole["$defs"][schema["$ref"].removeprefix("#/$defs/")], whole)
    if "anyOf" in schema:
        return [option for part in schema["anyOf"] for option in _options(part, whole)]
    return [schema]


def in_words(schema: Schema, whole: Schema) -> str:
    """Return what a JSON schema takes, in words: ``a whole number of at least 1, or null``."""
    return ", or ".join(dict.fromkeys(_option_in_words(option, whole) for option in _options(schema, whole)))


def _option_in_words(schema: Schema, whole: Schema) -> str:
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if values:
        values = [value if isinstance(value, str) else _shown(value) for value in values]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    match schema.get("type"):
        case "integer":
            return "a whole number" + _range_in_words(schema)
        case "number":
            return "a number" + _range_in_words(schema)
        case "boolean":
            return "true or false"
        case "null":
            return "null"
        case "string" if schema.get("format") in ("path", "file-path", "directory-path"):
            return "a path"
        case "string" if "pattern" in schema:
            return f"text of the form {schema['pattern']}"
        case "string":
            return "text that is not empty" if schema.get("minLength") else "text"
        case "array":
            return f"a list, each {in_words(schema['items'], whole)}" if schema.get("items") else "a list"
        case "object" if "properties" in schema:
            return f"a section with {', '.join(schema['properties'])}"
        case "object":
            inner = schema.get("additionalProperties")
            return f"a section of names, each {in_words(inner, whole)}" if isinstance(inner, Mapping) else "a section"
        case _:
            return "any value"


def _range_in_words(schema: Schema) -> str:
    # Seeds have ten digits, of which :g would keep six.
    number = {
        name: f"{bound:.0f}" if float(bound).is_integer() else f"{bound:g}"
        for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
        if (bound := schema.get(name)) is not None
    }
    if "minimum" in number and "maximum" in number:
        return f" from {number['minimum']} to {number['maximum']}"
    words = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
    bounds = " and ".join(f"{word} {number[name]}" for name, word in words.items() if name in number)
    return f" of {bounds}" if bounds.startswith("at ") else f" {bounds}" if bounds else ""
