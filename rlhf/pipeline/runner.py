"""Run a plan: which stage is next, what runs beside it, until nothing is missing.

The driver keeps no state: everything it knows is in the store, and a second driver goes on where it died.
"""

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.cluster import worker_group
from rlhf.cluster.session import RankResources, Session
from rlhf.cluster.worker import Call
from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import DamageError, InterruptedRunError, NextCommand, RlhfError, StageError, TryAgainError
from rlhf.pipeline import disk
from rlhf.pipeline.plan import Planned, plan
from rlhf.pipeline.production import Production, ranks_of
from rlhf.pipeline.reporting import Reporter, Stop, Watch
from rlhf.pipeline.stage import Stage
from rlhf.store import Store, digest_of

POLL_SECONDS = 0.1
SECONDS_TO_END = 20.0
"""How long threads may take to end their stages once the driver was interrupted."""


class ConcurrentStages:
    """Use it as a context manager: at its end nothing runs any more, unless the driver was interrupted twice.

    abort  called where the body ends by an error: what runs must then end soon
    """

    def __init__(self, abort: Callable[[], None]) -> None:
        self._abort = abort
        # Not the threads: one whose join is interrupted counts as ended from then on (Python before 3.13).
        self._ended: dict[str, threading.Event] = {}
        self._errors: dict[str, BaseException] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ended:
            return
        self._abort()
        for ended in self._ended.values():
            ended.wait(SECONDS_TO_END)

    @property
    def names(self) -> list[str]:
        """What runs."""
        return list(self._ended)

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Begin some work; a stage that runs already is not started again."""
        assert name not in self._ended
        ended = self._ended[name] = threading.Event()

        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised again in the main thread
                self._errors[name] = error
            finally:
                ended.set()

        threading.Thread(target=run, name=name, daemon=True).start()

    def wait(self, say: Callable[[str], None]) -> None:
        """Wait until some work has ended. After a failure the rest is waited for too, and then the failure is raised.

        say  is told what is waited for after a failure
        """
        while self._ended:
            # Of the threads, the main one alone takes signals: it must not stay in one wait for long.
            next(iter(self._ended.values())).wait(POLL_SECONDS)
            over = [name for name, ended in self._ended.items() if ended.is_set()]
            for name in over:
                del self._ended[name]
                if name in self._errors and self._ended:
                    error = self._errors[name]
                    what = error.what if isinstance(error, RlhfError) else str(error)
                    say(f"{name}: {what}; what else runs is finished first: {', '.join(self._ended)}")
            if self._errors and not self._ended:
                raise next(iter(self._errors.values()))
            if over and not self._errors:
                return


@dataclass
class Runner:
    """Brings stages of a pipeline up to date."""

    config: PipelineConfig
    known: Mapping[str, Stage]
    store: Store
    session: Session
    reporter: Reporter
    stop: Stop = field(default_factory=Stop)

    def run(self, targets: Sequence[str]) -> dict[str, Planned]:
        """Run the stages that the targets need and the store does not have; return the plan after that.

        Raises:
            RlhfError: the first error; results that were committed before it stay.
            InterruptedRunError: the run was asked to stop.
        """
        with ConcurrentStages(self.stop.abort) as running:
            return self._run(targets, running)

    def _run(self, targets: Sequence[str], running: ConcurrentStages) -> dict[str, Planned]:
        production = Production(self.config, self.store, self.session, self.reporter, self.stop)
        reported: set[str] = set()
        taken: dict[str, RankResources] = {}
        started = checked = False
        while True:
            stages = plan(self.config, self.known, self.store, targets)
            for notice in self.store.notices:
                self.reporter.line(notice)
            self.store.notices.clear()
            cached = [planned for planned in stages.values() if planned.record is not None]
            reported |= {planned.name for planned in cached if planned.name not in reported and self._adopt(planned)}
            if any(planned.name not in reported for planned in cached):
                continue  # collected as garbage between the look and the ref
            for planned in stages.values():
                if planned.state == "unused":
                    self.reporter.update(planned.name, state="unused", why=planned.why)
            missing = [planned for planned in stages.values() if planned.record is None and planned.state != "unused"]
            _refuse_lost_imports(missing)
            if not missing and not running.names:
                return stages
            if missing and not started:
                self._check_resources(missing)
                started = True
            # Data and models first: what they are decides whether the rest can run at all.
            missing.sort(key=lambda planned: planned.stage.runs == "workers")
            under_way = {stages[name].key for name in running.names}
            for planned in missing:
                if planned.state == "blocked" or planned.key in under_way:
                    continue
                if planned.stage.runs == "workers" and not checked:
                    if running.names:
                        break
                    self._preflight(missing, stages)
                    checked = True
                needs = self._needs(planned)
                if self.session.resources().have_room(needs, [taken[name] for name in running.names]):
                    taken[planned.name] = needs
                    running.start(planned.name, partial(production.bring_up_to_date, planned))
                    reported.add(planned.name)
                    under_way.add(planned.key)
            if not running.names:
                raise _awaiting_people(missing)
            running.wait(self.reporter.line)
            if self.stop.asked:
                raise InterruptedRunError("interrupted")

    def _adopt(self, planned: Planned) -> bool:
        """Make a committed result the stage's latest; False where it is gone by then."""
        assert planned.record is not None
        ref, key = self.store.refs(self.config.name).get(planned.name), planned.record.key
        if (ref is None or ref.key != key) and not self.store.set_ref(self.config.name, planned.name, key):
            self.store.delete_ref(self.config.name, planned.name)
            return False
        self.reporter.update(planned.name, state="cached", key=key, why=planned.why)
        return True

    def _check_resources(self, missing: Sequence[Planned]) -> None:
        """Refuse what the cluster does not have before anything runs: Ray would wait for it without an end."""
        self.reporter.line(
            "starting Ray" if self.session.address is None else f"attaching to Ray at {self.session.address}"
        )
        self.session.resources().for_task()
        for notice in self.session.notices:
            self.reporter.line(notice)
        for planned in missing:
            self._needs(planned)

    def _needs(self, planned: Planned) -> RankResources:
        return (
            ranks_of(planned, self.session) if planned.stage.runs == "workers" else self.session.resources().of_task()
        )

    def _preflight(self, missing: Sequence[Planned], stages: Mapping[str, Planned]) -> None:
        """Run the checks of the worker stages that need models and data, all before the first of them starts."""
        written: dict[str, Mapping[str, float]] = {}
        for planned in missing:
            if planned.stage.preflight is None:
                continue
            # A folder of this process alone, so that it can be removed whole.
            attempt = self.store.new_attempt(digest_of({"preflight": planned.name, "by": uuid4().hex}))
            try:
                written[planned.name] = self._check(planned, planned.stage.preflight, stages, attempt)
            except StageError:
                shutil.rmtree(AttemptFolder(attempt).inputs, ignore_errors=True)  # its message names the log
                raise
            except BaseException:
                shutil.rmtree(attempt.parent, ignore_errors=True)
                raise
            shutil.rmtree(attempt.parent, ignore_errors=True)
        disk.check(written, self.store)

    def _check(self, planned: Planned, code: str, stages: Mapping[str, Planned], attempt: Path) -> Mapping[str, float]:
        inputs = {
            role: self.store.checkout(artifact, AttemptFolder(attempt).inputs / role, wire.part)
            for role, wire in planned.wires.items()
            if (artifact := _standing_in(stages, wire.instance)) is not None
        }
        context: Context[Any] = Context(
            stage=planned.name,
            key="preflight",
            settings=planned.instance.settings,
            inputs=inputs,
            output=AttemptFolder(attempt).output,
            attempt=attempt,
            cache=self.store.root / "cache",
            attempts=tuple(self.store.attempts(planned.key)) if planned.key else (),
        )
        return worker_group.run_task(Call(code, context), 1, Watch(self.reporter, planned.name, attempt))


def _refuse_lost_imports(missing: Sequence[Planned]) -> None:
    """Refuse to train a stage whose imported result is gone: nobody asked for that."""
    for planned in missing:
        if planned.state == "blocked" and not planned.needs and planned.awaits is None:
            raise DamageError(
                planned.why,
                f"stage {planned.name}",
                f"rlhf import DIR --as {planned.name} again, or rlhf import --forget --as {planned.name} to train it",
            )


def _awaiting_people(missing: Sequence[Planned]) -> TryAgainError:
    """Return the error where all that could run is done, and the rest waits for annotators."""
    planned = next(planned for planned in missing if planned.awaits is not None)
    source = next(iter(planned.wires.values())).instance
    return TryAgainError(
        f"{planned.name} {planned.why}",
        f"{planned.name}.file",
        NextCommand("annotate", (source, str(planned.awaits)), then="then the same command again"),
    )


def _standing_in(stages: Mapping[str, Planned], name: str) -> str | None:
    """Return an instance's artifact, or that of the nearest committed model that it will be a trained version of."""
    planned = stages[name]
    if planned.record is not None:
        return planned.record.artifact
    continues = planned.stage.continues
    return _standing_in(stages, planned.wires[continues].instance) if continues else None
