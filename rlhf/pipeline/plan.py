"""Plan a run: the key of every stage, from settings, inputs and sources."""

import json
import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from rlhf.config.base import semantic_values, suggestion
from rlhf.config.pipeline import PipelineConfig, StageInstance, to_add
from rlhf.errors import NextCommand, RequestError, SettingsError
from rlhf.pipeline.differences import Recipe, differences, of_record
from rlhf.pipeline.stage import Stage
from rlhf.store import ActionRecord, Ref, Store, digest_file, digest_of, in_parallel, key_of


def digest_source(path: str | Path, store: Store) -> str:
    """Return the digest of a file's content, or of a folder's files and their names; hidden files do not count.

    A file is read again only when its size or times changed; the store keeps the digests.

    Raises:
        SettingsError: there is nothing at the path, or it is no file or folder with files, or cannot be read.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise SettingsError(f"there is no file or folder {path}", str(root), "correct the path")
    # A pipe or a device can be read once only, or without end.
    if not (root.is_file() or root.is_dir()):
        raise SettingsError(f"{path} is neither a file nor a folder", str(root), "put its content into a file")
    memory = store.root / "cache" / "sources.json"
    try:
        known: dict[str, str] = json.loads(memory.read_text())
    except (OSError, ValueError):
        known = {}  # never written, or cut short: then the files are read again
    before = len(known)
    digests: dict[str, str] = {}
    for file in [root] if root.is_file() else sorted(root.rglob("*")):
        name = "" if file == root else str(file.relative_to(root))
        if not file.is_file() or any(part.startswith(".") for part in Path(name).parts):
            continue
        try:
            stat = file.stat()
            # Every write moves ctime, even if the program that copies a file sets mtime back.
            identity = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
            if identity not in known:
                known[identity] = digest_file(file)
        except OSError as error:
            raise SettingsError(f"{file} cannot be read: {error.strerror}", str(root), "make it readable") from error
        digests[name] = known[identity]
    if not digests:
        raise SettingsError(f"the folder {path} is empty", str(root), "correct the path")
    if len(known) > before and memory.parent.is_dir():  # planning makes no store
        with suppress(OSError):  # the store may be read-only
            temporary = memory.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(known))
            temporary.replace(memory)
    return digest_of(digests)


State = Literal["cached", "missing", "blocked", "unused"]
_SOURCES = threading.Lock()
IMPORTED = "imported"
"""The ``why`` of a stage whose result was imported."""


@dataclass(frozen=True)
class Wire:
    """The source of an input: an instance, and a top-level folder of its artifact ("" for the whole artifact)."""

    instance: str
    part: str


@dataclass(frozen=True)
class Planned:
    """The state of a stage instance, by its settings and the store."""

    instance: StageInstance
    stage: Stage
    wires: Mapping[str, Wire]
    state: State
    why: str
    needs: tuple[str, ...] = ()
    """Instances whose results are not committed yet."""
    awaits: Path | None = None
    """A file that people must still make. A stage that is blocked by neither this nor ``needs`` is a lost import."""
    key: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The settings that enter the key."""
    inputs: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict[str, Mapping[str, str | None]])
    """As in :class:`rlhf.store.ActionRecord`; complete only if there is a key."""
    record: ActionRecord | None = None
    ref: Ref | None = None
    """The instance's ref when the plan was made."""
    before: ActionRecord | None = None
    """The instance's latest result according to its ref, under any key, whether or not it is still whole."""

    @property
    def name(self) -> str:
        """The instance's name."""
        return self.instance.name


def plan(
    config: PipelineConfig,
    known: Mapping[str, Stage],
    store: Store,
    targets: Sequence[str] = (),
    settled: Mapping[str, Planned] = MappingProxyType({}),
) -> dict[str, Planned]:
    """Plan the targets and the stages that they need; return them by name, producers before consumers.

    targets  stages to bring up to date; without any the pipeline's, and without these those that no other stage reads
    settled  stages of an earlier plan that are not looked at again

    A stage that only imported stages read is *unused*: neither its sources nor its result are looked at.

    Raises:
        RequestError: a target is no stage of the pipeline.
        SettingsError: an input names no instance, instances need each other in a circle, or settings of
            stages that are needed contradict each other.
    """
    wires = {name: _wires(config, instance, known) for name, instance in config.instances.items()}
    refs = {name: ref for name, one in settled.items() if (ref := one.ref) is not None}
    refs |= store.refs(config.name, except_for=settled)
    imported = {name for name, ref in refs.items() if ref.imported}
    # Lists, not sets: the order of a plan is the same in every process.
    graph = {name: [wire.instance for wire in wires[name].values()] for name in config.instances}
    waves = _waves(graph, config.path)
    order = [name for wave in waves for name in wave]
    targets = targets or config.targets
    for target in targets:
        instance_of(config, target, known)
    read = {name for inputs in graph.values() for name in inputs}
    wanted = targets or [name for name in order if name not in read]
    shown, needed = _upstream(graph, wanted, stop=()), _upstream(graph, wanted, stop=imported)
    for name in (one for one in order if one in needed):
        makers = {role: wire.instance for role, wire in wires[name].items() if wire.instance not in imported}
        for role, maker in list(makers.items()):
            own = wires[maker].items()
            makers |= {f"{role}/{inner}": wire.instance for inner, wire in own if wire.instance not in imported}
        _check_agreement(config, config.instances[name], known[config.instances[name].uses], makers)
    planned: dict[str, Planned] = {}

    def plan_one(name: str) -> Planned:
        instance = config.instances[name]
        stage = known[instance.uses]
        if name in settled:
            return settled[name]
        if name in needed:
            return _plan_one(instance, stage, wires[name], planned, store, refs.get(name))
        readers = [pin for pin in order if pin in imported & needed and name in _upstream(graph, [pin], stop=())]
        why = f"not needed: {', '.join(readers)} {'is' if len(readers) == 1 else 'are'} imported"
        return Planned(instance, stage, wires[name], "unused", why)

    for wave in waves:
        names = [name for name in wave if name in shown]
        # In parallel, since an object store takes its time for each.
        planned |= zip(names, in_parallel(plan_one, names), strict=True)
    return planned


def _waves(graph: Mapping[str, Sequence[str]], file: Path) -> list[tuple[str, ...]]:
    """Return the stages in waves, each of which needs only those before it; raise a SettingsError for a circle."""
    sorter, waves = TopologicalSorter(graph), list[tuple[str, ...]]()
    try:
        sorter.prepare()
    except CycleError as error:
        what = f"stages need each other in a circle: {' → '.join(error.args[1])}"
        raise SettingsError(what, str(file), "rewire their inputs") from error
    while sorter.is_active():
        waves.append(sorter.get_ready())
        sorter.done(*waves[-1])
    return waves


def _check_agreement(config: PipelineConfig, instance: StageInstance, stage: Stage, makers: Mapping[str, str]) -> None:
    settings = {role: config.instances[maker].settings for role, maker in makers.items()}
    if (found := stage.disagrees(instance.settings, settings)) is not None:
        raise SettingsError(f"{instance.name}.{found[0]}", f"{config.path}, {instance.name}", found[1])


def instance_of(config: PipelineConfig, name: str, known: Mapping[str, Stage]) -> StageInstance:
    """Return a stage of the pipeline by name; raise a RequestError when there is none."""
    if name not in config.instances:
        next_step = to_add(name, config.path, known, config.instances)
        raise RequestError(f"the pipeline has no stage {name!r}", "command line", next_step)
    return config.instances[name]


def result_of(planned: Planned) -> ActionRecord:
    """Return a stage's result; raise a RequestError when there is none yet."""
    if planned.record is None:
        raise RequestError(
            f"{planned.name} has no result yet",
            f"stage {planned.name}: {planned.state}, {planned.why}",
            NextCommand("run", (planned.name,)),
        )
    return planned.record


def _upstream(graph: Mapping[str, Sequence[str]], names: Iterable[str], stop: Collection[str]) -> set[str]:
    """Return the names and all stages that they need, without following the inputs of those in ``stop``."""
    reached: set[str] = set()
    ahead = list(names)
    while ahead:
        name = ahead.pop()
        if name not in reached:
            reached.add(name)
            ahead += [] if name in stop else graph[name]
    return reached


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
    sources = {role: instance.inputs.get(role, roles[role].default).partition("/") for role in roles}
    wires = {role: Wire(name, part) for role, (name, _, part) in sources.items()}
    for role, wire in wires.items():
        if wire.instance not in config.instances:
            add = to_add(wire.instance, config.path, known, config.instances)
            raise SettingsError(
                f"{instance.name} needs {wire.instance!r} as its {role}, and the pipeline has no such stage",
                f"{config.path}, {instance.name}",
                "; or ".join(filter(None, (add, f"name another with {instance.name}.inputs.{role}"))),
            )
        kind, kinds = known[config.instances[wire.instance].uses].kind, roles[role].kinds
        if kinds and (kind not in kinds or wire.part):
            given = f"{wire.instance}/{wire.part} is a part of" if wire.part else f"{wire.instance} is"
            raise SettingsError(
                f"{given} a {kind}, and {instance.name} takes a {' or '.join(kinds)} as its {role}",
                f"{config.path}, {instance.name}.inputs.{role}",
                f"name a stage that makes a {kinds[-1]}",
            )
    return wires


def _plan_one(
    instance: StageInstance,
    stage: Stage,
    wires: Mapping[str, Wire],
    planned: Mapping[str, Planned],
    store: Store,
    ref: Ref | None,
) -> Planned:
    # Read before the lookup, which moves the record of a damaged result away.
    before = store.action(ref.key) if ref else None
    latest = store.lookup(ref.key) if ref else None
    build = partial(Planned, instance, stage, wires, ref=ref, before=before)
    if ref is not None and ref.imported:
        if latest is None:
            return build("blocked", "the imported model is damaged or gone")
        return build("cached", IMPORTED, key=latest.key, record=latest)

    settings = semantic_values(instance.settings)
    awaits = stage.awaits(instance.settings)
    if awaits is not None:
        return build("blocked", f"waits for people: {awaits} is not there", awaits=awaits, settings=settings)
    with _SOURCES:  # stages that are planned beside each other often read the same files
        contents = {name: digest_source(path, store) for name, path in stage.sources(instance.settings).items()}
    if contents:
        settings["sources"] = contents
    needs = tuple(dict.fromkeys(wire.instance for wire in wires.values() if planned[wire.instance].record is None))
    if needs:
        return build("blocked", f"waits for {', '.join(needs)}", needs=needs, settings=settings)
    inputs = {role: _input(instance.name, role, wire, planned, store) for role, wire in wires.items()}
    digests = {role: str(entry["digest"]) for role, entry in inputs.items()}
    key = key_of(stage.name, stage.version, settings, digests)
    record = latest if latest and latest.key == key else store.lookup(key)
    if record is not None:
        return build("cached", "unchanged", key=key, settings=settings, inputs=inputs, record=record)
    if before is not None:
        # Without makers: a table has no room for the cause of a changed input.
        now = Recipe(instance.name, stage.name, stage.version, settings, digests, None, lambda _: None)
        was = replace(of_record(before, store), maker=lambda _: None)
        why = "; ".join(difference.phrase for difference in differences(was, now)) or "its result was damaged"
    elif ref is None:
        why = "new"
    elif store.is_quarantined(ref.key):
        why = "its latest result was damaged, and is in quarantine"
    else:
        why = "its latest result is gone"
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


def recipe(planned: Planned, stages: Mapping[str, Planned], store: Store) -> Recipe:
    """Return the recipe of a stage's present or future result; some of its inputs may still have to be made."""
    if planned.record is not None and planned.why == IMPORTED:
        return of_record(planned.record, store, planned.name)
    digests: dict[str, str | None] = {}
    for role, wire in planned.wires.items():
        entry = planned.inputs.get(role)
        if entry is None and stages[wire.instance].record is not None:
            entry = _input(planned.name, role, wire, stages, store)
        digests[role] = entry["digest"] if entry else None
    return Recipe(
        planned.name,
        planned.stage.name,
        planned.stage.version,
        planned.settings,
        digests,
        planned.record.artifact if planned.record else None,
        lambda role: recipe(stages[planned.wires[role].instance], stages, store) if role in planned.wires else None,
    )


def standing_in(stages: Mapping[str, Planned], name: str) -> str | None:
    """Return an instance's artifact, else that of the nearest committed model from which its training will start."""
    planned = stages[name]
    if planned.record is not None:
        return planned.record.artifact
    continues = planned.stage.continues
    return standing_in(stages, planned.wires[continues].instance) if continues else None
