"""Load a pipeline file and its overrides into a complete and valid :class:`~rlhf.config.pipeline.PipelineConfig`.

Settings are stored and shown, so secrets among them are refused: values of a form that only secrets have.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlhf.config.base import Settings, suggestion
from rlhf.config.fields import describe, in_words, names_at, schema_at
from rlhf.config.pipeline import NAME_PATTERN, PipelineConfig, PipelineSettings, StageInstance
from rlhf.config.yaml_tree import KeyPath, Problem, Tree, dotted, raise_problems, read_tree

_FORMS = (
    ("a Hugging Face token", r"\bhf_[A-Za-z0-9]{20,}\b"),
    ("a Weights & Biases key", r"\b(?:wandb_v[0-9]+_[A-Za-z0-9_]{20,}|local-[0-9a-f]{40})\b"),
    ("an access key of Amazon's", r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    ("a key of an API", r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{20,}"),
    ("a GitHub token", r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})\b"),
    ("a signed token", r"\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    ("a private key", r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    ("an address with a password", r"://[^/\s:@]*:[^/\s@]+@"),
    (
        "an address with a key in its query",
        r"(?i)[?&](?:[\w.-]*[_.-])?(?:token|secret|password|api[_-]?key|access[_-]?key|signature|sig|credential)=[^&\s]+",
    ),
)


def kind_of_secret(text: str) -> str | None:
    """Return what kind of secret a text looks like or contains; None where it looks like none."""
    return next((kind for kind, form in _FORMS if re.search(form, text)), None)


def _secrets(value: Any, path: KeyPath, place: Callable[[KeyPath], str]) -> Iterator[Problem]:
    """Yield a problem for each name or value that looks like a secret; the message does not repeat it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if (kind := kind_of_secret(name)) is not None:
                yield _secret(f"a setting's name in {dotted(path) or 'the pipeline'}", kind, place(path))
            else:
                yield from _secrets(inner, (*path, name), place)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _secrets(inner, (*path, index), place)
    elif isinstance(value, str) and (kind := kind_of_secret(value)) is not None:
        yield _secret(dotted(path), kind, place(path))


def _secret(named: str, kind: str, place: str) -> Problem:
    hint = (
        "put it into an environment variable: WANDB_API_KEY, HF_TOKEN, or one that an endpoint's token_variable names"
    )
    return Problem(f"{named} holds what looks like {kind}, and settings are stored and shown", place, hint)


AnySettings = TypeVar("AnySettings", bound=Settings)


def validated(
    model: type[AnySettings], values: Mapping[str, Any], tree: Tree, at: KeyPath, also_known: Sequence[str] = ()
) -> AnySettings | None:
    """Return ``values`` as settings, or None after adding what is wrong with them to ``tree.problems``.

    at          path of the values in the tree
    also_known  names that are allowed beside the model's own, to be suggested for an unknown name
    """
    try:
        # Strict: text is no number, a number no truth value. From JSON a list may still fill a tuple, and text a path.
        return model.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        seen: set[KeyPath] = set()
        for detail in error.errors(include_url=False):
            path = _path_in(values, detail)
            # A union complains once for each of its options.
            if path not in seen:
                seen.add(path)
                tree.problems.append(_problem(model, tree, at, path, detail, also_known))
        return None


def _path_in(values: Any, detail: ErrorDetails) -> KeyPath:
    """Return pydantic's location without the names of union options, which are no keys of anything."""
    path: list[str | int] = []
    for key in detail["loc"]:
        if (isinstance(values, Mapping) and key in values) or (isinstance(values, list) and isinstance(key, int)):
            values = values[key]  # pyright: ignore[reportCallIssue, reportArgumentType] - checked on the line above
            path.append(key)
    if detail["type"] == "missing":
        path.append(detail["loc"][-1])
    return tuple(path)


def _problem(
    model: type[Settings],
    tree: Tree,
    at: KeyPath,
    path: KeyPath,
    detail: ErrorDetails,
    also_known: Sequence[str],
) -> Problem:
    name, where, section = dotted((*at, *path)), tree.place((*at, *path)), path[:-1]
    if detail["type"] == "extra_forbidden":
        key = str(path[-1])
        what = f"{dotted((*at, *section)) or 'a pipeline'} has no setting {key}"
        # A right name in the wrong section is likelier meant than a similar name in the right section.
        elsewhere = [field.path for field in describe(model) if field.path.rpartition(".")[2] == key]
        if elsewhere:
            return Problem(what, where, f"did you mean {' or '.join(dotted((*at, name)) for name in elsewhere)}?")
        known = names_at(model, section) + ([] if section else list(also_known))
        return Problem(what, where, suggestion(key, known) or f"known: {', '.join(known)}")
    if detail["type"] == "value_error":
        reason = str(detail.get("ctx", {}).get("error", detail["msg"]))
        return Problem(f"{name}: {reason}" if name else reason, where)
    schema = schema_at(model, path)
    takes = in_words(*schema) if schema else detail["msg"]
    if detail["type"] == "missing":
        return Problem(f"{name} is required", where, f"it takes {takes}")
    value = json.dumps(detail["input"], ensure_ascii=False)
    return Problem(f"{name} is {value if len(value) <= 60 else value[:59] + '…'} and must be {takes}", where)


_TOP_LEVEL = tuple(PipelineSettings.model_fields)
_USES, _INPUTS = "uses", "inputs"


def load_pipeline(path: Path, overrides: Sequence[str], settings_types: Mapping[str, type[Settings]]) -> PipelineConfig:
    """Read a pipeline file, apply overrides, fill in defaults and seeds, and check everything.

    overrides       ``section.field=value``, the value in YAML; a later one wins over an earlier one and over the file
    settings_types  the settings model of each known stage, by the stage's name

    Raises SettingsError with the places of up to five mistakes.
    """
    # Secrets come first, since other messages repeat what was written.
    parts = [override.partition("=") for override in overrides]
    secrets = [_secrets(value, (name,), lambda path: f"override {path[0]}") for name, _, value in parts]
    raise_problems(list(chain.from_iterable(secrets)))
    tree = read_tree(path)
    raise_problems(list(_secrets(tree.values, (), tree.place)))
    for override in overrides:
        section, known = override.partition("=")[0].partition(".")[0].strip(), {*tree.values, *_TOP_LEVEL}
        # A misspelt section must not become a stage instance of its own.
        if "=" in override and section not in known:
            what = f"{tree.file} has no section {section}"
            tree.problems.append(Problem(what, f"override {override}", suggestion(section, known)))
        else:
            tree.override(override)
    # Values cannot be judged before they can be read.
    raise_problems(tree.problems)

    values = {name: tree.values[name] for name in _TOP_LEVEL if name in tree.values}
    top_level = validated(PipelineSettings, values, tree, ())
    # A wrong seed is reported once, not once more for every stage.
    seed = top_level.seed if top_level else 0
    names = [name for name in tree.values if name not in _TOP_LEVEL]
    loaded = [_instance(tree, name, names, seed, settings_types) for name in names]
    raise_problems(tree.problems)
    assert top_level is not None
    return PipelineConfig(
        name=top_level.pipeline or path.stem,
        path=path,
        seed=top_level.seed,
        store=top_level.store,
        cluster=top_level.cluster,
        tracking=top_level.tracking,
        instances={instance.name: instance for instance in loaded if instance},
    )


def _instance(
    tree: Tree, name: str, names: Sequence[str], seed: int, settings_types: Mapping[str, type[Settings]]
) -> StageInstance | None:
    """Return a stage instance, or None after adding what is wrong with it to the tree's problems."""
    where = tree.place((name,))
    section = {} if tree.values[name] is None else tree.values[name]
    if not isinstance(section, dict):
        tree.problems.append(Problem(f"{name} is a single value and must be a stage's section", where))
        return None
    if not re.fullmatch(NAME_PATTERN, name):
        hint = "use letters, digits, _ and -"
        tree.problems.append(Problem(f"{name!r} cannot name a stage instance", where, hint))
    inputs = _inputs(tree, name, section.get(_INPUTS), names)

    uses = section.get(_USES, name)
    model = settings_types.get(uses) if isinstance(uses, str) else None
    if model is None and _USES in section:
        what, hint = f"{name}.{_USES} is {uses!r}, which is no stage", suggestion(str(uses), settings_types)
        tree.problems.append(Problem(what, tree.place((name, _USES)), hint))
        return None
    if model is None:
        what = f"{name} is neither a stage nor a section of the pipeline"
        hint = f"{suggestion(name, [*settings_types, *_TOP_LEVEL])} (another name for a stage needs {_USES}: STAGE)"
        tree.problems.append(Problem(what, where, hint.strip()))
        return None
    assert not {_USES, _INPUTS} & set(model.model_fields), "these two names belong to the loader"

    values: dict[str, Any] = {key: value for key, value in section.items() if key not in (_USES, _INPUTS)}
    if "seed" in model.model_fields:
        values.setdefault("seed", seed)
    settings = validated(model, values, tree, (name,), also_known=(_USES, _INPUTS))
    return None if settings is None else StageInstance(name, uses, settings, inputs)


def _inputs(tree: Tree, name: str, written: Any, names: Sequence[str]) -> dict[str, str]:
    """Return the roles that an instance rewires, after adding what is wrong with them to the tree's problems."""
    if written is None:
        return {}
    if not isinstance(written, dict):
        what = f"{name}.{_INPUTS} must be a section of `role: instance` lines"
        tree.problems.append(Problem(what, tree.place((name, _INPUTS))))
        return {}
    inputs: dict[str, str] = {}
    for role, target in written.items():
        where = tree.place((name, _INPUTS, role))
        if not isinstance(target, str):
            what = f"{name}.{_INPUTS}.{role} must be an instance's name, or instance/part"
            tree.problems.append(Problem(what, where))
            continue
        instance = target.partition("/")[0]
        if instance not in names:
            what = f"{name}.{_INPUTS}.{role} names {instance!r}, and the pipeline has no such stage instance"
            tree.problems.append(Problem(what, where, suggestion(instance, names)))
        inputs[role] = target
    return inputs
