"""The folder of an attempt: every file by which driver, ranks and stage inform each other and the user.

    file                              written by                                  read by
    inputs/<role>/                    driver: the artifacts, checked out          stage
    output/                           stage: the artifact's payload               driver, at the commit
    resources.json                    driver: ranks and GPUs of the attempt       driver, at this and later commits
    stop                              driver: save at the next step, and stop     rank 0
    failure.json                      driver: the error that ended the attempt    rlhf/history
    upload/                           driver: links to the checkpoint that it uploads to a bucket
    result.json                       rank 0: the final metrics                   driver
    pulse-<rank>.json                 each rank, in liveness: step, process, log  driver: watchdog, causes
    stack-<rank>.trace                each rank's fault handler, when it hangs    driver: watchdog
    failure-<rank>.json               each rank that raised: its error            driver: causes
    device-<rank>.json                each rank: host and device                  driver, at the commit
    log-<rank>.txt                    each rank: all that it prints               user; driver: causes, for a crash
    checkpoints/checkpoint-<step>/    all ranks; rank 0 completes it              ranks that resume; driver: uploads
    micro-batch.json                  rank 0: the size that it chose for a GPU    driver: causes, for a lack of memory
    progress.json                     stage: message, steps done, when            driver, rlhf/history
    notes.jsonl                       stage: lines for the user                   driver, rlhf/history
    origin.json                       stage: where external things came from      driver, at the commit
    quarantine-<kind>.jsonl           stage: malformed rows                       user
    metrics.jsonl samples.jsonl       stage's rank 0: its journal                 rlhf/history; a later attempt
    verdicts.jsonl written.jsonl      stage's rank 0: answers that cost much      the same stage in a later attempt
    policy/ reward/                   stage: models in the form that is loaded    stage
    wandb/                            Weights & Biases                            user

A task counts as rank 0. The driver of a bucket's store uploads the files, but not the folders except `checkpoints/`
(rlhf/pipeline/uploads.py); after a commit the store removes the folders except `wandb/` (``SCRATCH`` in rlhf/store).

A checkpoint is complete or ignored. All ranks write into its folder; then rank 0 writes ``complete.json``, which holds
the number of ranks and lists every file with its size. A folder without it, or with a file that is missing or of
another size, was cut off and is never read.
"""

import json
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from rlhf.errors import RlhfError
from rlhf.store.lease import machine

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """How far a stage is."""

    message: str
    done: int
    total: int
    """Steps; 0 where they are not counted."""
    at: float
    """When this was written, in seconds since 1970 by the rank's clock."""
    times: tuple[tuple[float, int], ...]
    """When (by the same clock) how many steps were done, from which the time left is measured."""

    @classmethod
    def parse(cls, text: str) -> "Progress":
        """Read the content of the file; a run of an older version writes no ``times``."""
        values = json.loads(text)
        times = tuple((float(at), int(step)) for at, step in values.get("times", []))
        return cls(values["message"], values["done"], values["total"], values["at"], times)


@dataclass(frozen=True)
class Pulse:
    """One rank when it last made progress."""

    rank: int
    host: str
    node: str
    """Ray's name of its node."""
    pid: int
    log: str
    oom_kills: int
    """The operating system's count of processes killed for memory when the rank began."""
    step: int | None
    """The last step that was finished; None before the first."""
    beat: int
    at: float
    """Seconds since 1970 by the rank's clock."""
    machine: str = field(default_factory=machine)
    """What tells apart hosts of one name, such as containers; a rank of an older version writes none."""

    def is_of_this_host(self) -> bool:
        """Return whether the rank began on this host."""
        return (self.host, self.machine) == (socket.gethostname(), machine())

    def is_here(self) -> bool:
        """Return whether the rank's process runs on this host."""
        if not self.is_of_this_host():
            return False
        with suppress(OSError):
            # Ray renames its workers' processes; another process may have the number by now.
            return Path(f"/proc/{self.pid}/cmdline").read_bytes().startswith(b"ray::")
        return False

    def __str__(self) -> str:
        """Name rank, host, process, step and log, for a message."""
        step = "before its first step" if self.step is None else f"last step {self.step}"
        return f"rank {self.rank} on {self.host} (pid {self.pid}), {step}; log: {self.log}"


@dataclass(frozen=True)
class Failure:
    """Why a rank stopped, written by the rank itself; a rank that was killed writes nothing."""

    at: float
    rank: int
    host: str
    pid: int
    error: str
    """The class in ``rlhf.errors``, or the name of another exception."""
    args: tuple[str, ...]
    log: str


@dataclass(frozen=True)
class JsonFile(Generic[T]):
    """A file that holds one value. Writing replaces it by a rename, so that no reader sees half of it."""

    path: Path
    parse: Callable[[str], T]
    to_json: Callable[[T], Mapping[str, Any]]

    def write(self, value: T) -> None:
        """Replace the value; several ranks may do so at once, and the last one counts."""
        temporary = self.path.with_suffix(f".{secrets.token_hex(4)}.tmp")
        try:
            temporary.write_text(json.dumps(self.to_json(value)))
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)  # left where the disk is full

    def read(self) -> T:
        """Return the value of a file that exists."""
        return self.parse(self.path.read_text(encoding="utf-8"))

    def get(self) -> T | None:
        """Return the value, or None where the file was never written."""
        return self.read() if self.path.exists() else None

    def read_all(self) -> list[T]:
        """Return the values of all files that match the name, without those that cannot be read."""
        values: list[T] = []
        for path in sorted(self.path.parent.glob(self.path.name)):
            with suppress(OSError, ValueError, TypeError):
                values.append(self.parse(path.read_text(encoding="utf-8")))
        return values


class RankFiles:
    """The files of one rank, or with ``*`` in place of its number those of all."""

    def __init__(self, folder: Path, rank: int | Literal["*"]) -> None:
        def failure(text: str) -> Failure:
            values = json.loads(text)
            return Failure(**(values | {"args": tuple(values["args"])}))

        self.log = folder / f"log-{rank}.txt"
        self.stack = folder / f"stack-{rank}.trace"
        self.pulse = JsonFile(folder / f"pulse-{rank}.json", lambda text: Pulse(**json.loads(text)), asdict)
        self.failure = JsonFile(folder / f"failure-{rank}.json", failure, asdict)
        self.device = JsonFile[dict[str, str]](folder / f"device-{rank}.json", json.loads, dict)
        """``host`` and ``device``."""

    def remove_signs_of_life(self) -> None:
        """Remove pulse and stacks."""
        for file in (self.pulse.path, self.stack):
            for path in file.parent.glob(file.name):
                path.unlink(missing_ok=True)


class AttemptFolder:
    """The files of an attempt's folder; the table above says what each of them is for."""

    PROGRESS = "progress.json"
    FAILURE = "failure.json"
    CHECKPOINT = "checkpoints/checkpoint-"
    """Followed by the step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inputs, self.output, self.upload = path / "inputs", path / "output", path / "upload"
        self.policy, self.reward, self.checkpoints = path / "policy", path / "reward", path / "checkpoints"
        self.metrics, self.samples = path / "metrics.jsonl", path / "samples.jsonl"
        self.verdicts, self.written = path / "verdicts.jsonl", path / "written.jsonl"
        self.note_lines = path / "notes.jsonl"
        self.stop = path / "stop"
        """Empty: that it exists is the request."""
        self.resources = JsonFile[dict[str, int]](path / "resources.json", json.loads, dict)
        """``ranks`` and ``gpus``, written at the beginning: so the cost of a failed attempt is known too."""
        self.result = JsonFile[dict[str, float]](path / "result.json", json.loads, dict)
        self.origin = JsonFile[Mapping[str, Any]](path / "origin.json", json.loads, dict)
        """Source, revision or digest, licence."""
        self.micro_batch = JsonFile[dict[str, int]](path / "micro-batch.json", json.loads, dict)
        """``size``, where the settings left it to the ranks; half of that after a lack of memory."""
        self.progress = JsonFile(path / self.PROGRESS, Progress.parse, asdict)
        names = ("what", "where", "next")
        self.error = JsonFile[RlhfError](
            path / self.FAILURE,
            lambda text: RlhfError(*map(json.loads(text).get, names)),
            lambda error: dict(zip(names, map(str, error.args), strict=True)),
        )

    def checkpoint(self, step: int) -> Path:
        """Return the folder of a step's checkpoint, which need not exist."""
        return self.path / f"{self.CHECKPOINT}{step}"

    def checkpoint_folders(self) -> list[Path]:
        """Return the folders of the checkpoints, complete or not, in no order."""
        folders = self.path.glob(f"{self.CHECKPOINT}*")
        return [folder for folder in folders if folder.name.rpartition("-")[2].isdigit()]

    def quarantine(self, kind: str) -> Path:
        """Return the file for malformed rows of a kind of data."""
        return self.path / f"quarantine-{kind}.jsonl"

    def rank(self, rank: int | Literal["*"]) -> RankFiles:
        """Return the files of a rank."""
        return RankFiles(self.path, rank)

    def pulses(self) -> dict[int, Pulse]:
        """Return the pulses of the ranks that have begun and not ended well, by rank."""
        pulses = self.rank("*").pulse.read_all()
        return {pulse.rank: pulse for pulse in sorted(pulses, key=lambda pulse: pulse.rank)}

    def failures(self) -> list[Failure]:
        """Return the ranks' own accounts of why they stopped, the earliest first."""
        return sorted(self.rank("*").failure.read_all(), key=lambda failure: failure.at)

    def clear_group(self) -> None:
        """Remove what the ranks of an earlier group left, except logs and checkpoints."""
        for path in self.path.glob("failure-*.json"):
            path.unlink()
        self.rank("*").remove_signs_of_life()
        shutil.rmtree(self.output, ignore_errors=True)  # a killed export leaves files
        self.output.mkdir(exist_ok=True)  # a process of that group may still be about to end

    def notes(self) -> list[str]:
        """Return the lines for the user, without one that is still being written."""
        path = self.note_lines
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line)["note"] for line in lines]

    def resources_used(self) -> dict[str, Any]:
        """Return the attempt's ranks and GPUs, and the hosts and devices of the ranks; empty where unknown."""
        ranks = self.rank("*").device.read_all()
        places = {f"{name}s": sorted({rank[name] for rank in ranks}) for name in ("host", "device")}
        # An unknown cost must not stop a commit.
        given = self.resources.read_all()
        return {**given[0], **places} if given else {}

    def cost(self) -> dict[str, Any]:
        """Return name, seconds, ranks and GPUs of an attempt without a result; empty where unknown.

        The seconds are those from its beginning to the last sign of life, since a process that is killed notes no end.
        Both are times of one file system, so that clocks need not agree.
        """
        given = self.resources.read_all()
        if not given:
            return {}
        begun = self.resources.path.stat().st_mtime
        seconds = max(path.lstat().st_mtime for path in self.path.iterdir()) - begun
        return {"attempt": self.path.name, "seconds": round(seconds, 3), **given[0]}


MARKER = "complete.json"
KEPT = 2
"""Checkpoints of an attempt that stay when one is completed, including that one."""


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_complete(attempts: Iterable[Path]) -> Path | None:
    """Return the complete checkpoint of the highest step over all attempts at a key, or None."""
    checkpoints = [path for attempt in attempts for path in AttemptFolder(attempt).checkpoint_folders()]
    return max(filter(is_complete, checkpoints), key=lambda path: (step_of(path), path), default=None)


def is_complete(checkpoint: Path) -> bool:
    """Return whether every file that the marker lists exists in its full size."""
    try:
        sizes = marker(checkpoint)["sizes"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def marker(checkpoint: Path) -> dict[str, Any]:
    """Return a marker's content: ``ranks``, their number, ``precision``, where the ``optimiser`` lay, the form of the
    ``shards``, and ``sizes``, file to bytes.
    """
    return json.loads((checkpoint / MARKER).read_text())
