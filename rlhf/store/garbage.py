"""Garbage collection: what no pipeline's ref and no live lease needs, and what is old, goes.

Mark and sweep in three phases, action records, manifests, blobs, each of the kind above already swept. In a phase the
condemned files are hidden first (a rename into ``trash/``), then everything that may refer to them is read anew, and
only then are they deleted, or put back where something refers to them now. A commit does it the other way round: it
writes the reference, then looks whether what it refers to is there, and puts it again where it is not. So whatever the
order of the steps, the collector sees the reference or the writer sees the gap. A collection that is killed leaves its
trash to the next, which decides about it by the same rule.
"""

import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Protocol, Self, TypeVar

from rlhf.errors import DamageError, LeaseHeldError
from rlhf.store import blobs
from rlhf.store.backend import Backend, LocalBackend, translated
from rlhf.store.blobs import FOLDER as BLOBS
from rlhf.store.blobs import blob_name
from rlhf.store.keys import ActionRecord, Manifest, Ref
from rlhf.store.lease import LEASE_SECONDS, Holder, hold
from rlhf.store.verify import action_name, lost_records, manifest_name

SCRATCH = ("inputs", "output", "checkpoints", "policy", "reward", "ray", "upload")
"""What a commit makes superfluous in an attempt; logs and metrics stay."""
_SILENT_SECONDS = 10 * LEASE_SECONDS
"""A lease whose file did not change for so long, by the storage's clock, is nobody's."""
_UNFINISHED_SECONDS = 3600.0
"""A write, or an attempt without a lease, in which nothing changed for so long is nobody's, however short the grace."""
_SWEPT = ".swept-"


@dataclass(frozen=True)
class Heap:
    """Some files."""

    files: int = 0
    bytes: int = 0

    def __add__(self, other: "Heap") -> "Heap":
        return Heap(self.files + other.files, self.bytes + other.bytes)


@dataclass(frozen=True)
class GarbageReport:
    """What garbage collection removed, or would remove."""

    removed: dict[str, Heap]
    """By kind: records, manifests, blobs, copies, attempts, leases, quarantine, unfinished."""
    results: list[ActionRecord]
    """The results that went."""
    needed: dict[str, list[str]]
    """Pipeline -> its stages that have a result, which stays with all that it was made from."""
    kept: int
    """Results that stay."""
    young: int
    """Those of them that stay only because they are younger than the grace period."""
    kept_blobs: Heap


class _Readable(Protocol):
    @classmethod
    def from_json(cls, data: bytes) -> Self: ...


_Document = TypeVar("_Document", bound=_Readable)


def collect(
    backend: Backend, work: Path, grace: float, *, dry_run: bool, copies: Backend | None = None
) -> GarbageReport:
    """Remove what is garbage and older than ``grace`` seconds by the storage's own clock, or only find it.

    work    the folder of the attempts, which is a local one
    copies  this machine's copies of blobs, for a storage elsewhere, which has copies of attempts in turn

    Raises DamageError where a damaged record, manifest or ref hides what it refers to: nothing is removed then.
    """
    return _Collection(backend, work, grace, dry_run, copies).run()


@dataclass
class _Collection:
    backend: Backend
    work: Path
    grace: float
    dry_run: bool
    copies: Backend | None
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def run(self) -> GarbageReport:
        # A bit flipped in a ref makes another key of it, and what it named would be garbage.
        for lost in lost_records(self.backend):
            raise _damaged(lost.file, lost.why)
        refs, records = self._refs(), self._records()
        self._manifests()  # damage ends it before anything is touched
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
        listed = self._names("manifests", lambda name: manifest_name(PurePosixPath(name).stem))
        condemned = [name for name in listed if name not in mentioned and self._is_old(name)]
        removed["manifests"] = self._sweep("manifests", condemned, self._wanted_manifests)

        owned = _owned(manifest for name, manifest in self._manifests().items() if name not in condemned)
        lying = self._names(BLOBS, lambda name: blob_name(PurePosixPath(name).name))
        condemned = [name for name in lying if name not in owned and self._is_old(name)]
        kept_lying = set(lying) - set(condemned)
        kept_blobs = self._heap(kept_lying)
        removed["blobs"] = self._sweep(BLOBS, condemned, self._wanted_blobs)
        removed["copies"] = self._sweep_copies(kept_lying)

        removed["leases"] = self._sweep_leases()
        made_by = {key: records[key].attempt for key in kept}
        removed["attempts"] = self._sweep_work(live, made_by) + self._sweep_uploads(live, made_by)
        # The record that a ref names stays in quarantine: it tells that the result was not lost unseen.
        told = tuple(f"quarantine/{action_name(ref.key)}." for ref in refs.values())
        old = [n for n in self.backend.names("quarantine") if not n.startswith(told) and self._is_old(n)]
        removed["quarantine"] = self._remove(old)
        limit = max(self.grace, _UNFINISHED_SECONDS)
        removed["unfinished"] = self._remove(n for n in self.backend.unfinished() if self._is_old(n, limit))

        pipelines: dict[str, list[str]] = {}
        for name, ref in refs.items():
            if ref.key in records:
                pipelines.setdefault(PurePosixPath(name).parts[1], []).append(PurePosixPath(name).name)
        results = sorted((before[key] for key in gone), key=lambda record: (record.stage, record.key))
        return GarbageReport(removed, results, pipelines, len(kept), len(kept - needed), kept_blobs)

    # ---- what refers to what

    def _refs(self) -> dict[str, Ref]:
        read = {name: Ref.from_bytes(self.backend.read(name) or b"") for name in self.backend.names("refs")}
        return {name: ref for name, ref in read.items() if ref is not None}

    def _records(self) -> dict[str, ActionRecord]:
        """All action records by key."""
        return {record.key: record for record in self._read("actions", ActionRecord).values()}

    def _manifests(self) -> dict[str, Manifest]:
        """All manifests by name."""
        return self._read("manifests", Manifest)

    def _read(self, folder: str, kind: type[_Document]) -> dict[str, _Document]:
        """Read the files of a folder and those hidden from it, by the names that they have or had."""
        # What is hidden or put back between two listings is in one of the three.
        names = {name: name for name in self.backend.names(folder)}
        names |= blobs.hidden(self.backend, folder)
        names |= {name: name for name in self.backend.names(folder)}
        found: dict[str, _Document] = {}
        for name, original in names.items():
            if (data := self.backend.read(name)) is None:
                aside = [one for one, was in blobs.hidden(self.backend, folder).items() if was == original]
                data = next((d for one in [*aside, original] if (d := self.backend.read(one)) is not None), None)
            if data is not None:
                try:
                    found.setdefault(original, kind.from_json(data))
                except DamageError as error:
                    raise _damaged(name, error.what) from error
        return found

    def _wanted_records(self) -> set[str]:
        records = self._records()
        visible = {PurePosixPath(name).stem for name in self.backend.names("actions")}
        roots = visible | {ref.key for ref in self._refs().values()} | self._live_leases()
        return {action_name(key) for key in _closure(records, roots)}

    def _wanted_manifests(self) -> set[str]:
        return _mentioned(self._records().values())

    def _wanted_blobs(self) -> set[str]:
        return _owned(self._manifests().values())

    def _live_leases(self) -> set[str]:
        """The keys that somebody works on: whose holder did not end, and whose lease was renewed lately."""
        live: set[str] = set()
        for name in self.backend.names("leases"):
            holder = Holder.from_json(self.backend.read(name) or b"")
            if not (holder is not None and holder.is_gone()) and not self._is_old(name, _SILENT_SECONDS):
                live.add(PurePosixPath(name).name)
        return live

    # ---- sweeping

    def _sweep(self, folder: str, condemned: Iterable[str], wanted: Callable[[], set[str]]) -> Heap:
        """Hide, read the references anew, and delete, or put back what is ``wanted`` now."""
        sizes = {name: self._heap([name]) for name in condemned}
        if self.dry_run:
            return sum(sizes.values(), Heap())
        blobs.hide(self.backend, self.token, sizes)
        # With what a killed collection left, and what another one has hidden just now.
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
        """Remove attempts: what a commit made superfluous, and all that is old at keys without a result.

        kept  key to the attempt whose logs and metrics are those of a result that stays
        """
        done = Heap()
        local = LocalBackend(self.work)
        with translated(self.work):
            if not self.work.is_dir():
                return done
            before = local.now() - max(self.grace, _UNFINISHED_SECONDS)
            for left in self.work.glob(f"{_SWEPT}*"):
                done += self._discard(left)
            for folder in sorted(path for path in self.work.iterdir() if path.is_dir() and path.name not in live):
                if folder.name.startswith("."):
                    continue
                doomed = _superfluous(folder, kept.get(folder.name), before)
                if not doomed:
                    continue
                if self.dry_run:
                    done += sum((_heap_under(path) for path in doomed), Heap())
                    continue
                try:
                    with hold(self.backend, f"leases/{folder.name}", timeout=0, on_wait=None):
                        done += sum((self._discard(path) for path in doomed), Heap())
                        if not any(folder.iterdir()):
                            folder.rmdir()
                except LeaseHeldError:
                    continue  # somebody has begun to work on it
        return done

    def _sweep_uploads(self, live: set[str], kept: Mapping[str, str]) -> Heap:
        """Remove the copies of what of attempts is not kept here either."""
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
        """Remove the copies of blobs that are not kept; whoever needs one after all downloads it again."""
        done = Heap()
        if self.copies is None or not (lying := self.copies.names(BLOBS)):
            return done
        # A younger one may be that of a blob that was put after we looked.
        before = self.copies.now() - max(self.grace, _UNFINISHED_SECONDS)
        for name in lying:
            state, stamped = self.copies.state(name), self.copies.stamped(name)
            if name not in kept and state is not None and stamped is not None and stamped <= before:
                done += Heap(1, state.size)
                if not self.dry_run:
                    self.copies.delete(name)
        return done

    def _discard(self, path: Path) -> Heap:
        """Remove a folder of an attempt: by a rename at once, so that nobody sees a half of it."""
        heap = _heap_under(path)
        if not self.dry_run:
            aside = self.work / f"{_SWEPT}{secrets.token_hex(8)}"
            path.rename(aside)
            shutil.rmtree(aside)
        return heap

    def _sweep_leases(self) -> Heap:
        """Remove the leases of nobody, and what is left of leases in the trash."""
        listed, live = self.backend.names("leases"), self._live_leases()
        stale = [name for name in listed if PurePosixPath(name).name not in live]
        judged = {name: self.backend.read(name) for name in stale}
        done = self._heap(stale)
        if self.dry_run:
            return done
        blobs.hide(self.backend, self.token, judged)
        for aside, original in blobs.hidden(self.backend, "leases").items():
            # Its holder moved the counter after all, or another has taken it.
            if original in judged and (data := self.backend.read(aside)) not in (None, judged[original]):
                self.backend.create(original, data)
            self.backend.delete(aside)
        return done

    def _remove(self, names: Iterable[str]) -> Heap:
        listed = list(names)
        done = self._heap(listed)
        for name in listed if not self.dry_run else ():
            self.backend.delete(name)
        return done

    # ---- sizes and ages

    @cached_property
    def _now(self) -> float:
        return self.backend.now()

    def _is_old(self, name: str, limit: float | None = None) -> bool:
        stamped = self.backend.stamped(name)
        # What is not in its place is in the trash, where the old is.
        return stamped is None or self._now - stamped >= (self.grace if limit is None else limit)

    def _names(self, folder: str, proper: Callable[[str], str]) -> list[str]:
        """List the files whose names are as they should be; others are for verification to judge."""
        return [name for name in self.backend.names(folder) if proper(name) == name]

    def _heap(self, names: Iterable[str]) -> Heap:
        states = [state for name in names if (state := self.backend.state(name)) is not None]
        return Heap(len(states), sum(state.size for state in states))


def _closure(records: Mapping[str, ActionRecord], roots: Iterable[str]) -> set[str]:
    """The keys of the records that are reached from some keys through what results were made from."""
    found, todo = set[str](), list(roots)
    while todo:
        key = todo.pop()
        if key in records and key not in found:
            found.add(key)
            todo += [producer for source in records[key].inputs.values() if (producer := source["key"]) is not None]
    return found


def _mentioned(records: Iterable[ActionRecord]) -> set[str]:
    """The names of the manifests of some results and of what these were made from."""
    found: set[str] = set()
    for record in records:
        found.add(manifest_name(record.artifact))
        found.update(manifest_name(digest) for one in record.inputs.values() if (digest := one["artifact"]) is not None)
    return found


def _owned(manifests: Iterable[Manifest]) -> set[str]:
    """The names of some artifacts' blobs."""
    return {blob_name(file.sha256) for manifest in manifests for file in manifest.files}


def _superfluous(folder: Path, committed: str | None, before: float) -> list[Path]:
    """What may go of a key's folder of attempts.

    committed  the attempt that made its result; None where there is no result, and only old attempts may go
    before     seconds by the file system's clock
    """
    attempts = sorted(path for path in folder.iterdir() if path.is_dir())
    if committed is None:
        return [path for path in attempts if _newest(path) <= before]
    superfluous = [path for path in attempts if path.name != committed]
    return superfluous + [path for name in SCRATCH if (path := folder / committed / name).is_dir()]


def _newest(folder: Path) -> float:
    """When something in a folder changed last, in seconds by the file system's clock."""
    return max(path.lstat().st_ctime for path in (folder, *folder.rglob("*")))


def _heap_under(folder: Path) -> Heap:
    """Count a folder's files, and the bytes of those that are not blobs or inputs too: hard links free nothing."""
    states = [path.lstat() for path in folder.rglob("*") if path.is_file()]
    return Heap(len(states), sum(state.st_size for state in states if state.st_nlink == 1))


def _damaged(name: str, why: str) -> DamageError:
    return DamageError(
        f"Garbage cannot be told from what is needed: {name} {why}.", where=name, next_step="rlhf verify --repair"
    )
