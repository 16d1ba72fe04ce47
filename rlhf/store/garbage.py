"""Garbage collection: remove old results that no pipeline's ref and no live lease needs.

Mark and sweep in three phases: action records, manifests, blobs, each after the kind that refers to it is swept. In a
phase the condemned files are hidden first (a rename into ``trash/``), then everything that may refer to them is read
again, and only then are they deleted, or put back if something refers to them now. A commit does it the other way
round: it writes the reference, then looks whether the file that it refers to is there, and puts it again if it is not.
So whatever the order of the steps, the collector sees the reference or the writer sees the gap. A collection that is
killed leaves its trash to the next one, which decides about it by the same rule.
"""

import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TypeVar

from rlhf.errors import DamageError, LeaseHeldError
from rlhf.store import blobs
from rlhf.store.backend import Backend, LocalBackend, translated
from rlhf.store.blobs import FOLDER as BLOBS
from rlhf.store.blobs import blob_name
from rlhf.store.keys import ActionRecord, Manifest, Ref
from rlhf.store.lease import LEASE_SECONDS, Holder, hold
from rlhf.store.verify import action_name, lost_records, manifest_name

SCRATCH = ("inputs", "output", "checkpoints", "policy", "reward", "ray", "upload")
"""Folders of an attempt that a commit makes superfluous; logs and metrics stay."""
_SILENT_SECONDS = 10 * LEASE_SECONDS
"""Age, by the storage's clock, at which an unchanged lease file has no holder any more."""
_UNFINISHED_SECONDS = 3600.0
"""Age at which an unchanged unfinished write, or attempt without a lease, is abandoned, however short the grace."""
_SWEPT = ".swept-"
_Document = TypeVar("_Document", ActionRecord, Manifest)


@dataclass(frozen=True)
class Heap:
    """The number and the bytes of some files."""

    files: int = 0
    bytes: int = 0

    def __add__(self, other: "Heap") -> "Heap":
        return Heap(self.files + other.files, self.bytes + other.bytes)


@dataclass(frozen=True)
class GarbageReport:
    """The files that garbage collection removed, or would remove."""

    removed: dict[str, Heap]
    """By kind: records, manifests, blobs, copies, attempts, leases, quarantine, unfinished."""
    results: list[ActionRecord]
    """The results that were removed."""
    needed: dict[str, list[str]]
    """Pipeline to its stages that have a result, which stays with everything that it was made from."""
    kept: int
    """Number of results that stay."""
    young: int
    """Number of results that stay only because they are younger than the grace period."""
    kept_blobs: Heap


@dataclass
class GarbageCollection:
    """A removal of garbage older than ``grace`` seconds by the storage's own clock; a ``dry_run`` only reports it.

    work    the local folder of the attempts
    copies  this machine's copies of blobs, for a storage elsewhere, which has copies of attempts in turn
    """

    backend: Backend
    work: Path
    grace: float
    dry_run: bool
    copies: Backend | None
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def run(self) -> GarbageReport:
        """Collect. Raises DamageError, before any removal, if a damaged record, manifest or ref hides references."""
        # A bit flipped in a ref makes another key of it, and the result that it named would be garbage.
        for lost in lost_records(self.backend):
            raise _damaged(lost.file, lost.why)
        refs, records = self._refs(), self._records()
        self._read("manifests", Manifest)  # damage ends the collection before anything is touched
        live = self._live_leases()
        needed = _closure(records, {ref.key for ref in refs.values()} | live)
        young = {key for key in records.keys() - needed if not self._is_old(action_name(key))}
        kept = _closure(records, needed | young)
        gone = records.keys() - kept
        removed = {"records": self._sweep("actions", [action_name(key) for key in gone], self._wanted_records)}
        before = records
        if not self.dry_run:
            records = self._records()
            gone, kept = before.keys() - records.keys(), set(records)

        mentioned = _mentioned(records[key] for key in kept)
        # Files whose names are not as they should be are for verification to judge.
        names = [n for n in self.backend.names("manifests") if manifest_name(PurePosixPath(n).stem) == n]
        condemned = [name for name in names if name not in mentioned and self._is_old(name)]
        removed["manifests"] = self._sweep("manifests", condemned, lambda: _mentioned(self._records().values()))

        manifests = self._read("manifests", Manifest)
        owned = _owned(manifest for name, manifest in manifests.items() if name not in condemned)
        names = [n for n in self.backend.names(BLOBS) if blob_name(PurePosixPath(n).name) == n]
        condemned = [name for name in names if name not in owned and self._is_old(name)]
        kept_names = set(names) - set(condemned)
        kept_blobs = self._heap(kept_names)
        removed["blobs"] = self._sweep(BLOBS, condemned, lambda: _owned(self._read("manifests", Manifest).values()))
        removed["copies"] = self._sweep_copies(kept_names)

        removed["leases"] = self._sweep_leases()
        made_by = {key: records[key].attempt for key in kept}
        removed["attempts"] = self._sweep_work(live, made_by) + self._sweep_uploads(live, made_by)
        # The record that a ref names stays in quarantine: it shows that the loss of the result was reported.
        named = tuple(f"quarantine/{action_name(ref.key)}." for ref in refs.values())
        old = [n for n in self.backend.names("quarantine") if not n.startswith(named) and self._is_old(n)]
        removed["quarantine"] = self._remove(old)
        limit = max(self.grace, _UNFINISHED_SECONDS)
        removed["unfinished"] = self._remove(n for n in self.backend.unfinished() if self._is_old(n, limit))

        pipelines: dict[str, list[str]] = {}
        for name, ref in refs.items():
            if ref.key in records:
                pipelines.setdefault(PurePosixPath(name).parts[1], []).append(PurePosixPath(name).name)
        results = sorted((before[key] for key in gone), key=lambda record: (record.stage, record.key))
        return GarbageReport(removed, results, pipelines, len(kept), len(kept - needed), kept_blobs)

    # ---- references

    def _refs(self) -> dict[str, Ref]:
        read = {name: Ref.from_bytes(self.backend.read(name) or b"") for name in self.backend.names("refs")}
        return {name: ref for name, ref in read.items() if ref is not None}

    def _records(self) -> dict[str, ActionRecord]:
        return {record.key: record for record in self._read("actions", ActionRecord).values()}

    def _read(self, folder: str, kind: type[_Document]) -> dict[str, _Document]:
        """Read the files of a folder and those hidden from it: name, or name before it was hidden, to document."""
        # A file that is hidden or put back between two listings is in one of the three.
        names = {name: name for name in self.backend.names(folder)}
        names |= blobs.hidden(self.backend, folder)
        names |= {name: name for name in self.backend.names(folder)}
        documents: dict[str, _Document] = {}
        for name, original in names.items():
            if (data := self.backend.read(name)) is None:
                aside = [hidden for hidden, was in blobs.hidden(self.backend, folder).items() if was == original]
                data = next((d for other in [*aside, original] if (d := self.backend.read(other)) is not None), None)
            if data is not None:
                try:
                    documents.setdefault(original, kind.from_json(data))
                except DamageError as error:
                    raise _damaged(name, error.what) from error
        return documents

    def _wanted_records(self) -> set[str]:
        records = self._records()
        visible = {PurePosixPath(name).stem for name in self.backend.names("actions")}
        roots = visible | {ref.key for ref in self._refs().values()} | self._live_leases()
        return {action_name(key) for key in _closure(records, roots)}

    def _live_leases(self) -> set[str]:
        """Return the keys with a lease whose holder did not end and whose file was renewed lately."""
        live: set[str] = set()
        for name in self.backend.names("leases"):
            holder = Holder.from_json(self.backend.read(name) or b"")
            if not (holder is not None and holder.is_gone()) and not self._is_old(name, _SILENT_SECONDS):
                live.add(PurePosixPath(name).name)
        return live

    # ---- sweeping

    def _sweep(self, folder: str, condemned: Iterable[str], wanted: Callable[[], set[str]]) -> Heap:
        """Hide files, read the references again, and delete the files, or put back those that are ``wanted`` now."""
        sizes = {name: self._heap([name]) for name in condemned}
        if self.dry_run:
            return sum(sizes.values(), Heap())
        blobs.hide(self.backend, self.token, sizes)
        # Including the files that a killed collection left, and those that another one has hidden just now.
        hidden = blobs.hidden(self.backend, folder)
        stay = wanted() if hidden else set[str]()
        for aside, original in hidden.items():
            if original in stay:
                blobs.put_back(self.backend, aside, original)
                sizes.pop(original, None)
            else:
                self.backend.delete(aside)
        return sum(sizes.values(), Heap())

    def _sweep_work(self, live: set[str], kept: Mapping[str, str]) -> Heap:
        """Remove attempts: the parts that a commit made superfluous, and everything old at keys without a result.

        kept  key to the attempt whose logs and metrics are those of a result that stays
        """
        heap = Heap()
        with translated(self.work):
            if not self.work.is_dir():
                return heap
            before = LocalBackend(self.work).now() - max(self.grace, _UNFINISHED_SECONDS)
            for left in self.work.glob(f"{_SWEPT}*"):
                heap += self._discard(left)
            for folder in sorted(path for path in self.work.iterdir() if path.is_dir() and path.name not in live):
                if folder.name.startswith("."):
                    continue
                doomed = sorted(path for path in folder.iterdir() if path.is_dir())
                if (committed := kept.get(folder.name)) is not None:
                    doomed = [path for path in doomed if path.name != committed]
                    doomed += [path for name in SCRATCH if (path := folder / committed / name).is_dir()]
                else:
                    changed = {path: max(p.lstat().st_ctime for p in (path, *path.rglob("*"))) for path in doomed}
                    doomed = [path for path in doomed if changed[path] <= before]
                if self.dry_run:
                    heap += sum((self._discard(path) for path in doomed), Heap())
                elif doomed:
                    # If the lease is held, another process has begun to work on the key.
                    with suppress(LeaseHeldError), hold(self.backend, f"leases/{folder.name}", timeout=0):
                        heap += sum((self._discard(path) for path in doomed), Heap())
                        if not any(folder.iterdir()):
                            folder.rmdir()
        return heap

    def _sweep_uploads(self, live: set[str], kept: Mapping[str, str]) -> Heap:
        """Remove the uploaded files of attempts that are not kept on this machine either."""
        limit = max(self.grace, _UNFINISHED_SECONDS)
        doomed: list[str] = []
        for name in self.backend.names("work") if self.copies is not None else ():
            _, key, attempt, *inside = PurePosixPath(name).parts
            if key in live or (kept.get(key) == attempt and inside[0] not in SCRATCH):
                continue
            if key in kept or self._is_old(name, limit):
                doomed.append(name)
        return self._remove(doomed)

    def _sweep_copies(self, kept: set[str]) -> Heap:
        """Remove the copies of blobs that are not kept; a process that needs such a blob downloads it again."""
        heap = Heap()
        if self.copies is None or not (names := self.copies.names(BLOBS)):
            return heap
        # A younger copy may be that of a blob that was put after ``kept`` was listed.
        before = self.copies.now() - max(self.grace, _UNFINISHED_SECONDS)
        for name in names:
            state, stamped = self.copies.state(name), self.copies.stamped(name)
            if name not in kept and state is not None and stamped is not None and stamped <= before:
                heap += Heap(1, state.size)
                if not self.dry_run:
                    self.copies.delete(name)
        return heap

    def _discard(self, path: Path) -> Heap:
        """Remove a folder of an attempt, by a rename at once, so that no process sees a half of it.

        Return its files, and the bytes of those that are not blobs or inputs too: removing hard links frees nothing.
        """
        states = [file.lstat() for file in path.rglob("*") if file.is_file()]
        if not self.dry_run:
            aside = self.work / f"{_SWEPT}{secrets.token_hex(8)}"
            path.rename(aside)
            shutil.rmtree(aside)
        return Heap(len(states), sum(state.st_size for state in states if state.st_nlink == 1))

    def _sweep_leases(self) -> Heap:
        """Remove the leases without a live holder, and those left in the trash."""
        names, live = self.backend.names("leases"), self._live_leases()
        stale = [name for name in names if PurePosixPath(name).name not in live]
        judged = {name: self.backend.read(name) for name in stale}
        heap = self._heap(stale)
        if self.dry_run:
            return heap
        blobs.hide(self.backend, self.token, judged)
        for aside, original in blobs.hidden(self.backend, "leases").items():
            # Its holder moved the counter after all, or another process has taken it.
            if original in judged and (data := self.backend.read(aside)) not in (None, judged[original]):
                self.backend.create(original, data)
            self.backend.delete(aside)
        return heap

    def _remove(self, names: Iterable[str]) -> Heap:
        listed = list(names)
        heap = self._heap(listed)
        for name in listed if not self.dry_run else ():
            self.backend.delete(name)
        return heap

    # ---- sizes and ages

    @cached_property
    def _now(self) -> float:
        return self.backend.now()

    def _is_old(self, name: str, limit: float | None = None) -> bool:
        stamped = self.backend.stamped(name)
        # A file that is not in its place is in the trash, with the old ones.
        return stamped is None or self._now - stamped >= (self.grace if limit is None else limit)

    def _heap(self, names: Iterable[str]) -> Heap:
        states = [state for name in names if (state := self.backend.state(name)) is not None]
        return Heap(len(states), sum(state.size for state in states))


def _closure(records: Mapping[str, ActionRecord], roots: Iterable[str]) -> set[str]:
    """Return the keys of the records that are reached from ``roots`` through the inputs of results."""
    reached, todo = set[str](), list(roots)
    while todo:
        key = todo.pop()
        if key in records and key not in reached:
            reached.add(key)
            todo += [producer for source in records[key].inputs.values() if (producer := source["key"]) is not None]
    return reached


def _mentioned(records: Iterable[ActionRecord]) -> set[str]:
    """Return the names of the manifests of results and of the artifacts that these were made from."""
    digests: set[str | None] = set()
    for record in records:
        digests |= {record.artifact, *(source["artifact"] for source in record.inputs.values())}
    return {manifest_name(digest) for digest in digests if digest is not None}


def _owned(manifests: Iterable[Manifest]) -> set[str]:
    """Return the names of the blobs of artifacts."""
    return {blob_name(file.sha256) for manifest in manifests for file in manifest.files}


def _damaged(name: str, why: str) -> DamageError:
    return DamageError(
        f"Nothing can be removed while a file is damaged: {name} {why}.", where=name, next_step="rlhf verify --repair"
    )
