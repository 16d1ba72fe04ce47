from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from rlhf.config.base import Settings, semantic
from rlhf.config.schema import json_schema
from rlhf.config.yaml_tree import read_tree
from rlhf.pipeline.stage import stages
from tests.config.test_configs import CONFIGS


class ExternalSettings(Settings):
    """Those of a stage of another package."""

    count: int = semantic(ge=1)
    """How many."""


TYPES = {name: stage.settings for name, stage in stages().items()} | {"longest": ExternalSettings}
SCHEMA: dict[str, Any] = json_schema(TYPES)
EDITOR = Draft202012Validator(SCHEMA)


def faults(values: dict[str, Any]) -> list[str]:
    return [error.json_path for error in EDITOR.iter_errors(values)]


def test_it_is_a_schema() -> None:
    """As its own schema says."""
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_what_the_loader_takes_is_valid(path: Path) -> None:
    """Instances under any name, anchors, merged sections and empty ones too."""
    assert faults(read_tree(path).values) == []


def test_stages_of_other_packages_are_known_by_their_name_and_as_instances() -> None:
    """As the loader takes them: a setting that must be given leaves no empty section."""
    assert (
        faults({"longest": {"count": 3}, "other": {"uses": "longest", "count": 3, "inputs": {"prompts": "data"}}}) == []
    )
    assert faults({"longest": None}) == ["$.longest"]
    assert faults({"longest": {"count": 0}}) == ["$.longest"]


@pytest.mark.parametrize(
    "values",
    [
        {"sft": {"epcohs": 1}},
        {"sft": {"epochs": "two"}},
        {"sft": {"tuning": {"method": "lorra"}}},
        {"sft_2": {"uses": "sft", "epcohs": 1}},
        {"sft_2": {"uses": "sfft"}},
        {"sft_2": {}},
        {"sft": {"uses": "rm", "packing": True}},
        {"seed": -1},
        {"my stage": {"uses": "sft"}},
        {"tracking": {"wandb": "of course"}},
    ],
)
def test_what_the_loader_refuses_is_marked(values: dict[str, Any]) -> None:
    """Under the stage's own name and under another."""
    assert faults(values)


def test_every_setting_is_explained() -> None:
    """An editor shows the text that `rlhf config --fields` does."""
    unexplained = [
        f"{name}.{field}"
        for name, definition in SCHEMA["$defs"].items()
        for field, schema in definition.get("properties", {}).items()
        if not schema.get("description") and "const" not in schema
    ]
    assert unexplained == []
    assert "(semantic)" in SCHEMA["$defs"]["stage sft"]["properties"]["epochs"]["description"]
