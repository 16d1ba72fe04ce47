"""What garbage collection has hidden and not yet deleted: ``trash/<collection>/<name>``.

A file is hidden before anybody asks for the last time whether it is needed, so a reader that misses one brings it back.
Each collection hides under a name of its own and at most once: what another brought back is never deleted by mistake.
"""

from collections.abc import Iterable
from pathlib import PurePosixPath

from rlhf.errors import TryAgainError
from rlhf.store.backend import Backend

FOLDER = "trash"


def hide(backend: Backend, collection: str, names: Iterable[str]) -> None:
    """Move files into the trash."""
    for name in names:
        backend.move(name, f"{FOLDER}/{collection}/{name}")


def hidden(backend: Backend, folder: str) -> dict[str, str]:
    """Map each file in the trash that came from a folder to the name that it had."""
    found = {name: PurePosixPath(*PurePosixPath(name).parts[2:]).as_posix() for name in backend.names(FOLDER)}
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
