import importlib
import pkgutil
from typing import Annotated, Literal, get_args, get_origin

import pytest
from pydantic import Field

import rlhf.config
from rlhf.config.base import (
    Settings,
    describe,
    in_words,
    role_of,
    schema_at,
    section_types,
    semantic,
    semantic_values,
    texts_under_fields,
)
from rlhf.config.collect import CompareSettings
from rlhf.errors import SettingsError
from tests.config.example import KlExample, TrainExample


def all_settings() -> list[type[Settings]]:
    """Every settings model of the package."""
    for module in pkgutil.iter_modules(rlhf.config.__path__, "rlhf.config."):
        importlib.import_module(module.name)
    found: list[type[Settings]] = []
    waiting: list[type[Settings]] = [Settings]
    while waiting:
        children = waiting.pop().__subclasses__()
        found += [child for child in children if child.__module__.startswith("rlhf.config.")]
        waiting += children
    return sorted(found, key=lambda model: model.__name__)


@pytest.mark.parametrize("model", all_settings())
def test_every_setting_is_marked_and_documented(model: type[Settings]) -> None:
    """Without a mark nobody knows whether a setting enters the key; without a text nobody knows what it does."""
    assert model.__doc__
    texts = texts_under_fields(model)
    for name in model.model_fields:
        assert role_of(model, name) in ("semantic", "runtime", "source"), f"{model.__name__}.{name} has no mark"
        assert texts.get(name), f"{model.__name__}.{name} has no text under it"


@pytest.mark.parametrize("model", all_settings())
def test_no_semantic_setting_hides_in_a_runtime_section(model: type[Settings]) -> None:
    """A runtime section is left out of the key whole, and with it whatever it holds."""
    for name, info in model.model_fields.items():
        if role_of(model, name) == "runtime":
            for section in section_types(info.annotation):
                assert {help_.role for help_ in describe(section)} == {"runtime"}, f"{model.__name__}.{name}"


@pytest.mark.parametrize("model", all_settings())
def test_a_setting_chooses_among_the_forms_of_a_section(model: type[Settings]) -> None:
    """Each form has one value of it and a text, and each setting of a form is shown as that form's."""
    for name, info in model.model_fields.items():
        sections = section_types(info.annotation)
        if len(sections) > 1:
            by = info.discriminator
            assert isinstance(by, str), f"{model.__name__}.{name} does not say what chooses its form"
            annotations = [section.model_fields[by].annotation for section in sections]
            assert {get_origin(annotation) for annotation in annotations} == {Literal}
            chosen = [value for annotation in annotations for value in get_args(annotation)]
            assert len(set(chosen)) == len(chosen) == len(sections)
            rows = describe(model)
            (choice,) = (row for row in rows if row.path == f"{name}.{by}")
            assert [line.partition(": ")[0] for line in choice.help.splitlines()] == chosen
            shown = {(row.path, row.form) for row in rows if row.path.startswith(f"{name}.") and row is not choice}
            assert shown == {
                (f"{name}.{setting}", f"{by} {value}")
                for value, section in zip(chosen, sections, strict=True)
                for setting in section.model_fields.keys() - {by}
            }


@pytest.mark.parametrize("model", all_settings())
def test_every_setting_can_be_said_in_words(model: type[Settings]) -> None:
    """Errors and ``--fields`` both rest on it."""
    for help_ in describe(model):
        assert help_.type
        assert "any value" not in help_.type, help_.path


def test_a_setting_is_described_by_its_path_type_default_and_mark() -> None:
    """Nested sections follow their own row, with dotted paths; the words are those that errors use."""
    described = {help_.path: help_ for help_ in describe(TrainExample)}
    shown = {path: (help_.type, help_.default) for path, help_ in described.items()}
    assert shown == {
        "seed": ("a whole number of at least 0", "0"),
        "learning_rate": ("a number above 0", "0.0001"),
        "discount": ("a number from 0 to 1", "1.0"),
        "precision": ("one of fp32, bf16", '"fp32"'),
        "packing": ("true or false", "true"),
        "kl": ("a section with coef, target", "{…}"),
        "kl.coef": ("a number of at least 0", "0.05"),
        "kl.target": ("a number above 0, or null", "null"),
        "adapter": ("a section with rank, or null", "null"),
        "adapter.rank": ("a whole number of at least 1", "8"),
        "layers": ("a list, each a whole number", "[]"),
        "weights": ("a section of names, each a number", "{}"),
        "prefix": ("text", '""'),
        "steps": ("a whole number, or all", '"all"'),
        "downloads": ("a path, or null", "null"),
        "rollouts": ("a whole number of at least 1", "64"),
        "minibatches": ("a whole number of at least 1", "1"),
    }
    assert described["downloads"].role == "runtime"
    assert described["kl.coef"].role == "semantic"
    assert described["kl.coef"].help == "β."


def test_a_section_s_default_is_what_its_owner_gives_it() -> None:
    """A model may set a nested field otherwise than the nested model's own default."""

    class Owner(Settings):
        kl: KlExample = semantic(KlExample(coef=0.5))

    assert {help_.path: help_.default for help_ in describe(Owner)}["kl.coef"] == "0.5"


def test_what_a_setting_takes_is_what_it_takes_in_the_form_that_was_written() -> None:
    """Forms may have settings of one name and different types; without a form it may be any of them."""

    class Counted(Settings):
        form: Literal["counted"] = semantic()
        level: int = semantic(1, ge=1)

    class Named(Settings):
        form: Literal["named"] = semantic()
        level: str = semantic("low")

    class Owner(Settings):
        part: Annotated[Counted | Named, Field(discriminator="form")] = semantic(Named(form="named"))

    def takes(*path: str, written: dict[str, str]) -> str:
        schema = schema_at(Owner, ("part", *path), {"part": written})
        assert schema is not None
        return in_words(*schema)

    assert takes("level", written={"form": "counted"}) == "a whole number of at least 1"
    assert takes("level", written={"form": "named"}) == "text"
    assert takes("level", written={}) == "a whole number of at least 1, or text"
    assert takes("form", written={}) == "one of counted, named"
    assert takes(written={}) == "a section whose form is one of counted, named"
    assert {field.path: field.default for field in describe(Owner)}["part"] == '{"form": "named", "level": "low"}'


def test_a_setting_without_a_mark_never_gets_into_a_key() -> None:
    """Left out of it in silence, a changed setting would find an old result."""

    class Forgotten(Settings):
        count: int = 10

    with pytest.raises(SettingsError, match=r"Forgotten\.count has no mark"):
        semantic_values(Forgotten())


# Of a judge there is no default: one of three must be named.
WITHOUT_REQUIRED = [
    model
    for model in all_settings()
    if model is not CompareSettings and not any(field.is_required() for field in model.model_fields.values())
]


@pytest.mark.parametrize("model", WITHOUT_REQUIRED)
def test_defaults_are_what_a_pipeline_file_could_say(model: type[Settings]) -> None:
    """The loader is strict about types: a default of the wrong type could be shown, and not be read back."""
    defaults = model()
    assert model.model_validate_json(defaults.model_dump_json(), strict=True) == defaults
