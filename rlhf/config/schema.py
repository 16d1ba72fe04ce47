"""The JSON schema of a pipeline file, by which editors explain, complete and check it."""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic.json_schema import models_json_schema

from rlhf.config.base import Settings, role_of, texts_under_fields
from rlhf.config.pipeline import NAME_PATTERN, PipelineSettings

_REF = "#/$defs/{}"
_INPUTS = {
    "type": "object",
    "additionalProperties": {"type": "string"},
    "description": "Roles that this pipeline rewires, each to an instance or instance/part.",
}


def json_schema(stages: Mapping[str, type[Settings]]) -> dict[str, Any]:
    """Return the schema of pipeline files: top-level settings, and instances of stages under any name.

    stages  the settings model of each known stage, by the stage's name
    """
    models = _with_sections([PipelineSettings, *stages.values()])
    references, whole = models_json_schema([(model, "validation") for model in models], ref_template="#/$defs/{model}")
    definitions: dict[str, Any] = whole["$defs"]
    name_of = {model: references[model, "validation"]["$ref"].rpartition("/")[2] for model in models}
    for model, name in name_of.items():
        _explain(definitions[name], model)
    top = definitions.pop(name_of[PipelineSettings])
    for stage, model in stages.items():
        definitions[f"stage {stage}"] = _instance(definitions[name_of[model]], stage)
    definitions["instance"] = {
        "type": "object",
        "required": ["uses"],
        "properties": {"uses": {"enum": list(stages), "description": "The stage that this is an instance of."}},
        "allOf": [
            {"if": {"properties": {"uses": {"const": stage}}}, "then": {"$ref": _REF.format(f"stage {stage}")}}
            for stage in stages
        ],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "rlhf pipeline",
        "type": "object",
        "properties": top["properties"] | {stage: _named(stage, model) for stage, model in stages.items()},
        "propertyNames": {"pattern": NAME_PATTERN},
        "additionalProperties": {"$ref": _REF.format("instance")},
        "$defs": definitions,
    }


def _with_sections(models: list[type[Settings]]) -> list[type[Settings]]:
    """Return settings models with all that they hold, each once."""
    found: dict[type[Settings], None] = {}
    while models:
        model = models.pop(0)
        if model not in found:
            found[model] = None
            models += [one for info in model.model_fields.values() for one in _models_in(info.annotation)]
    return list(found)


def _models_in(annotation: Any) -> list[type[Settings]]:
    """Return the settings models that a type names, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _explain(schema: dict[str, Any], model: type[Settings]) -> None:
    """Give each setting in a model's schema its help, with whether it enters the key."""
    texts = texts_under_fields(model)
    for name, field in schema.get("properties", {}).items():
        field.pop("role", None)
        field.pop("title", None)
        field["description"] = " ".join(f"{texts.get(name, '')} ({role_of(model, name)})".split())


def _instance(section: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Return the schema of a stage's section with what the loader itself reads there."""
    wiring = {"uses": {"const": stage}, "inputs": _INPUTS}
    return {**section, "properties": {**section.get("properties", {}), **wiring}}


def _named(stage: str, model: type[Settings]) -> dict[str, Any]:
    """Return the schema of the section with a stage's own name, which may use another stage, or be empty."""
    own = [{"$ref": _REF.format(f"stage {stage}")}]
    if not any(field.is_required() for field in model.model_fields.values()):
        own.append({"type": "null"})
    return {
        "description": " ".join((model.__doc__ or "").split()),
        "if": {"type": "object", "required": ["uses"]},
        "then": {"$ref": _REF.format("instance")},
        "else": {"anyOf": own},
    }
