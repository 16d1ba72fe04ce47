"""The folder in which Ray keeps its sockets and logs on this machine, looked at before Ray is.

Ray itself answers a folder that it cannot use with a message that names no variable, or with silence for half a minute.
"""

import os
import shutil
import tempfile
from pathlib import Path

from rlhf.errors import DiskFullError, PreflightError, is_no_room, size

VARIABLES = ("RAY_TMPDIR", "TMPDIR")
"""Those that Ray goes by, in its order."""
_DEFAULT = "/tmp"  # noqa: S108 - Ray's own
_SOCKET_BYTES = 107
"""The longest path of a socket on Linux (unix(7), without the closing zero)."""
_ROOM_BYTES = 10**6
"""What Ray writes before it runs; with a tenth of that it does not start."""


def check_temporary_folder() -> None:
    """Refuse a temporary folder in which Ray would not start. An empty variable counts as one that is not set.

    Raises:
        PreflightError: its path is relative or too long for a socket, or it cannot be written.
        DiskFullError: it has no room.
    """
    for name in VARIABLES:
        if os.environ.get(name) == "":
            del os.environ[name]
    variable = next((name for name in VARIABLES if name in os.environ), None)
    folder = Path(os.environ[variable] if variable else _DEFAULT)
    where = f"{variable}={folder}" if variable else str(folder)
    change = "set RAY_TMPDIR to a folder on a disk with room that you can write"
    if not folder.is_absolute():
        raise PreflightError("Ray's temporary folder must have an absolute path", where, change)
    # Ray names a session after the time and this process, as in session_2026-11-28_04-10-39_943285_23890.
    socket = f"ray/session_{'x' * 26}_{os.getpid()}/sockets/plasma_store"
    if (length := len(os.fsencode(folder / socket))) > _SOCKET_BYTES:
        raise PreflightError(
            f"Ray's temporary folder has too long a path: its sockets' would take {length} bytes, and "
            f"{_SOCKET_BYTES} are allowed",
            where,
            f"set RAY_TMPDIR to one of at most {_SOCKET_BYTES - len(socket) - 1} bytes, {_DEFAULT} for instance",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # What is there already may be another user's.
        existing = folder / "ray" if (folder / "ray").exists() else folder
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"0")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        if not is_no_room(error):
            raise PreflightError(
                f"Ray's temporary folder cannot be written: {error.strerror or error}", where, change
            ) from error
        free = 0
    if free < _ROOM_BYTES:
        raise DiskFullError(f"Ray's temporary folder has no room: {size(free)} are free", where, change)
