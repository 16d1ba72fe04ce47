"""All errors that a user meets.

    RlhfError                exit status 1, or that of the subclass
    ├── RequestError         2    SettingsError, RecordError, PreflightError
    ├── StageError           1    DivergedError, RewardError, KilledError, OutOfMemoryError, PreemptedError, HangError
    ├── DamageError          1
    ├── TryAgainError        75   DiskFullError, StoreUnreachableError (its subclass StoreRefusedError: 2),
    │                             IndexUnreachableError, LeaseHeldError, LeaseLostError, ClusterLostError
    └── InterruptedRunError  130

``rlhf/cluster/causes.py`` decides after which of them a stage's worker group is restarted. Every error says what is
wrong, where, and what to do next. The raw values stay in ``args``, so that an error raised on a worker pickles back to
the driver unchanged.
"""

import errno
import os
import shlex
from typing import ClassVar, NamedTuple

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT)


def is_no_room(error: BaseException) -> bool:
    """Return whether an error means that a file system, a quota or a limit on file sizes has no room left."""
    # Libraries such as safetensors keep the message alone.
    return getattr(error, "errno", None) in _NO_ROOM or os.strerror(errno.ENOSPC) in str(error)


def refused_cache(error: BaseException) -> "PreflightError | None":
    """Return the error for a cache of Hugging Face's libraries that cannot be written, if their error means that."""
    if not isinstance(error, OSError) or error.errno not in _NOT_WRITABLE or not error.filename:
        return None
    return PreflightError(
        f"the cache of Hugging Face's libraries cannot be written: {os.strerror(error.errno)}",
        str(error.filename),
        "set HF_HOME to a folder that you can write",
    )


class NextCommand(NamedTuple):
    """A command of this program to run next; the command line adds the pipeline file and settings of its own call."""

    command: str
    names: tuple[str, ...] = ()
    """Stages or files. Without any, a command that is repeated gets its previous names."""
    then: str = ""
    """The step after it, in words."""

    def __str__(self) -> str:
        return shlex.join(["rlhf", self.command, *self.names]) + (f", {self.then}" if self.then else "")


class RlhfError(Exception):
    """An error that the reader can act on: what is wrong, where it is, and what to do next."""

    exit_status: ClassVar[int] = 1

    def __init__(self, what: str, where: str = "", next_step: str | NextCommand = "") -> None:
        super().__init__(what, where, next_step)
        self.what = what
        """What is wrong, in one sentence."""
        self.where = where
        """File and line, row and field, or rank and host; empty without a place."""
        self.next_step = str(next_step)
        """The command to run or the change to make; empty if ``what`` already says it."""
        self.next_command = next_step if isinstance(next_step, NextCommand) else None
        """The next step if it is a command of this program, else None."""

    def __str__(self) -> str:
        where = f"\n  where: {self.where}" if self.where else ""
        return self.what + where + (f"\n  next:  {self.next_step}" if self.next_step else "")


class RequestError(RlhfError):
    """The request cannot be done as it is written."""

    exit_status = 2


class SettingsError(RequestError):
    """A setting is unknown, has the wrong type, or is impossible together with another."""


class RecordError(RequestError):
    """A row of the data is malformed."""


class PreflightError(RequestError):
    """The machine, the model and the data do not fit the settings."""


class StageError(RlhfError):
    """A stage failed while it ran."""


class DivergedError(StageError):
    """Training met a non-finite number or the policy collapsed; never retried, never cached as done."""


class RewardError(StageError):
    """A reward raised, was refused, or answered no scores; never retried, since it would fail again."""


class KilledError(StageError):
    """A process of the stage was killed or exited, without a message."""


class OutOfMemoryError(StageError):
    """A process of the stage ran out of memory, on its GPU or its node, or was killed for its use of memory."""


class PreemptedError(StageError):
    """A process of the stage was taken away: its node was lost, or the process was told to end."""


class HangError(StageError):
    """No process of the stage made progress within the time limit."""


class DamageError(RlhfError):
    """The store holds a file that does not match its digest."""


class TryAgainError(RlhfError):
    """The request is right, but its environment is not ready for it."""

    exit_status = 75


class DiskFullError(TryAgainError):
    """A file system has no room for what must be written."""


class StoreUnreachableError(TryAgainError):
    """The artifact store cannot be read or written."""


class StoreRefusedError(StoreUnreachableError):
    """The artifact store refuses the request: its address or the user's credentials are wrong."""

    exit_status = 2


class IndexUnreachableError(TryAgainError):
    """A package index or model hub did not answer."""


class LeaseHeldError(TryAgainError):
    """Another process is producing the same result."""


class LeaseLostError(TryAgainError):
    """Another process has taken over the result that this process was producing."""


class ClusterLostError(TryAgainError):
    """Ray has ended, or has no room for a stage."""


class InterruptedRunError(RlhfError):
    """The run was interrupted from the keyboard, or by SIGTERM."""

    exit_status = 130


def shortened(text: str, limit: int) -> str:
    """Return a text as one line of at most ``limit`` characters."""
    # Half a surrogate pair could not be written, and the error would be lost with it.
    text = " ".join(text.encode(errors="backslashreplace").decode().split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def size(count: float) -> str:
    """Return a number of bytes in GB, MB or kB (powers of 1000), the largest that gives at least 1."""
    for unit, bytes_of in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= bytes_of:
            return f"{count / bytes_of:.1f} {unit}"
    return f"{count:.0f} bytes"
