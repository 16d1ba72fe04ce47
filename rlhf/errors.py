"""The one family of errors that a user meets.

    RlhfError                       exit status 1
    ├── RequestError                2    what was asked for cannot be done as it is written
    │   ├── SettingsError           2    a setting is unknown, of the wrong type, or impossible beside another
    │   ├── RecordError             2    a row of the data is malformed
    │   └── PreflightError          2    the machine, model and data do not fit the settings
    ├── StageError                  1    a stage failed while it ran
    │   ├── DivergedError           1    training left the finite numbers, or the policy collapsed
    │   ├── RewardError             1    a reward raised, was refused, or answered no scores
    │   ├── KilledError             1    a process of the stage was killed
    │   ├── OutOfMemoryError        1    a process of the stage found no memory, or was killed for taking it
    │   ├── PreemptedError          1    a process of the stage was taken away together with its node
    │   └── HangError               1    no process of the stage got on
    ├── DamageError                 1    the store holds something that fails its digest
    ├── TryAgainError               75   nothing is wrong with the request; the world was not ready for it
    │   ├── DiskFullError           75
    │   ├── StoreUnreachableError   75
    │   │   └── StoreRefusedError   2    it answers, and will not be used as the settings and the environment say
    │   ├── IndexUnreachableError   75
    │   ├── LeaseHeldError          75
    │   ├── LeaseLostError          75
    │   └── ClusterLostError        75
    └── InterruptedRunError         130  Ctrl-C, or SIGTERM

Which of them a stage's worker group is started again after stands in ``rlhf/cluster/causes.py``. Every error says what
is wrong, where, and what to do next. The raw values stay in ``args``, so that an error raised on a worker pickles back
to the driver unchanged.
"""

import errno
import os
import shlex
from typing import ClassVar, NamedTuple

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT)


def is_no_room(error: BaseException) -> bool:
    """Whether an error says that a file system, a quota or a limit on files has no room left."""
    # Libraries such as safetensors keep the words alone.
    return getattr(error, "errno", None) in _NO_ROOM or os.strerror(errno.ENOSPC) in str(error)


def refused_cache(error: BaseException) -> "PreflightError | None":
    """Say that the cache of Hugging Face's libraries cannot be written, where an error of theirs comes from that."""
    if not isinstance(error, OSError) or error.errno not in _NOT_WRITABLE or not error.filename:
        return None
    return PreflightError(
        f"the cache of Hugging Face's libraries cannot be written: {os.strerror(error.errno)}",
        str(error.filename),
        "set HF_HOME to a folder that you can write",
    )


class NextCommand(NamedTuple):
    """A command of this program to type next; the command line adds the pipeline file and settings of its own call."""

    command: str
    names: tuple[str, ...] = ()
    """Stages or files. Without any, a command that is to be repeated gets those it was given."""
    then: str = ""
    """What to do after it, in words."""

    def __str__(self) -> str:
        return shlex.join(["rlhf", self.command, *self.names]) + (f", {self.then}" if self.then else "")


class RlhfError(Exception):
    """Something the reader can act on: what is wrong, where it is, and what to do next."""

    exit_status: ClassVar[int] = 1

    def __init__(self, what: str, where: str = "", next_step: str | NextCommand = "") -> None:
        super().__init__(what, where, next_step)

    @property
    def what(self) -> str:
        """What is wrong, in one sentence."""
        return self.args[0]

    @property
    def where(self) -> str:
        """File and line, row and field, or rank and host; empty where there is no place to name."""
        return self.args[1]

    @property
    def next_step(self) -> str:
        """The command to run or the thing to change; empty where ``what`` already says it."""
        return str(self.args[2])

    @property
    def next_command(self) -> NextCommand | None:
        """The next step, where it is a command of this program."""
        return self.args[2] if isinstance(self.args[2], NextCommand) else None

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.next_step:
            lines.append(f"  next:  {self.next_step}")
        return "\n".join(lines)


class RequestError(RlhfError):
    """What was asked for cannot be done as it is written."""

    exit_status = 2


class SettingsError(RequestError):
    """A setting is unknown, has the wrong type, or cannot stand beside another."""


class RecordError(RequestError):
    """A row of the data is malformed."""


class PreflightError(RequestError):
    """The machine, the model and the data do not fit the settings."""


class StageError(RlhfError):
    """A stage failed while it ran."""


class DivergedError(StageError):
    """Training left the finite numbers or the policy collapsed; never retried, never cached as done."""


class RewardError(StageError):
    """A reward raised, was refused, or answered no scores; never retried, since it would do so again."""


class KilledError(StageError):
    """A process of the stage was killed, or exited, without a word."""


class OutOfMemoryError(StageError):
    """A process of the stage found no memory, on its GPU or its node, or was killed for taking it."""


class PreemptedError(StageError):
    """A process of the stage was taken away: its node was lost, or it was told to end."""


class HangError(StageError):
    """No process of the stage got on for as long as one may take."""


class DamageError(RlhfError):
    """The store holds something that fails its digest."""


class TryAgainError(RlhfError):
    """Nothing is wrong with the request; the world was not ready for it."""

    exit_status = 75


class DiskFullError(TryAgainError):
    """A file system has no room for what must be written."""


class StoreUnreachableError(TryAgainError):
    """The artifact store cannot be read or written."""


class StoreRefusedError(StoreUnreachableError):
    """The artifact store will not be used in this way: what is at fault is its address, or who asks."""

    exit_status = 2


class IndexUnreachableError(TryAgainError):
    """A package index or model hub did not answer."""


class LeaseHeldError(TryAgainError):
    """Somebody else is producing the same result."""


class LeaseLostError(TryAgainError):
    """Somebody else has taken over what this process was producing."""


class ClusterLostError(TryAgainError):
    """Ray itself is gone, or has no room for a stage."""


class InterruptedRunError(RlhfError):
    """The run was interrupted from the keyboard, or by SIGTERM."""

    exit_status = 130


def size(count: float) -> str:
    """Return a number of bytes in the largest of GB, MB and kB (powers of 1000) of which there is at least 1."""
    for unit, bytes_of in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= bytes_of:
            return f"{count / bytes_of:.1f} {unit}"
    return f"{count:.0f} bytes"
