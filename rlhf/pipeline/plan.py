"""Plan a run: the key of every stage, from settings, inputs and sources."""

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Literal

from rlhf.config.base import semantic_values, suggestion
from rlhf.config.pipeline import PipelineConfig, StageInstance
from rlhf.errors import NextCommand, RequestError, SettingsError
from rlhf.pipeline.differences import Recipe, differences, of_record
from rlhf.pipeline.stage import Stage
from rlhf.store import ActionRecord, Ref, Store, digest_file, digest_of, key_of


def digest_source(path: str | Path, store: Store) -> str:
    """The digest of a file's content, or of a folder's files and their names.

    A file is read again only when its size or times changed; the store remembers.

    Raises:
        SettingsError: there is nothing at the path, or it is no file or folder with files, or cannot be read.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise SettingsError(f"there is no file or folder {path}", str(root), "correct the path")
    # A pipe or a device can be read once, or for ever.
    if not (root.is_file() or root.is_dir()):
        raise SettingsError(f"{path} is neither a file nor a folder", str(root), "put what it gives into a file")
    memory = store.root / "cache" / "sources.json"
    known = _recall(memory)
    before = len(known)
    digests: dict[str, str] = {}
    for file in sorted(_files(root)):
        try:
            stat = file.stat()
            # The time of the inode's change moves with every write, also where a copying program sets the other back.
            identity = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
            if identity not in known:
                known[identity] = digest_file(file)
        except OSError as error:
            raise SettingsError(f"{file} cannot be read: {error.strerror}", str(root), "make it readable") from error
        digests[str(file.relative_to(root)) if root.is_dir() else ""] = known[identity]
    if not digests:
        raise SettingsError(f"the folder {path} is empty", str(root), "correct the path")
    if len(known) > before:
        _remember(memory, known)
    return digest_of(digests)


def _recall(memory: Path) -> dict[str, str]:
    try:
        return json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}  # never written, or cut short: losing it costs reading the files again


def _remember(memory: Path, known: dict[str, str]) -> None:
    if not memory.parent.is_dir():
        return  # planning makes no store
    # A read-only store must stay readable.
    with suppress(OSError):
        temporary = memory.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(known))
        temporary.replace(memory)


def _files(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    for path in root.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            yield path


State = Literal["cached", "missing", "blocked", "unused"]
IMPORTED = "imported"
"""Why a stage is cached whose result somebody brought from outside."""


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
    before: ActionRecord | None
    """The latest result that is noted for the instance, under whatever key, whether or not it is still whole."""

    @property
    def name(self) -> str:
        """The instance's name."""
        return self.instance.name


def plan(
    config: PipelineConfig, known: Mapping[str, Stage], store: Store, targets: Sequence[str] = ()
) -> dict[str, Planned]:
    """Plan the targets and what they are made from, by name, producers before consumers.

    targets  stages to bring up to date; without any, those that no other stage reads

    Of a stage that only imported stages read nothing is looked at, neither its sources nor its result: it is *unused*.

    Raises:
        RequestError: a target is no stage of the pipeline.
        SettingsError: an input names no instance, or instances need each other in a circle.
    """
    wires = {name: _wires(config, instance, known) for name, instance in config.instances.items()}
    refs = store.refs(config.name)
    imported = {name for name, ref in refs.items() if ref.imported}
    order = _order(config, wires)
    read = {wire.instance for taken in wires.values() for wire in taken.values()}
    for target in targets:
        instance_of(config, target)
    wanted = targets or [name for name in order if name not in read]
    shown, needed = _upstream(wires, wanted, stop=()), _upstream(wires, wanted, stop=imported)
    planned: dict[str, Planned] = {}
    for name in order:
        if name in needed:
            instance = config.instances[name]
            planned[name] = _plan_one(instance, known[instance.uses], wires[name], planned, store, refs.get(name))
        elif name in shown:
            readers = [pin for pin in order if pin in imported & needed and name in _upstream(wires, [pin], stop=())]
            planned[name] = _unused(config.instances[name], known, wires[name], readers)
    return planned


def instance_of(config: PipelineConfig, name: str) -> StageInstance:
    """Return a stage of the pipeline by name.

    Raises:
        RequestError: the pipeline has no such stage.
    """
    if name not in config.instances:
        raise RequestError(f"the pipeline has no stage {name!r}", "command line", suggestion(name, config.instances))
    return config.instances[name]


def result_of(one: Planned) -> ActionRecord:
    """Return a stage's result.

    Raises:
        RequestError: it has none yet.
    """
    if one.record is None:
        raise RequestError(
            f"{one.name} has no result yet",
            f"stage {one.name}: {one.state}, {one.why}",
            NextCommand("run", (one.name,)),
        )
    return one.record


def _upstream(wires: Mapping[str, Mapping[str, Wire]], names: Iterable[str], stop: Collection[str]) -> set[str]:
    """Return the names and all that they are made from, without following the inputs of those in ``stop``."""
    reached: set[str] = set()
    ahead = list(names)
    while ahead:
        name = ahead.pop()
        if name not in reached:
            reached.add(name)
            ahead += [] if name in stop else [wire.instance for wire in wires[name].values()]
    return reached


def _unused(
    instance: StageInstance, known: Mapping[str, Stage], wires: Mapping[str, Wire], readers: Sequence[str]
) -> Planned:
    why = f"not needed: {', '.join(readers)} {'is' if len(readers) == 1 else 'are'} imported"
    return Planned(
        instance,
        known[instance.uses],
        wires,
        "unused",
        why,
        (),
        None,
        key=None,
        settings={},
        inputs={},
        record=None,
        before=None,
    )


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
    wires = {role: Wire.parse(instance.inputs.get(role, input_.default)) for role, input_ in roles.items()}
    for role, wire in wires.items():
        if wire.instance not in config.instances:
            raise SettingsError(
                f"{instance.name} needs {wire.instance!r} as its {role}, and the pipeline has no such stage",
                f"{config.path}, {instance.name}",
                f"add a section {wire.instance!r}, or name another with {instance.name}.inputs.{role}",
            )
        made, taken = known[config.instances[wire.instance].uses].kind, roles[role].kinds
        if taken and (made not in taken or wire.part):
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
        return Planned(instance, stage, wires, state, why, before=before, **(empty | found))

    # Read before the lookup, which moves the record of a damaged result away.
    before = store.action(ref.key) if ref else None
    latest = store.lookup(ref.key) if ref else None
    if ref is not None and ref.imported:
        if latest is None:
            return build("blocked", "the imported model is damaged or gone")
        return build("cached", IMPORTED, key=latest.key, record=latest)

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
        why = "new" if ref is None else "its latest result is gone"
        if ref is not None and store.is_quarantined(ref.key):
            why = "its latest result was damaged, and is in quarantine"
    else:
        digests = {role: entry["digest"] for role, entry in inputs.items()}
        # Without their makers: a table has no room for what is behind a changed input.
        now = Recipe(instance.name, stage.name, stage.version, settings, digests, None, lambda _: None)
        was = replace(of_record(before, store), maker=lambda _: None)
        why = "; ".join(one.phrase for one in differences(was, now)) or "its result was damaged"
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


def recipe(one: Planned, planned: Mapping[str, Planned], store: Store) -> Recipe:
    """What a stage's result is or will be made from, also where some of its inputs are still to be made."""
    if one.record is not None and one.why == IMPORTED:
        return of_record(one.record, store, one.name)
    made = {role: one.inputs.get(role) or _made_input(one, wire, planned, store) for role, wire in one.wires.items()}
    return Recipe(
        one.name,
        one.stage.name,
        one.stage.version,
        one.settings,
        {role: entry["digest"] for role, entry in made.items()},
        one.record.artifact if one.record else None,
        lambda role: recipe(planned[one.wires[role].instance], planned, store) if role in one.wires else None,
    )


def _made_input(one: Planned, wire: Wire, planned: Mapping[str, Planned], store: Store) -> Mapping[str, str | None]:
    if planned[wire.instance].record is None:
        return {"digest": None}
    return _input(one.name, "", wire, planned, store)
