"""A pipeline file and its overrides, read into a complete and valid :class:`~rlhf.config.pipeline.PipelineConfig`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.config.base import Settings
from rlhf.config.nearest import suggestion
from rlhf.config.pipeline import NAME_PATTERN, PipelineConfig, PipelineSettings, StageInstance
from rlhf.config.problems import Problem, raise_problems
from rlhf.config.secrets import refuse_secret_overrides, refuse_secrets
from rlhf.config.validation import validated
from rlhf.config.yaml_tree import Tree, read_tree

_TOP_LEVEL = tuple(PipelineSettings.model_fields)
_USES, _INPUTS = "uses", "inputs"


def load_pipeline(path: Path, overrides: Sequence[str], settings_types: Mapping[str, type[Settings]]) -> PipelineConfig:
    """Read a pipeline file, apply overrides, fill in defaults and seeds, and check everything.

    path            the YAML file
    overrides       ``section.field=value``, the value in YAML; a later one wins over an earlier one and over the file
    settings_types  the settings model of each known stage, by the stage's name

    Raises:
        SettingsError: with the places of up to five mistakes at once.

    """
    # First of all, since other messages repeat what was written.
    refuse_secret_overrides(overrides)
    tree = read_tree(path)
    refuse_secrets(tree)
    for override in overrides:
        _override(tree, override)
    # What was written cannot be judged before it can be read.
    raise_problems(tree.problems)

    top_level = validated(
        PipelineSettings, {name: tree.values[name] for name in _TOP_LEVEL if name in tree.values}, tree, ()
    )
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


def _override(tree: Tree, text: str) -> None:
    section = text.partition("=")[0].partition(".")[0].strip()
    known = {*tree.values, *_TOP_LEVEL}
    # A misspelt section must not become a stage instance of its own.
    if "=" in text and section not in known:
        what = f"{tree.file} has no section {section}"
        tree.problems.append(Problem(what, f"override {text}", suggestion(section, known)))
    else:
        tree.override(text)


def _instance(
    tree: Tree, name: str, names: Sequence[str], seed: int, settings_types: Mapping[str, type[Settings]]
) -> StageInstance | None:
    """Return one stage instance, or None after adding what is wrong with it to the tree's problems."""
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
    if model is None:
        tree.problems.append(_unknown_stage(tree, name, _USES in section, uses, settings_types))
        return None
    assert not {_USES, _INPUTS} & set(model.model_fields), "these two names belong to the loader"

    values: dict[str, Any] = {key: value for key, value in section.items() if key not in (_USES, _INPUTS)}
    if "seed" in model.model_fields:
        values.setdefault("seed", seed)
    settings = validated(model, values, tree, (name,), also_known=(_USES, _INPUTS))
    return None if settings is None else StageInstance(name, uses, settings, inputs)


def _unknown_stage(
    tree: Tree, name: str, says_uses: bool, uses: Any, settings_types: Mapping[str, type[Settings]]
) -> Problem:
    if says_uses:
        what = f"{name}.{_USES} is {uses!r}, which is no stage"
        return Problem(what, tree.place((name, _USES)), suggestion(str(uses), settings_types))
    what = f"{name} is neither a stage nor a section of the pipeline"
    hint = suggestion(name, [*settings_types, *_TOP_LEVEL])
    return Problem(what, tree.place((name,)), f"{hint} (another name for a stage needs {_USES}: STAGE)".strip())


def _inputs(tree: Tree, name: str, written: Any, names: Sequence[str]) -> dict[str, str]:
    """Return the roles that an instance rewires; what is wrong goes to the tree's problems."""
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
