"""A pipeline file: the settings that it holds, and how it is loaded with its overrides.

Settings are stored and shown, so secrets among them are refused: values of a form that only secrets have.
"""

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from rlhf.config.base import Seed, Settings, runtime, suggestion
from rlhf.config.former import read_former_lora
from rlhf.config.validation import validated
from rlhf.config.yaml_tree import KeyPath, Problem, Tree, dotted, raise_problems, read_tree

# Names are parts of paths in the store and of overrides, whose parts are separated by dots.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


class StoreSettings(Settings):
    """Where results are kept."""

    uri: str = runtime("store", min_length=1)
    """The artifact store: a folder, relative to the working folder unless absolute, or ``s3://bucket/prefix``."""
    scratch: str | None = runtime(None, min_length=1)
    """For a store in a bucket, the local folder of attempts and copies; null is one in the user's cache folder."""

    @model_validator(mode="after")
    def _scratch_belongs_to_a_bucket(self) -> Self:
        if self.scratch is not None and not self.uri.startswith("s3://"):
            raise ValueError("scratch is for a store in a bucket: one in a folder has its attempts in that folder")
        return self


class ClusterSettings(Settings):
    """The Ray cluster that stages run on: an existing one, or one started for the run."""

    address: str | None = runtime(None, min_length=1)
    """Address of a running cluster, ``host:port`` or ``auto``; null takes the environment's RAY_ADDRESS, and without
    one starts a cluster on this machine."""
    cpus: int | None = runtime(None, ge=1)
    """CPU cores that a cluster started here may use; null allows all of the machine's."""
    gpus: int | None = runtime(None, ge=0)
    """GPUs that a cluster started here may use; null allows all of the machine's."""
    max_failures: int = runtime(3, ge=0)
    """Restarts of a stage's worker group from the same checkpoint before the stage fails. Each new checkpoint allows as
    many again."""


class TrackingSettings(Settings):
    """Where metrics are sent besides ``metrics.jsonl``, which is always written."""

    sinks: tuple[Literal["wandb", "tensorboard", "mlflow", "trackio"], ...] = runtime(("wandb",))
    """Programs that show the metrics while a stage trains. All but wandb are extras of this package:
    ``pip install 'rlhf-pipeline[tensorboard]'``."""
    wandb: Literal["auto", "online", "offline", "disabled"] = runtime("auto")
    """Weights & Biases: ``auto`` is online with an API key and offline otherwise."""
    project: str = runtime("rlhf", min_length=1)
    """Project of the runs in W&B and trackio, experiment in MLflow."""
    entity: str | None = runtime(None, min_length=1)
    """User or team of the W&B runs; null is the key's own."""


class PipelineSettings(Settings):
    """The top-level settings of a pipeline file; every other top-level section is a stage instance."""

    pipeline: str | None = runtime(None, pattern=NAME_PATTERN)
    """Name under which the store keeps the pipeline's latest results; null takes the file's name."""
    seed: Seed = runtime(0)
    """Fills in ``seed`` in every stage instance that has such a setting and does not set it itself. It enters the keys
    through those."""
    targets: tuple[str, ...] = runtime(())
    """Stages that are brought up to date where none are named; empty takes those that no other stage reads."""
    store: StoreSettings = runtime(StoreSettings())
    """The artifact store."""
    cluster: ClusterSettings = runtime(ClusterSettings())
    """The Ray cluster."""
    tracking: TrackingSettings = runtime(TrackingSettings())
    """Metric sinks."""


@dataclass(frozen=True)
class StageInstance:
    """One use of a stage in a pipeline."""

    name: str
    """The section's name, which everything outside the stage's code uses."""
    uses: str
    """The stage's name."""
    settings: Settings
    """The stage's settings, complete and valid."""
    inputs: Mapping[str, str]
    """Roles that this pipeline rewires: role -> ``instance`` or ``instance/part``."""


@dataclass(frozen=True)
class PipelineConfig:
    """A pipeline file with its overrides, complete and valid."""

    name: str
    path: Path
    seed: int
    store: StoreSettings
    cluster: ClusterSettings
    tracking: TrackingSettings
    instances: Mapping[str, StageInstance]
    """By name, in the file's order."""
    targets: tuple[str, ...] = ()
    """Brought up to date where no stages are named; empty are those that no other stage reads."""
    notices: Sequence[str] = ()
    """What the user should write otherwise from now on, a line each."""


def resolved(config: PipelineConfig) -> dict[str, Any]:
    """Return the whole pipeline as JSON values with every default; written as YAML it loads to the same pipeline."""
    sections = {"store": config.store, "cluster": config.cluster, "tracking": config.tracking}
    values: dict[str, Any] = {"pipeline": config.name, "seed": config.seed}
    values |= {"targets": list(config.targets)} if config.targets else {}
    values |= {name: section.model_dump(mode="json") for name, section in sections.items()}
    for instance in config.instances.values():
        wiring = {"uses": instance.uses, "inputs": dict(instance.inputs)}
        values[instance.name] = wiring | instance.settings.model_dump(mode="json")
    return values


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


def to_add(name: str, file: str | Path, stages: Container[str], known: Iterable[str]) -> str:
    """Return what to do where a pipeline file has no section of a name.

    stages  the names of all stages that are installed
    known   what else may have been meant
    """
    if name in stages:
        return f"add `{name}: {{}}` to {file}; `rlhf config --fields {name}` explains its settings"
    return suggestion(name, known)


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
            next_step = to_add(section, tree.file, settings_types, known)
            tree.problems.append(Problem(what, f"override {override}", next_step))
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
        targets=top_level.targets,
        notices=tuple(tree.notices),
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
        known, rule = suggestion(name, [*settings_types, *_TOP_LEVEL]), f"another name for a stage needs {_USES}: STAGE"
        tree.problems.append(Problem(what, where, f"{known} ({rule})" if known else rule))
        return None
    assert not {_USES, _INPUTS} & set(model.model_fields), "these two names belong to the loader"

    if "lora" in section and "tuning" in model.model_fields and "lora" not in model.model_fields:
        read_former_lora(tree, name)
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
