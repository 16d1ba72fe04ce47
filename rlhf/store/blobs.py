"""Blobs: files by their digest, which files may be stored, and the trash that hides condemned files.

The trash is ``trash/<collection>/<name>``. A file is hidden before anybody asks for the last time whether it is needed,
so a reader that misses one brings it back. Each collection hides under a name of its own and at most once: what another
brought back is never deleted by mistake.
"""

import os
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TypeVar

from rlhf.errors import DamageError, RequestError, TryAgainError
from rlhf.store.backend import Backend, FileState
from rlhf.store.keys import PayloadFile, refuse_escape

ALLOWED_SUFFIXES = frozenset({".safetensors", ".json", ".jsonl", ".parquet", ".txt", ".md", ".jinja", ".model", ".svg"})
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"})


def payload_paths(folder: Path) -> dict[str, Path]:
    """Find every file of a payload folder: relative POSIX path -> path, sorted.

    Raises RequestError for a symbolic link, an empty folder, anything that is neither file nor folder, and a file type
    that an artifact must not hold.
    """
    if not folder.is_dir():
        raise _refused(folder, "is not a folder", "Give the folder that holds the artifact's files.")
    found: dict[str, Path] = {}
    _collect(folder, "", found)
    return dict(sorted(found.items()))


def _collect(folder: Path, prefix: str, found: dict[str, Path]) -> None:
    with os.scandir(folder) as listing:
        entries = list(listing)
    if not entries:
        raise _refused(folder, "is empty", "Write the result into it, or remove it: an artifact holds files only.")
    for entry in entries:
        path, name = Path(entry.path), prefix + entry.name
        if entry.is_symlink():
            raise _refused(path, "is a symbolic link", "Put the file itself there.")
        if entry.is_dir():
            _collect(path, f"{name}/", found)
        elif not entry.is_file():
            raise _refused(path, "is neither a file nor a folder", "Remove it.")
        else:
            _refuse_type(path)
            try:
                refuse_escape(name)
            except DamageError as error:
                raise _refused(path, error.what, "Rename the file.") from error
            found[name] = path


def _refuse_type(path: Path) -> None:
    if path.suffix in PICKLE_SUFFIXES:
        raise _refused(
            path,
            "may be a pickle, which runs code when it is loaded",
            "Save tensors with safetensors (save_pretrained does), all else as JSON, JSONL, Parquet or text.",
        )
    if path.suffix not in ALLOWED_SUFFIXES:
        raise _refused(
            path,
            f"is of a type that no artifact holds ({path.suffix or 'no suffix'})",
            f"Use {_listed(ALLOWED_SUFFIXES)}.",
        )


def _listed(suffixes: frozenset[str]) -> str:
    *most, last = sorted(suffixes)
    return f"{', '.join(most)} or {last}"


def _refused(path: Path, why: str, next_step: str) -> RequestError:
    return RequestError(f"{path.name!r} cannot go into an artifact: it {why}.", where=str(path), next_step=next_step)


TRASH = "trash"


def hide(backend: Backend, collection: str, names: Iterable[str]) -> None:
    """Move files into the trash."""
    for name in names:
        backend.move(name, f"{TRASH}/{collection}/{name}")


def hidden(backend: Backend, folder: str) -> dict[str, str]:
    """Map each file in the trash that came from a folder to the name that it had."""
    found = {name: PurePosixPath(*PurePosixPath(name).parts[2:]).as_posix() for name in backend.names(TRASH)}
    return {name: original for name, original in found.items() if original.startswith(f"{folder}/")}


def put_back(backend: Backend, name: str, original: str) -> None:
    """Give a hidden file its own name again, unless that has been written anew: then the new one stays."""
    if original.startswith("blobs/"):
        # A rename would put it in another's place, which at worst is one good copy for another.
        if backend.state(original) is None:
            backend.move(name, original)
    elif (data := backend.read(name)) is not None:
        backend.create(original, data)
    backend.delete(name)


def is_there(backend: Backend, name: str) -> bool:
    """Tell whether a file is in its place, after bringing it back if it is hidden."""
    if backend.state(name) is not None:
        return True
    try:
        for aside, original in hidden(backend, PurePosixPath(name).parts[0]).items():
            if original == name:
                put_back(backend, aside, original)
    except TryAgainError:  # a store that cannot be written has it missing
        return False
    return backend.state(name) is not None


FOLDER = "blobs/sha256"
_HASHING_THREADS = 8
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def blob_name(sha256: str) -> str:
    """Say where a blob lies."""
    return f"{FOLDER}/{sha256[:2]}/{sha256}"


def in_parallel(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """Map with a few threads: hashing leaves the interpreter's lock alone."""
    todo = list(items)
    if len(todo) < 2:
        return [function(item) for item in todo]
    with ThreadPoolExecutor(min(_HASHING_THREADS, len(todo))) as pool:
        return list(pool.map(function, todo))


class Blobs:
    """The blobs of one store, read from one node."""

    def __init__(self, backend: Backend, cache: Path) -> None:
        self._backend = backend
        self._memory = cache / "verified" / "".join(c if c.isalnum() else "-" for c in socket.gethostname())
        self._verified: dict[str, FileState] | None = None

    def damaged(self, files: Iterable[PayloadFile], *, trust_memory: bool = True) -> dict[str, str]:
        """Find the blobs of files that are missing or not what they should be: SHA-256 -> why.

        Sizes are always compared. A blob is read unless the storage keeps its writer's note of the digest, or this node
        has hashed it before and its state is the same since; with ``trust_memory`` off all are read, and nothing is
        remembered.
        """
        bad: dict[str, str] = {}
        unread: dict[str, FileState] = {}
        sizes = {file.sha256: file.size for file in files}
        # At once, since an object store takes its time for each.
        states = in_parallel(self._state, sizes)
        for (sha256, size), state in zip(sizes.items(), states, strict=True):
            if state is None:
                bad[sha256] = "is missing"
            elif state.size != size:
                bad[sha256] = f"has {state.size} bytes, not {size}"
            elif not (trust_memory and (state.sha256 == sha256 or self._remembered().get(sha256) == state)):
                unread[sha256] = state
        for sha256, found in zip(
            unread, in_parallel(lambda s: self._backend.digest(blob_name(s)), unread), strict=True
        ):
            if found != sha256:
                bad[sha256] = f"has the digest {found}" if found else "is missing"
        if trust_memory:
            self.remember({sha256: state for sha256, state in unread.items() if sha256 not in bad})
        return bad

    def _state(self, sha256: str) -> FileState | None:
        """The state of a blob, after bringing it back where garbage collection has hidden it."""
        name = blob_name(sha256)
        state = self._backend.state(name)
        return self._backend.state(name) if state is None and is_there(self._backend, name) else state

    def remember(self, hashed: dict[str, FileState]) -> None:
        """Note that blobs in these states were hashed here and are right."""
        if not hashed:
            return
        self._remembered().update(hashed)
        lines = "".join(f"{sha256} {state.size} {state.version}\n" for sha256, state in hashed.items())
        # Losing this file costs hashing again and nothing else, and a read-only store must stay readable.
        with suppress(OSError):
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._memory, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, lines.encode())
            finally:
                os.close(descriptor)

    def _remembered(self) -> dict[str, FileState]:
        if self._verified is None:
            self._verified = {}
            with suppress(OSError):
                for line in self._memory.read_text().splitlines():
                    fields = line.split(" ")
                    if len(fields) == 3 and fields[1].isdigit():  # a line cut short by a crash is no evidence
                        self._verified[fields[0]] = FileState(int(fields[1]), fields[2])
        return self._verified
