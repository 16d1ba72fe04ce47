"""What each setting means and takes, out of the settings models themselves."""

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
    """One setting, for people."""

    path: str
    """Dotted, from the stage's section: ``kl.coef``."""
    type: str
    """What it takes, in words: ``a number above 0``."""
    default: str
    """The default as JSON, or the word ``required``."""
    role: Role | None
    """Whether it is part of the stage's key."""
    help: str
    """Its description."""


def describe(settings_type: type[Settings]) -> list[FieldHelp]:
    """Describe every setting of a settings model, those of nested sections after the section itself."""
    return _describe(settings_type, "", None)


def _describe(model: type[Settings], prefix: str, defaults: Settings | None) -> list[FieldHelp]:
    described: list[FieldHelp] = []
    schema, texts = model.model_json_schema(), texts_under_fields(model)
    for name, info in model.model_fields.items():
        # A section's default may set its fields otherwise than their own class does.
        value = getattr(defaults, name) if defaults is not None else info.get_default(call_default_factory=True)
        required = defaults is None and info.is_required()
        section = section_type(info.annotation)
        shown = _shown(value)
        described.append(
            FieldHelp(
                path=prefix + name,
                type=in_words(schema["properties"][name], schema),
                default="required" if required else shown,
                role=role_of(model, name),
                help=" ".join(texts.get(name, "").split()),
            )
        )
        if section is not None:
            described += _describe(section, f"{prefix}{name}.", value if isinstance(value, section) else None)
    return described


def texts_under_fields(model: type[Settings]) -> dict[str, str]:
    """Return the text that stands under each field in the source, of inherited fields too.

    Pydantic would read them when it makes the class, which takes a sixth of the time of every command, help or not.
    """
    texts: dict[str, str] = {}
    for one in reversed(model.__mro__):
        if not issubclass(one, Settings):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0]
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
    return _as_json(value)


def section_type(annotation: Any) -> type[Settings] | None:
    """Return the settings model of a ``Section`` or ``Section | None`` field; None for other fields."""
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, Settings):
            return option
    return None


def schema_at(model: type[Settings], path: tuple[str | int, ...]) -> tuple[Schema, Schema] | None:
    """Return the JSON schema of the setting at ``path`` and the whole schema it refers to; None where there is none."""
    whole = model.model_json_schema()
    found: list[Schema] = [whole]
    for key in path:
        found = [inner for schema in found for option in _options(schema, whole) for inner in _inner(option, key)]
    return (found[0], whole) if found else None


def names_at(model: type[Settings], path: tuple[str | int, ...]) -> list[str]:
    """Return the names of the settings in the section at ``path``."""
    found = schema_at(model, path)
    if found is None:
        return []
    return [name for option in _options(*found) for name in option.get("properties", {})]


def _inner(schema: Schema, key: str | int) -> list[Schema]:
    if isinstance(key, int):
        return [schema["items"]] if "items" in schema else []
    if key in schema.get("properties", {}):
        return [schema["properties"][key]]
    others = schema.get("additionalProperties")
    return [others] if isinstance(others, Mapping) else []


def _options(schema: Schema, whole: Schema) -> list[Schema]:
    if "$ref" in schema:
        return _options(whole["$defs"][schema["$ref"].removeprefix("#/$defs/")], whole)
    if "anyOf" in schema:
        return [option for part in schema["anyOf"] for option in _options(part, whole)]
    return [schema]


def in_words(schema: Schema, whole: Schema) -> str:
    """Say what a JSON schema takes: ``a whole number of at least 1, or null``."""
    options = [_option_in_words(option, whole) for option in _options(schema, whole)]
    return ", or ".join(dict.fromkeys(options))


def _option_in_words(schema: Schema, whole: Schema) -> str:
    if "enum" in schema or "const" in schema:
        values = [_plain(value) for value in schema.get("enum", [schema.get("const")])]
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
        case "string":
            return _text_in_words(schema)
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
    lower = f"at least {_number(schema['minimum'])}" if "minimum" in schema else ""
    upper = f"at most {_number(schema['maximum'])}" if "maximum" in schema else ""
    if lower and upper:
        return f" from {_number(schema['minimum'])} to {_number(schema['maximum'])}"
    lower = f"above {_number(schema['exclusiveMinimum'])}" if "exclusiveMinimum" in schema else lower
    upper = f"below {_number(schema['exclusiveMaximum'])}" if "exclusiveMaximum" in schema else upper
    bounds = " and ".join(bound for bound in (lower, upper) if bound)
    if not bounds:
        return ""
    return f" of {bounds}" if bounds.startswith("at ") else f" {bounds}"


def _text_in_words(schema: Schema) -> str:
    if schema.get("format") in ("path", "file-path", "directory-path"):
        return "a path"
    if "pattern" in schema:
        return f"text of the form {schema['pattern']}"
    return "text that is not empty" if schema.get("minLength") else "text"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else _as_json(value)


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _number(value: float) -> str:
    # Seeds are whole numbers of ten digits, of which six would not do.
    return f"{value:.0f}" if float(value).is_integer() else f"{value:g}"
