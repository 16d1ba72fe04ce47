"""The base of settings models: the marks of fields, the grammar of sources, what each setting means and takes.

A *semantic* field defines the result and enters the stage's key; a *runtime* field says where or how it runs and does
not. A *source* field names data or a model: a built-in word or a pinned hub name enters the key as it is, while of a
local path only the content does, so that moving a file changes no key.
"""

import ast
import inspect
import json
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field

from rlhf.errors import SettingsError

FEW = 12
"""Most names that a message lists; beyond them, the command that explains each says more."""


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that ``name`` most looks like, whatever its case and hyphens; None where none is close."""

    def plain(text: str) -> str:
        return text.casefold().replace("-", "_")

    by_plain_name = {plain(candidate): candidate for candidate in candidates}
    matches = get_close_matches(plain(name), by_plain_name, n=1, cutoff=0.6)
    return by_plain_name[matches[0]] if matches else None


def suggestion(name: str, candidates: Iterable[str]) -> str:
    """Return what to write instead of ``name``: the nearest candidate, and all of them where they are few; else ""."""
    known = sorted(candidates)
    close = nearest(name, known)
    parts = [f"did you mean {close}?"] if close else []
    if 0 < len(known) <= FEW:
        parts.append(f"known: {', '.join(known)}")
    return " ".join(parts)


MOVIE_SNIPPETS = "movie-snippets"
"""The word for Hutto & Gilbert's rated movie-review snippets, fetched through the package index."""

OTHER_SNIPPETS = "other-snippets"
"""The word for the product-review and editorial snippets of the same collection, as comparisons."""

KNOWN_WORDS = frozenset({MOVIE_SNIPPETS, OTHER_SNIPPETS, "smollm2-135m", "scratch"})
"""Words that name something built in; a file that happens to have such a name is written ``./scratch``."""

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json")
ARROW_SUFFIXES = (".arrow", ".feather")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
"""Compressions of text files; Parquet and Arrow have their own inside."""

FILE_SUFFIXES = (
    *TEXT_SUFFIXES,
    ".parquet",
    *ARROW_SUFFIXES,
    *(text + compressed for text in TEXT_SUFFIXES for compressed in COMPRESSED_SUFFIXES),
)
"""The kinds of file that records are read from, in lower case."""


class HubDataset(NamedTuple):
    """A dataset on the Hugging Face hub at one commit."""

    name: str
    revision: str
    split: str


def is_local(source: str) -> bool:
    """Return whether a source names a file or folder: an existing path, or a name that can only be meant as a path."""
    if source in KNOWN_WORDS:
        return False
    looks_like_path = source.startswith((".", "/", "~")) or source.casefold().endswith(FILE_SUFFIXES)
    # os.path returns False for text that cannot be a path, such as one too long or with a zero byte.
    return looks_like_path or os.path.exists(os.path.expanduser(source))  # noqa: PTH110, PTH111


def word_in_key(source: str) -> str:
    """Return what represents a source in a key: local content enters by its digest, so a path does not."""
    file, colon, name = source.rpartition(":")
    if colon and file.endswith(".py"):
        return f"file:{name}"
    return "file" if is_local(source) else source


def parse_hub_dataset(source: str) -> HubDataset:
    """Split ``name@revision`` or ``name@revision#split``, whose default split is ``train``.

    Raises ValueError where the revision is missing or no 40-hex commit, so that its content could change.
    """
    match = re.fullmatch(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)@(?P<revision>[0-9a-f]{40})(?:#(?P<split>.+))?", source)
    if match is None:
        raise ValueError(
            f"{source!r} is no file or folder here, and a dataset on the hub is written name@revision or "
            "name@revision#split, where revision is a commit's 40 hexadecimal digits: the dataset's page lists its "
            "commits under 'Files and versions', 'History'"
        )
    if ".." in match["name"] or match["name"].startswith((".", "-")) or os.path.exists(match["name"]):  # noqa: PTH110 - as in is_local
        raise ValueError(
            f"{source!r} would name a folder of this machine: write that without @revision, or rename it where a "
            "dataset of the hub is meant"
        )
    return HubDataset(match["name"], match["revision"], match["split"] or "train")


Role = Literal["semantic", "runtime", "source"]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]


class Settings(BaseModel):
    """Frozen settings; unknown fields are refused; the text under a field is its help (:mod:`rlhf.config.base`)."""

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
    """Return the mark of a field, or None for a field without a mark."""
    extra: Any = model.model_fields[field].json_schema_extra
    return extra.get("role") if isinstance(extra, dict) else None


def semantic_values(settings: Settings) -> dict[str, Any]:
    """Return the semantic and source fields as JSON values, nested settings included; runtime fields are left out.

    A source that is a local path reads ``"file"``; the key also holds the digest of its content.

    Raises:
        SettingsError: a field has no mark.
    """
    values: dict[str, Any] = {}
    dumped = settings.model_dump(mode="json")
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        match role_of(type(settings), name):
            case "semantic":
                values[name] = _semantic_value(value, dumped[name])
            case "source":
                values[name] = _source_value(value, dumped[name])
            case "runtime":
                pass
            case None:
                model = type(settings)
                raise SettingsError(
                    f"{model.__name__}.{name} has no mark, so nothing says whether it is part of the key",
                    model.__module__,
                    "give it the value semantic(…), runtime(…) or source(…), from rlhf.config.base",
                )
    return values


def _source_value(value: Any, dumped: Any) -> Any:
    if isinstance(value, Settings):
        return semantic_values(value)
    if isinstance(value, dict):
        return {name: _source_value(item, dumped[name]) for name, item in value.items()}
    return word_in_key(value) if isinstance(value, str) else dumped


def _semantic_value(value: Any, dumped: Any) -> Any:
    if isinstance(value, Settings):
        return semantic_values(value)
    if isinstance(value, list):
        return [_semantic_value(item, other) for item, other in zip(value, dumped, strict=True)]
    return dumped


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
    """Its description; of a setting that chooses a section's form, a line for each form."""
    form: str = ""
    """The form that the setting belongs to, in a section of several: ``method lora``."""


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
        # The rows of a section show its defaults, but of several forms they cannot say which one is the default.
        shown = value.model_dump(mode="json") if info.discriminator and isinstance(value, Settings) else value
        described.append(
            FieldHelp(
                path=prefix + name,
                type=in_words(schema["properties"][name], schema),
                default="required" if defaults is None and info.is_required() else _shown(shown),
                role=role_of(model, name),
                help=" ".join(texts.get(name, "").split()),
            )
        )
        if isinstance(info.discriminator, str):
            described += _describe_forms(section_types(info.annotation), info.discriminator, f"{prefix}{name}.")
        else:
            for section in section_types(info.annotation):
                described += describe(section, f"{prefix}{name}.", value if isinstance(value, section) else None)
    return described


def _describe_forms(sections: Sequence[type[Settings]], by: str, prefix: str) -> list[FieldHelp]:
    """Describe a section of several forms: first the setting ``by``, which chooses one, then the settings of each."""
    forms = {get_args(section.model_fields[by].annotation)[0]: section for section in sections}
    texts = [f"{form}: {' '.join((section.__doc__ or '').split())}" for form, section in forms.items()]
    takes = f"one of {', '.join(forms)}"
    described = [FieldHelp(prefix + by, takes, "required", role_of(sections[0], by), "\n".join(texts))]
    for form, section in forms.items():
        of_form = [field for field in describe(section, prefix) if field.path != prefix + by]
        described += [replace(field, form=f"{by} {form}") for field in of_form]
    return described


def texts_under_fields(model: type[Settings]) -> dict[str, str]:
    """Return the text under each field in the source, of inherited fields too.

    Pydantic would read the texts when it makes the class, which takes a sixth of the time of every command.
    """
    texts: dict[str, str] = {}
    for parent in reversed(model.__mro__):
        if issubclass(parent, Settings):
            texts |= _own_texts(parent)
    return texts


@cache
def _own_texts(model: type[Settings]) -> dict[str, str]:
    """Return the texts under the fields that a class itself has; to find a class, its whole file is parsed."""
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
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


def section_types(annotation: Any) -> tuple[type[Settings], ...]:
    """Return the settings models that a field takes: several where its section has several forms, none for a value."""
    options = (annotation, *get_args(annotation))
    return tuple(option for option in options if isinstance(option, type) and issubclass(option, Settings))


def schema_at(model: type[Settings], path: tuple[str | int, ...], written: Any = None) -> tuple[Schema, Schema] | None:
    """Return the JSON schema of the setting at ``path`` and the whole schema it refers to; None where there is none.

    written  the settings that were written; where they name the form of a section, other forms are left out
    """
    whole = model.model_json_schema()
    schemas: list[Schema] = [whole]
    for key in path:
        inner: list[Any] = []
        for option in (option for schema in schemas for option in _sections(schema, whole, written)):
            if isinstance(key, int):
                inner.append(option.get("items"))
            else:
                inner.append(option.get("properties", {}).get(key, option.get("additionalProperties")))
        schemas = [schema for schema in inner if isinstance(schema, Mapping)]
        written = written.get(key) if isinstance(written, Mapping) else None
    if not schemas:
        return None
    return (schemas[0] if len(schemas) == 1 else {"anyOf": schemas}), whole


def names_at(model: type[Settings], path: tuple[str | int, ...]) -> list[str]:
    """Return the names of the settings in the section at ``path``."""
    schema = schema_at(model, path)
    return [name for option in _sections(*schema) for name in option.get("properties", {})] if schema else []


class Forms(NamedTuple):
    """The forms of a section, such as the methods of ``tuning``."""

    by: str
    """The setting that chooses one: ``method``."""
    names: Mapping[str, Sequence[str]]
    """Each form's settings, by the value that chooses it."""


def forms_at(model: type[Settings], path: tuple[str | int, ...]) -> Forms | None:
    """Return the forms of the section at ``path``; None where it has a single form, and where there is no section."""
    schema = schema_at(model, path)
    if schema is None or "discriminator" not in schema[0]:
        return None
    forms = _forms(*schema)
    return Forms(schema[0]["discriminator"]["propertyName"], {name: list(forms[name]["properties"]) for name in forms})


def _options(schema: Schema, whole: Schema) -> list[Schema]:
    if "$ref" in schema:
        return _options(whole["$defs"][schema["$ref"].removeprefix("#/$defs/")], whole)
    parts = schema.get("anyOf", [] if "discriminator" in schema else schema.get("oneOf", []))
    if parts:
        return [option for part in parts for option in _options(part, whole)]
    return [schema]


def _forms(schema: Schema, whole: Schema) -> dict[str, Schema]:
    """Return the forms of a section by the value that chooses each."""
    by = schema["discriminator"]["propertyName"]
    forms = [form for part in schema["oneOf"] for form in _options(part, whole)]
    return {form["properties"][by]["const"]: form for form in forms}


def _sections(schema: Schema, whole: Schema, written: Any = None) -> list[Schema]:
    """Return the options of a schema, and in place of a section of several forms the one that is written, or all."""
    sections: list[Schema] = []
    for option in _options(schema, whole):
        if "discriminator" in option:
            forms = _forms(option, whole)
            chosen = written.get(option["discriminator"]["propertyName"]) if isinstance(written, Mapping) else None
            sections += [forms[chosen]] if isinstance(chosen, str) and chosen in forms else forms.values()
        else:
            sections.append(option)
    return sections


def in_words(schema: Schema, whole: Schema) -> str:
    """Return what a JSON schema takes, in words: ``a whole number of at least 1, or null``."""
    options = _options(schema, whole)
    if len(options) > 1 and all("const" in option for option in options):
        options = [{"enum": [option["const"] for option in options]}]
    return ", or ".join(dict.fromkeys(_option_in_words(option, whole) for option in options))


def _option_in_words(schema: Schema, whole: Schema) -> str:
    if "discriminator" in schema:
        return f"a section whose {schema['discriminator']['propertyName']} is one of {', '.join(_forms(schema, whole))}"
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
            some = "a list that is not empty" if schema.get("minItems") else "a list"
            return f"{some}, each {in_words(schema['items'], whole)}" if schema.get("items") else some
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
