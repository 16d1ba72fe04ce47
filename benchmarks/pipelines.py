"""Run a benchmark's pipeline as a user would: a YAML file with overrides, a store, one Ray session for all runs."""

import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from rlhf.attempt.folder import AttemptFolder
from rlhf.cluster.session import Session
from rlhf.config.pipeline import ClusterSettings, load_pipeline
from rlhf.pipeline.runner import Runner
from rlhf.pipeline.stage import stages
from rlhf.store import Store
from rlhf.terminal import Display
from rlhf.tracking import read_metrics


@dataclass
class Pipeline:
    """A pipeline file, its store, and a Ray session."""

    file: Path
    folder: Path
    """Holds the store, the inputs, and the results of :meth:`run`."""
    session: Session
    store: Store
    records: dict[str, Any] = field(default_factory=dict[str, Any])
    """The action records of the instances that have run, by name."""

    def run(self, overrides: Sequence[str], *names: str) -> list[Path]:
        """Bring stage instances up to date; return the folders of their results, in the order of the names."""
        known = stages()
        config = load_pipeline(
            self.file,
            [f"store.uri={self.store.root}", *overrides],
            {name: stage.settings for name, stage in known.items()},
        )
        display = Display(Console(stderr=True), list(config.instances))
        planned = Runner(config, known, self.store, self.session, display).run(names)
        self.records |= {name: planned[name].record for name in names}
        return [self._result(planned[name].record) for name in names]

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Return the metrics of every step of an instance that has run."""
        record = self.records[name]
        return read_metrics(AttemptFolder(self.store.root / "work" / record.key / record.attempt).metrics)

    def _result(self, record: Any) -> Path:
        target = self.folder / "results" / record.artifact
        return target if target.exists() else self.store.checkout(record.artifact, target)


@contextmanager
def opened(file: Path, folder: Path | None, gpus: int | None = 0) -> Generator[Pipeline]:
    """Open a pipeline in a folder, with its earlier results; None takes a temporary folder.

    gpus  that stages may use; None allows all there are
    """
    with TemporaryDirectory() as temporary, Session(ClusterSettings(gpus=gpus)) as session:
        place = (folder or Path(temporary)).absolute()
        place.mkdir(parents=True, exist_ok=True)
        yield Pipeline(file, place, session, Store.open(place / "store"))


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a source of the data stage."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def function(file: str, name: str) -> str:
    """Return ``ppo.rewards`` with a function of a file of this folder."""
    return json.dumps([{"function": f"{Path(__file__).with_name(file)}:{name}"}])
