"""The folder of an attempt: every file by which driver, ranks and stage inform each other and the user.

    file                              written by                                  read by
    inputs/<role>/                    driver: the artifacts, checked out          stage
    output/                           stage: the artifact's payload               driver, at the commit
    resources.json                    driver: ranks and GPUs of the attempt       driver, at this and later commits
    stop                              driver: save at the next step, and stop     rank 0
    failure.json                      driver: the error that ended the attempt    rlhf status
    upload/                           driver: links to the checkpoint that it uploads to a bucket
    result.json                       rank 0: the final metrics                   driver
    pulse-<rank>.json                 each rank, in liveness: step, process, log  driver: watchdog, causes
    stack-<rank>.trace                each rank's fault handler, when it hangs    driver: watchdog
    failure-<rank>.json               each rank that raised: its error            driver: causes
    device-<rank>.json                each rank: host and device                  driver, at the commit
    log-<rank>.txt                    each rank: all that it prints               user; driver: causes, for a crash
    checkpoints/checkpoint-<step>/    all ranks; rank 0 completes it              ranks that resume; driver: uploads
    progress.json                     stage: message, steps done, when            driver, rlhf status
    notes.jsonl                       stage: lines for the user                   driver
    origin.json                       stage: where external things came from      driver, at the commit
    quarantine-<kind>.jsonl           stage: malformed rows                       user
    metrics.jsonl samples.jsonl       stage's rank 0: its journal                 user; journal of a later attempt
    verdicts.jsonl written.jsonl      stage's rank 0: answers that cost much      the same stage in a later attempt
    policy/ reward/                   stage: models in the form that is loaded    stage
    wandb/                            Weights & Biases                            user

A task counts as rank 0. The driver of a bucket's store uploads the files, but not the folders except `checkpoints/`
(rlhf/pipeline/uploads.py); after a commit the store removes the folders except `wandb/` (``SCRATCH`` in rlhf/store).
Files that are read while they may change are replaced by a rename, so that no reader sees half a file.
"""

import json
import secrets
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.errors import RlhfError


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
        """Read the content of a file `progress.json`; a run of an older version writes no ``times``."""
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

    def is_here(self) -> bool:
        """Return whether the rank's process runs on this host."""
        if self.host != socket.gethostname():
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


class AttemptFolder:
    """Names, reads and writes the files of an attempt's folder. The table above says what each of them is for."""

    PROGRESS = "progress.json"
    CHECKPOINT = "checkpoints/checkpoint-"
    """Followed by the step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inputs, self.output = path / "inputs", path / "output"
        self.checkpoints, self.upload = path / "checkpoints", path / "upload"
        self.metrics, self.samples = path / "metrics.jsonl", path / "samples.jsonl"
        self.verdicts, self.written = path / "verdicts.jsonl", path / "written.jsonl"
        self.logs = f"{path}/log-*.txt"
        """The pattern of all ranks' logs, for a message."""

    def checkpoint(self, step: int) -> Path:
        """Return the folder of a step's checkpoint, which need not exist."""
        return self.path / f"{self.CHECKPOINT}{step}"

    def checkpoint_folders(self) -> list[Path]:
        """Return the folders of the checkpoints, complete or not, in no order."""
        names = self.path.glob(f"{self.CHECKPOINT}*")
        return [path for path in names if path.name.rpartition("-")[2].isdigit()]

    def quarantine(self, kind: str) -> Path:
        """Return the file for malformed rows of a kind of data."""
        return self.path / f"quarantine-{kind}.jsonl"

    def scratch(self, model: Literal["policy", "reward"]) -> Path:
        """Return a folder for a model in the form in which it is loaded."""
        return self.path / model

    def log(self, rank: int) -> Path:
        """Return the file of a rank's output."""
        return self.path / f"log-{rank}.txt"

    def stack(self, rank: int) -> Path:
        """Return the file into which Python's fault handler writes a rank's stacks."""
        return self.path / f"stack-{rank}.trace"

    def stacks(self, rank: int) -> str:
        """Return a hanging rank's stacks; empty where it could not write them or made progress since."""
        try:
            return self.stack(rank).read_text(errors="replace")
        except OSError:
            return ""

    def write_pulse(self, pulse: Pulse) -> None:
        """Replace the pulse of a rank."""
        self._write(f"pulse-{pulse.rank}.json", asdict(pulse))

    def pulses(self) -> dict[int, Pulse]:
        """Return the pulses of the ranks that have begun and not ended well, by rank."""
        pulses: dict[int, Pulse] = {}
        for path in self.path.glob("pulse-*.json"):
            with suppress(OSError, ValueError, TypeError):
                pulse = Pulse(**json.loads(path.read_text()))
                pulses[pulse.rank] = pulse
        return dict(sorted(pulses.items()))

    def remove_pulses(self, rank: int | Literal["*"]) -> None:
        """Remove pulse and stacks of a rank or of all ranks."""
        for pattern in (f"pulse-{rank}.json", f"stack-{rank}.trace"):
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)

    def write_failure(self, failure: Failure) -> None:
        """Write a rank's account of why it stopped."""
        self._write(f"failure-{failure.rank}.json", asdict(failure))

    def failures(self) -> list[Failure]:
        """Return the ranks' accounts, the earliest first."""
        values = [json.loads(path.read_text()) for path in self.path.glob("failure-*.json")]
        failures = [Failure(**(value | {"args": tuple(value["args"])})) for value in values]
        return sorted(failures, key=lambda failure: failure.at)

    def clear_group(self) -> None:
        """Remove what the ranks of an earlier group left, except logs and checkpoints."""
        for path in self.path.glob("failure-*.json"):
            path.unlink()
        self.remove_pulses("*")
        shutil.rmtree(self.output, ignore_errors=True)  # a killed export leaves files
        self.output.mkdir(exist_ok=True)  # a process of that group may still be about to end

    def write_result(self, metrics: Mapping[str, float]) -> None:
        """Write the stage's final metrics."""
        self._write("result.json", {name: float(value) for name, value in metrics.items()})

    def result(self) -> dict[str, float]:
        """Return the stage's final metrics."""
        return json.loads((self.path / "result.json").read_text())

    def ask_to_stop(self) -> None:
        """Ask the ranks to save at their next step, and to stop."""
        (self.path / "stop").touch()

    def is_asked_to_stop(self) -> bool:
        """Return whether the driver asked the ranks to stop."""
        return (self.path / "stop").exists()

    def write_progress(self, progress: Progress) -> None:
        """Replace the stage's progress; several ranks may do so at once, and the last one counts."""
        self._write(self.PROGRESS, asdict(progress), f".{secrets.token_hex(4)}.tmp")

    def progress(self) -> Progress | None:
        """Return the stage's progress; None before it first told it."""
        path = self.path / self.PROGRESS
        return Progress.parse(path.read_text()) if path.exists() else None

    def add_note(self, line: str) -> None:
        """Append a line for the user."""
        with (self.path / "notes.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"note": line}) + "\n")

    def notes(self) -> list[str]:
        """Return the lines for the user, without one that is still being written."""
        path = self.path / "notes.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line)["note"] for line in lines]

    def write_origin(self, values: Mapping[str, object]) -> None:
        """Write where external things came from: source, revision or digest, licence."""
        self._write("origin.json", values)

    def origin(self) -> dict[str, Any]:
        """Return where external things came from; empty where there were none."""
        path = self.path / "origin.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_error(self, error: RlhfError) -> None:
        """Write the error that ended the attempt."""
        self._write("failure.json", {"what": error.what, "where": error.where, "next": error.next_step})

    def error(self) -> RlhfError | None:
        """Return the error that ended the attempt, as a plain `RlhfError`; None where none did."""
        path = self.path / "failure.json"
        if not path.exists():
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        return RlhfError(values["what"], values["where"], values["next"])

    def write_resources(self, ranks: int, gpus: int) -> None:
        """Write what the attempt is given, when it begins: so the cost of a failed attempt is known too."""
        self._write("resources.json", {"ranks": ranks, "gpus": gpus})

    def write_device(self, rank: int, device: str) -> None:
        """Write where a rank runs: this host, and a device."""
        self._write(f"device-{rank}.json", {"host": socket.gethostname(), "device": device})

    def resources(self) -> dict[str, Any]:
        """Return the attempt's ranks and GPUs, and the hosts and devices of the ranks; empty where unknown."""
        given = self._read("resources.json")
        ranks = [rank for path in sorted(self.path.glob("device-*.json")) if (rank := self._read(path.name))]
        places = {f"{name}s": sorted({str(rank[name]) for rank in ranks}) for name in ("host", "device")}
        return given | places if given else {}

    def cost(self) -> dict[str, Any]:
        """Return name, seconds, ranks and GPUs of an attempt without a result; empty where unknown.

        The seconds are those from its beginning to the last sign of life, since a process that is killed notes no end.
        Both are times of one file system, so that clocks need not agree.
        """
        given = self._read("resources.json")
        if not given:
            return {}
        begun = (self.path / "resources.json").stat().st_mtime
        seconds = max(path.lstat().st_mtime for path in self.path.iterdir()) - begun
        return {"attempt": self.path.name, "seconds": round(seconds, 3)} | given

    def _write(self, name: str, values: Mapping[str, Any], temporary_suffix: str = ".tmp") -> None:
        path = self.path / name
        temporary = path.with_suffix(temporary_suffix)
        temporary.write_text(json.dumps(values))
        temporary.replace(path)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # never written, or damaged: an unknown cost must not stop a commit
