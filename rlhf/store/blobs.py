"""Files named by their SHA-256, and this node's memory of which of them it has already hashed."""

import os
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from rlhf.store.backend import Backend, FileState
from rlhf.store.records import PayloadFile
from rlhf.store.trash import is_there

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
