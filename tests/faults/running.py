"""Running the toy stages, in this process or as a program, and looking at their ranks."""

import io
import os
import random
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from rlhf.attempt.folder import AttemptFolder, Pulse
from rlhf.cluster.session import Session
from rlhf.config.pipeline import PipelineConfig, load_pipeline
from rlhf.pipeline.plan import Planned, plan
from rlhf.pipeline.runner import Runner
from rlhf.store import Store
from rlhf.terminal import Display
from tests.faults.toys import DONE, KNOWN


@dataclass
class Toy:
    """A pipeline of ``begin``, a task, and ``steps``, a worker group."""

    folder: Path
    output: io.StringIO = field(default_factory=io.StringIO)

    @property
    def path(self) -> Path:
        path = self.folder / "toy.yaml"
        if not path.exists():
            stages = "begin: {uses: seed}\nsteps: {inputs: {seed: begin}}\n"
            path.write_text(f"store: {{uri: {self.folder / 'store'}}}\n{stages}")
        return path

    @property
    def store(self) -> Store:
        return Store.open(self.folder / "store")

    def config(self, *overrides: str) -> PipelineConfig:
        return load_pipeline(self.path, overrides, {name: stage.settings for name, stage in KNOWN.items()})

    def planned(self, *overrides: str) -> dict[str, Planned]:
        return plan(self.config(*overrides), KNOWN, self.store)

    def run(self, session: Session, *overrides: str) -> dict[str, Planned]:
        config = self.config(*overrides)
        display = Display(Console(file=self.output, width=250), list(config.instances))
        return Runner(config, KNOWN, self.store, session, display).run(())

    def attempts(self) -> list[Path]:
        return sorted((self.folder / "store" / "work").glob("*/*"))

    def done(self) -> list[int]:
        """Every step that was done, over all attempts, in their order."""
        return [
            int(line) for one in self.attempts() if (one / DONE).exists() for line in (one / DONE).read_text().split()
        ]

    def ranks(self) -> list[Pulse]:
        return [one for attempt in self.attempts() for one in AttemptFolder(attempt).pulses().values()]

    def rank(self, rank: int) -> Pulse | None:
        found = [here[rank] for attempt in self.attempts() if rank in (here := AttemptFolder(attempt).pulses())]
        return found[-1] if found else None

    def total(self) -> bytes:
        record = self.planned()["steps"].record
        assert record is not None
        return self.store.read_file(record.artifact, "config.json")


def expected_total(steps: int = 12, start: int = 7) -> bytes:
    return str(float(start + sum(range(steps)))).encode()


@contextmanager
def signalled(toy: Toy, rank: int, number: signal.Signals, step: int = 2) -> Generator[list[Pulse]]:
    """Inside, a rank gets a signal as soon as it has done a step; the list then has it as it was."""
    hit: list[Pulse] = []
    over = threading.Event()

    def shoot() -> None:
        while not over.wait(0.02):
            found = toy.rank(rank)
            if found is not None and (found.step or 0) >= step:
                os.kill(found.pid, number)
                hit.append(found)
                return

    thread = threading.Thread(target=shoot, daemon=True)
    thread.start()
    try:
        yield hit
    finally:
        over.set()
        thread.join()


def moment(seed: int, longest: float) -> float:
    """A random number of seconds, the same for a seed every time."""
    return random.Random(seed).uniform(0, longest)


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def seconds_until_gone(pids: list[int], limit: float) -> float:
    began = time.monotonic()
    while not all(map(gone, pids)):
        assert time.monotonic() - began < limit, [pid for pid in pids if not gone(pid)]
        time.sleep(0.05)
    return time.monotonic() - began
