"""What would run, and why: keys out of the pipeline file and the store alone. Pure: no Ray, no torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Literal

from rlhf.config.base import semantic_values
from rlhf.config.nearest import suggestion
from rlhf.config.pipeline import PipelineConfig, StageInstance
from rlhf.errors import RequestError, SettingsError
from rlhf.pipeline.sources import digest_source
from rlhf.pipeline.stage import Stage
from rlhf.store import ActionRecord, Ref, Store, key_of

State = Literal["cached", "missing", "blocked"]


@dataclass(frozen=True)
class Wire:
    """Where an input comes from: an instance, and a top-level folder of its artifact ("" for all of it)."""

    instance: str
    part: str

    @classmethod
    def parse(cls, text: str) -> "Wire":
        """Read ``instance`` or ``instance/part``."""
        instance, _, part = text.partition("/")
        return cls(instance, part)


@dataclass(frozen=True)
class Planned:
    """One stage instance as the store and the settings have it."""

    instance: StageInstance
    stage: Stage
    wires: Mapping[str, Wire]
    state: State
    why: str
    needs: tuple[str, ...]
    """Instances whose results are not committed yet."""
    awaits: Path | None
    """A file that people have still to make. A stage that is blocked by neither this nor ``needs`` is a lost import."""
    key: str | None
    settings: Mapping[str, Any]
    """What of the settings enters the key."""
    inputs: Mapping[str, Mapping[str, str | None]]
    """As :class:`rlhf.store.ActionRecord` keeps them; only complete where there is a key."""
    record: ActionRecord | None

    @property
    def name(self) -> str:
        """The instance's name."""
        return self.instance.name


def plan(config: PipelineConfig, known: Mapping[str, Stage], store: Store) -> dict[str, Planned]:
    """Every instance of the pipeline by name, producers before consumers.

    Raises:
        SettingsError: an input names no instance, or instances need each other in a circle.
    """
    wires = {name: _wires(config, instance, known) for name, instance in config.instances.items()}
    refs = store.refs(config.name)
    planned: dict[str, Planned] = {}
    for name in _order(config, wires):
        instance = config.instances[name]
        planned[name] = _plan_one(instance, known[instance.uses], wires[name], planned, store, refs.get(name))
    return planned


def needed(planned: Mapping[str, Planned], targets: Sequence[str]) -> dict[str, Planned]:
    """The targets and what they are made from, in order; all instances where no target is named.

    Raises:
        RequestError: a target is no instance of the pipeline.
    """
    for target in targets:
        if target not in planned:
            raise RequestError(f"the pipeline has no stage {target!r}", "command line", suggestion(target, planned))
    wanted = set(targets or planned)
    for name in reversed(list(planned)):
        if name in wanted:
            wanted.update(wire.instance for wire in planned[name].wires.values())
    return {name: one for name, one in planned.items() if name in wanted}


def _wires(config: PipelineConfig, instance: StageInstance, known: Mapping[str, Stage]) -> dict[str, Wire]:
    stage = known[instance.uses]
    roles = dict(stage.inputs(instance.settings))
    unknown = [role for role in instance.inputs if role not in roles]
    if unknown:
        raise SettingsError(
            f"stage {stage.name!r} takes no input {unknown[0]!r}",
            f"{config.path}, {instance.name}.inputs",
            suggestion(unknown[0], roles) or "it takes none",
        )
    wires = {role: Wire.parse(instance.inputs.get(role, default)) for role, default in roles.items()}
    for role, wire in wires.items():
        if wire.instance not in config.instances:
            raise SettingsError(
                f"{instance.name} needs {wire.instance!r} as its {role}, and the pipeline has no such stage",
                f"{config.path}, {instance.name}",
                f"add a section {wire.instance!r}, or name another with {instance.name}.inputs.{role}",
            )
        made, taken = known[config.instances[wire.instance].uses].kind, stage.takes(role)
        if taken is not None and (made not in taken or wire.part):
            raise SettingsError(
                f"{wire.instance if not wire.part else f'{wire.instance}/{wire.part}'} is a {made}, and "
                f"{instance.name} takes a {' or '.join(taken)} as its {role}",
                f"{config.path}, {instance.name}.inputs.{role}",
                f"name a stage that makes a {taken[-1]}",
            )
    return wires


def _order(config: PipelineConfig, wires: Mapping[str, Mapping[str, Wire]]) -> Iterable[str]:
    # Lists, not sets: the order of a plan is the same in every process.
    graph = {name: [wire.instance for wire in wires[name].values()] for name in config.instances}
    try:
        return tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise SettingsError(
            f"stages need each other in a circle: {' → '.join(error.args[1])}", str(config.path), "rewire their inputs"
        ) from error


def _plan_one(
    instance: StageInstance,
    stage: Stage,
    wires: Mapping[str, Wire],
    planned: Mapping[str, Planned],
    store: Store,
    ref: Ref | None,
) -> Planned:
    def build(state: State, why: str, **found: Any) -> Planned:
        empty: dict[str, Any] = {
            "needs": (),
            "awaits": None,
            "key": None,
            "settings": {},
            "inputs": {},
            "record": None,
        }
        return Planned(instance, stage, wires, state, why, **(empty | found))

    # Read before the lookup, which moves the record of a damaged result away.
    before = store.action(ref.key) if ref else None
    latest = store.lookup(ref.key) if ref else None
    if ref is not None and ref.imported:
        if latest is None:
            return build("blocked", "the imported model is damaged or gone")
        return build("cached", "imported", key=latest.key, record=latest)

    settings = semantic_values(instance.settings)
    awaits = stage.awaits(instance.settings)
    if awaits is not None:
        return build("blocked", f"waits for people: {awaits} is not there", awaits=awaits, settings=settings)
    contents = {name: digest_source(path, store) for name, path in stage.sources(instance.settings).items()}
    if contents:
        settings["sources"] = contents
    needs = tuple(dict.fromkeys(wire.instance for wire in wires.values() if planned[wire.instance].record is None))
    if needs:
        return build("blocked", f"waits for {', '.join(needs)}", needs=needs, settings=settings)
    inputs = {role: _input(instance.name, role, wire, planned, store) for role, wire in wires.items()}
    key = key_of(stage.name, stage.version, settings, {role: str(entry["digest"]) for role, entry in inputs.items()})
    record = store.lookup(key)
    if record is not None:
        return build("cached", "unchanged", key=key, settings=settings, inputs=inputs, record=record)
    if before is None:
        why = "its latest result is gone" if ref else "new"
    else:
        why = "; ".join(changes(before, stage, settings, inputs)) or "its result was damaged"
    return build("missing", why, key=key, settings=settings, inputs=inputs)


def _input(name: str, role: str, wire: Wire, planned: Mapping[str, Planned], store: Store) -> dict[str, str | None]:
    record = planned[wire.instance].record
    assert record is not None
    manifest = store.manifest(record.artifact)
    try:
        digest = manifest.part_digest(wire.part)
    except RequestError as error:
        raise SettingsError(
            f"{name} needs {wire.part!r} of {wire.instance}, which made none",
            f"{name}.inputs.{role}",
            f"set {wire.instance}.{wire.part} so that it is made, or {name} to do without it ({error.what})",
        ) from error
    return {"artifact": record.artifact, "part": wire.part, "digest": digest, "key": record.key}


def changes(
    before: ActionRecord, stage: Stage, settings: Mapping[str, Any], inputs: Mapping[str, Mapping[str, str | None]]
) -> list[str]:
    """What differs between a committed result and what is asked for now, one phrase each: old value → new value."""
    found: list[str] = []
    if before.stage != stage.name or before.version != stage.version:
        found.append(f"stage {before.stage} version {before.version} → {stage.name} version {stage.version}")
    old, new = flatten(before.settings), flatten(settings)
    for field in sorted(old.keys() | new.keys()):
        if old.get(field) != new.get(field):
            found.append(f"{field} {_short(old.get(field))} → {_short(new.get(field))}")
    for role in sorted(before.inputs.keys() | inputs.keys()):
        was, now = before.inputs.get(role, {}).get("digest"), inputs.get(role, {}).get("digest")
        if was != now:
            found.append(f"input {role} changed")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:8]}…" if isinstance(value, str) and len(text) == 64 else text


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings as one mapping of names: ``rewards[0].weight``. Lists of plain values stay whole."""
    if isinstance(value, Mapping):
        parts = {f"{name}.{key}" if name else key: inner for key, inner in value.items()}
    elif isinstance(value, list) and value and all(isinstance(inner, Mapping) for inner in value):
        parts = {f"{name}[{number}]": inner for number, inner in enumerate(value)}
    else:
        return {name: value}
    return {key: leaf for part, inner in parts.items() for key, leaf in flatten(inner, part).items()}
