"""Keys, the files that an artifact may hold, and the documents of a store: manifests, action records and refs."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self, cast

from rlhf.errors import DamageError, RequestError, RlhfError

DIGEST = re.compile(r"[0-9a-f]{64}")
ALLOWED_SUFFIXES = (".jinja", ".json", ".jsonl", ".md", ".model", ".parquet", ".safetensors", ".svg", ".txt")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ATTEMPT = re.compile(r"[A-Za-z0-9-]+")
_IMPORTED = "imported"


def canonical_json(value: object) -> bytes:
    """Return a value's only JSON text: sorted keys, no whitespace, UTF-8, the shortest floats that read back.

    Keys sort by code point. 1, 1.0 and true are three values; a tuple is written as a list. Raises RequestError, naming
    the place, for a value without a stable form: NaN and infinities, keys that are no strings, unpaired surrogates, and
    every type that JSON does not have.
    """
    try:
        _refuse_unstable(value, "value")
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise _unstable("value", "is nested too deeply or holds itself") from None
    except ValueError as error:  # an integer of more digits than Python writes
        raise _unstable("value", f"cannot be written: {error}") from error
    return text.encode()


def digest_of(value: object) -> str:
    """Return the SHA-256 of a value's canonical JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def digest_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits. Raises OSError if the file cannot be read."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(stage: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return the key of a stage's result.

    ``settings`` are the semantic settings only; ``inputs`` maps each role to the digest of the artifact, or of the part
    of an artifact, that the stage reads.
    """
    return digest_of({"stage": stage, "version": version, "settings": dict(settings), "inputs": dict(inputs)})


def _refuse_unstable(value: object, place: str) -> None:
    if value is None or isinstance(value, bool | int):
        return
    if isinstance(value, str):
        if _SURROGATE.search(value):
            raise _unstable(place, "is text with an unpaired surrogate")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _unstable(place, f"is {value}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(cast("list[object]", value)):
            _refuse_unstable(item, f"{place}[{index}]")
    elif isinstance(value, dict):
        for name, item in cast("dict[object, object]", value).items():
            if not isinstance(name, str):
                raise _unstable(place, f"has a key of type {type(name).__name__}, {name!r}")
            _refuse_unstable(name, f"{place}: key {name!r}")
            _refuse_unstable(item, f"{place}.{name}")
    else:
        raise _unstable(place, f"is of type {type(value).__name__}")


def _unstable(place: str, why: str) -> RequestError:
    return RequestError(
        f"What must be hashed has no stable form: {place} {why}.",
        where=place,
        next_step="Use finite numbers, text, true, false, null, lists, and objects whose keys are text.",
    )


@dataclass(frozen=True)
class PayloadFile:
    """One file of an artifact."""

    path: str
    """Relative POSIX path within the artifact."""
    size: int
    """Bytes."""
    sha256: str


def payload_paths(folder: Path) -> dict[str, Path]:
    """Map the relative POSIX path of every file of a payload folder to its path, sorted.

    Raises RequestError for a symbolic link, an empty folder, anything that is neither file nor folder, and a file type
    that an artifact must not hold.
    """
    if not folder.is_dir():
        raise _refused(folder, "is not a folder", "Give the folder that holds the artifact's files.")
    paths: dict[str, Path] = {}
    folders = [(folder, "")]
    for parent, prefix in folders:
        with os.scandir(parent) as listing:
            entries = list(listing)
        if not entries:
            raise _refused(parent, "is empty", "Write the result into it, or remove it: an artifact holds files only.")
        for entry in entries:
            path, name = Path(entry.path), prefix + entry.name
            if entry.is_symlink():
                raise _refused(path, "is a symbolic link", "Put the file itself there.")
            if entry.is_dir():
                folders.append((path, f"{name}/"))
            elif not entry.is_file():
                raise _refused(path, "is neither a file nor a folder", "Remove it.")
            elif path.suffix in PICKLE_SUFFIXES:
                raise _refused(
                    path,
                    "may be a pickle, which runs code when it is loaded",
                    "Save tensors with safetensors (save_pretrained does), all else as JSON, JSONL, Parquet or text.",
                )
            elif path.suffix not in ALLOWED_SUFFIXES:
                raise _refused(
                    path,
                    f"is of a type that no artifact holds ({path.suffix or 'no suffix'})",
                    f"Use {', '.join(ALLOWED_SUFFIXES[:-1])} or {ALLOWED_SUFFIXES[-1]}.",
                )
            else:
                try:
                    _refuse_escape(name)
                except DamageError as error:
                    raise _refused(path, error.what, "Rename the file.") from error
                paths[name] = path
    return dict(sorted(paths.items()))


def _refused(path: Path, why: str, next_step: str) -> RequestError:
    return RequestError(f"{path.name!r} cannot go into an artifact: it {why}.", where=str(path), next_step=next_step)


@dataclass(frozen=True)
class Manifest:
    """An artifact: its kind and its files. The digest covers both, and nothing else."""

    digest: str
    kind: str
    files: tuple[PayloadFile, ...]
    """Sorted by path."""

    @classmethod
    def of(cls, kind: str, files: Iterable[PayloadFile]) -> Self:
        """Return the manifest of a payload."""
        ordered = tuple(sorted(files, key=lambda file: file.path))
        return cls(digest_of(_content(kind, ordered)), kind, ordered)

    def part(self, part: str) -> tuple[PayloadFile, ...]:
        """Return the files of one top-level folder, with paths relative to it; all files for "".

        Raises RequestError if the artifact has no such folder.
        """
        if part == "":
            return self.files
        inside = [file for file in self.files if file.path.startswith(f"{part}/")]
        if not inside or "/" in part:
            folders = sorted({file.path.split("/")[0] for file in self.files if "/" in file.path})
            raise RequestError(
                f"The artifact has no folder {part!r}; it has {', '.join(folders) or 'no folder'}.",
                where=f"artifact {self.digest} ({self.kind})",
                next_step="Ask for one of its top-level folders, or for the whole artifact.",
            )
        return tuple(PayloadFile(file.path[len(part) + 1 :], file.size, file.sha256) for file in inside)

    def part_digest(self, part: str) -> str:
        """Return the digest that the artifact would have if it held this folder only; for "" its own digest.

        A stage that reads one folder is keyed by that folder only. Raises RequestError if there is no such folder.
        """
        return digest_of(_content(self.kind, self.part(part)))

    def to_json(self) -> bytes:
        """Return the contents of the manifest's file."""
        return seal(_content(self.kind, self.files))

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read a manifest from its file's contents. Raises DamageError unless every byte is as it was written."""
        content = unseal(data)
        try:
            manifest = cls.of(content["kind"], [PayloadFile(**file) for file in content["files"]])
        except (KeyError, TypeError) as error:
            raise DamageError(f"does not have a manifest's fields ({error})") from error
        for file in manifest.files:
            _refuse_escape(file.path)
            _refuse_no_digest(file.sha256)
        return manifest


@dataclass(frozen=True)
class ActionRecord:
    """The commit of a key: its artifact, and how that was made."""

    key: str
    stage: str
    version: int
    settings: dict[str, Any]
    """The semantic settings, which are in the key."""
    inputs: dict[str, dict[str, str | None]]
    """Role -> ``artifact`` (digest), ``part`` (folder, "" for all of it), ``digest`` (of the part), ``key`` (of the
    action that made it, or None)."""
    artifact: str
    metrics: dict[str, float]
    """Final metrics."""
    provenance: dict[str, Any]
    seconds: float
    """Duration of the attempt that made it."""
    attempt: str
    """Name of that attempt."""

    def to_json(self) -> bytes:
        """Return the contents of the record's file. Raises RequestError for a value such as a NaN metric."""
        return seal(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read a record from its file's contents. Raises DamageError unless every byte is as it was written."""
        try:
            record = cls(**unseal(data))
            digests = [entry[field] for entry in record.inputs.values() for field in ("artifact", "digest", "key")]
        except (TypeError, KeyError, AttributeError) as error:
            raise DamageError(f"does not have an action record's fields ({error})") from error
        for digest in (record.key, record.artifact, *(digest for digest in digests if digest is not None)):
            _refuse_no_digest(digest)
        if not _ATTEMPT.fullmatch(str(record.attempt)):
            raise DamageError(f"names no valid attempt: {record.attempt!r}")
        return record


@dataclass(frozen=True)
class Ref:
    """The newest result of a pipeline's stage."""

    key: str
    imported: bool
    """Whether the user imported it as the stage's result, whatever the settings are."""

    def to_bytes(self) -> bytes:
        """Return the contents of the ref's file."""
        return f"{self.key} {_IMPORTED}\n".encode() if self.imported else f"{self.key}\n".encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Ref | None":
        """Read a ref from its file's contents; None if they hold no key."""
        key, *words = data.decode(errors="replace").split() or [""]
        return cls(key, bool(words)) if DIGEST.fullmatch(key) and words in ([], [_IMPORTED]) else None


def _refuse_escape(path: Any) -> None:
    """Raise DamageError unless a payload path stays within its folder."""
    parts = PurePosixPath(path).parts if isinstance(path, str) else ()
    # Names are printed too, where control characters could do harm.
    if (
        not parts
        or path[0] == "/"
        or ".." in parts
        or "\\" in path
        or not path.isprintable()
        or "/".join(parts) != path
    ):
        raise DamageError(f"names a file that would lie outside the artifact: {path!r}")


def _refuse_no_digest(digest: Any) -> None:
    """Raise DamageError unless a value is a SHA-256, since it becomes the name of a file of the store."""
    if not (isinstance(digest, str) and DIGEST.fullmatch(digest)):
        raise DamageError(f"names no valid digest: {digest!r}")


def _content(kind: str, files: Iterable[PayloadFile]) -> dict[str, Any]:
    return {"kind": kind, "files": [asdict(file) for file in files]}


def seal(content: dict[str, Any]) -> bytes:
    """Return content as canonical JSON that holds its own digest."""
    return canonical_json({"digest": digest_of(content), **content}) + b"\n"


def unseal(data: bytes) -> dict[str, Any]:
    """Read sealed content. Raises DamageError unless sealing it again gives the same bytes: no bit is missed."""
    try:
        document: object = json.loads(data)
        if isinstance(document, dict):
            content = cast("dict[str, Any]", document)
            content.pop("digest", None)
            if seal(content) == data:
                return content
    except (ValueError, RecursionError, RlhfError):
        pass  # not JSON, or JSON that is never written here
    raise DamageError("fails its own digest")
