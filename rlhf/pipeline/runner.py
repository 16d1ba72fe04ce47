"""Run a plan: start the next stages, several at a time, until no result is missing.

The driver keeps no state: everything is read from the store, and a second driver continues where the first one died.
"""

import shutil
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from uuid import uuid4

from rlhf.attempt.folder import AttemptFolder
from rlhf.cluster import worker_group
from rlhf.cluster.session import RankResources, Resources, Session
from rlhf.cluster.worker import Call
from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import DamageError, InterruptedRunError, NextCommand, RlhfError, StageError, TryAgainError
from rlhf.pipeline import disk
from rlhf.pipeline.plan import Planned, plan, standing_in
from rlhf.pipeline.production import Production, context_of, needs_of, with_ranks
from rlhf.pipeline.reporting import Reporter, Stop, Watch
from rlhf.pipeline.stage import Stage
from rlhf.store import Store, digest_of
from rlhf.tracking import check_installed

POLL_SECONDS = 0.1
SECONDS_TO_END = 20.0
"""Time that threads have to end their stages after the driver was interrupted."""


@dataclass
class ConcurrentStages(AbstractContextManager["ConcurrentStages"]):
    """Threads that bring stages up to date. Context manager: when it exits, all have ended, unless interrupted twice.

    abort  called if the body raises while stages run, which must then end soon
    """

    abort: Callable[[], None]
    # Events, not threads: a thread whose join is interrupted counts as ended from then on (Python before 3.13).
    _ended: dict[str, threading.Event] = field(default_factory=dict, init=False)
    _errors: dict[str, BaseException] = field(default_factory=dict, init=False)

    def __exit__(self, *_: object) -> None:
        if not self._ended:
            return
        self.abort()
        for ended in self._ended.values():
            ended.wait(SECONDS_TO_END)

    @property
    def names(self) -> list[str]:
        """The stages that run."""
        return list(self._ended)

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Start a stage's work in a thread."""
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

    def wait(self, report: Callable[[str], None]) -> list[str]:
        """Wait until stages end; return their names. After a failure, wait for all others too, then raise the failure.

        report  called after a failure with a line that names the stages still running
        """
        while self._ended:
            # Only the main thread takes signals: it must not stay in one wait for long.
            next(iter(self._ended.values())).wait(POLL_SECONDS)
            ended_now = [name for name, ended in self._ended.items() if ended.is_set()]
            for name in ended_now:
                del self._ended[name]
                if name in self._errors and self._ended:
                    error = self._errors[name]
                    message = error.what if isinstance(error, RlhfError) else str(error)
                    report(f"{name}: {message}; other running stages are finished first: {', '.join(self._ended)}")
            if self._errors and not self._ended:
                raise next(iter(self._errors.values()))
            if ended_now and not self._errors:
                return ended_now
        return []


@dataclass
class Runner:
    """Brings the stages of a pipeline up to date."""

    config: PipelineConfig
    known: Mapping[str, Stage]
    store: Store
    session: Session
    reporter: Reporter
    stop: Stop = field(default_factory=Stop)

    def run(self, targets: Sequence[str]) -> dict[str, Planned]:
        """Run the stages that the targets need and the store lacks; return the plan after that.

        Raises:
            RlhfError: the first error; results that were committed before it stay.
            InterruptedRunError: the run was asked to stop.
        """
        production = Production(self.config, self.store, self.session, self.reporter, self.stop)
        reported: set[str] = set()
        taken: dict[str, RankResources] = {}
        settled: dict[str, Planned] = {}
        started = checked = False
        with ConcurrentStages(self.stop.abort) as running:
            while True:
                stages = plan(self.config, self.known, self.store, targets, settled)
                if not self._report(stages, reported):
                    settled = {}
                    continue
                missing = _missing(stages)
                if not missing and not running.names:
                    return stages
                if missing and not started:
                    check_installed(self.config.tracking.sinks)
                    self._check_resources(missing)
                    started = True
                under_way = {stages[name].key for name in running.names}
                resources = self.session.resources() if missing else Resources(cpus=(), gpus=())
                for planned in missing:
                    if planned.state == "blocked" or planned.key in under_way:
                        continue
                    if planned.stage.runs == "workers" and not checked:
                        if running.names:
                            break
                        self._preflight(missing, stages)
                        checked = True
                    needs = needs_of(planned, resources)
                    if resources.have_room(needs, [taken[name] for name in running.names]):
                        taken[planned.name] = needs
                        running.start(planned.name, partial(production.bring_up_to_date, planned))
                        reported.add(planned.name)
                        under_way.add(planned.key)
                if not running.names:
                    # Only stages that wait for annotators are left.
                    planned = next(planned for planned in missing if planned.awaits is not None)
                    source = next(iter(planned.wires.values())).instance
                    annotate = NextCommand("annotate", (source, str(planned.awaits)), "then the same command again")
                    raise TryAgainError(f"{planned.name} {planned.why}", f"{planned.name}.file", annotate)
                settled = _settled(stages, running.wait(self.reporter.line))
                if self.stop.asked:
                    raise InterruptedRunError("interrupted")

    def _report(self, stages: Mapping[str, Planned], reported: set[str]) -> bool:
        """Report the store's notices, cached stages and unused stages; point the refs at cached results.

        Return False if a cached result was collected as garbage before its ref was set: the plan is then outdated.

        reported  cached stages that were reported already; gets the new ones
        """
        for notice in self.store.notices:
            self.reporter.line(notice)
        self.store.notices.clear()
        complete = True
        for name, planned in stages.items():
            if planned.record is None or name in reported:
                continue
            ref, key = planned.ref, planned.record.key
            if (ref is not None and ref.key == key) or self.store.set_ref(self.config.name, name, key):
                self.reporter.update(name, state="cached", key=key, why=planned.why)
                reported.add(name)
            else:
                self.store.delete_ref(self.config.name, name)
                complete = False
        for name, planned in stages.items():
            if complete and planned.state == "unused":
                self.reporter.update(name, state="unused", why=planned.why)
        return complete

    def _check_resources(self, missing: Sequence[Planned]) -> None:
        """Refuse stages that the cluster has no resources for, before any runs: Ray would wait without end."""
        address = self.session.address
        self.reporter.line("starting Ray" if address is None else f"attaching to Ray at {address}")
        resources = self.session.resources()
        resources.for_task()
        for notice in self.session.notices:
            self.reporter.line(notice)
        for planned in missing:
            needs_of(planned, resources)

    def _preflight(self, missing: Sequence[Planned], stages: Mapping[str, Planned]) -> None:
        """Run the checks that need models and data, for all stages before the first worker group starts."""
        written: dict[str, Mapping[str, float]] = {}
        for planned in missing:
            if planned.stage.preflight is None:
                continue
            # A folder of this process alone, so that it can be removed whole.
            attempt = self.store.new_attempt(digest_of({"preflight": planned.name, "by": uuid4().hex}))
            try:
                parts = {
                    role: (artifact, wire.part)
                    for role, wire in planned.wires.items()
                    if (artifact := standing_in(stages, wire.instance)) is not None
                }
                context = context_of(planned, "preflight", parts, attempt, self.store, tracking={})
                if planned.stage.runs == "workers":
                    context = with_ranks(context, needs_of(planned, self.session.resources()))
                call, show = Call(planned.stage.preflight, context), Watch(self.reporter, planned.name, context.folder)
                written[planned.name] = worker_group.run_task(call, 1, show)
            except StageError:
                # The message names the log, which must stay.
                shutil.rmtree(AttemptFolder(attempt).inputs, ignore_errors=True)
                raise
            except BaseException:
                shutil.rmtree(attempt.parent, ignore_errors=True)
                raise
            shutil.rmtree(attempt.parent, ignore_errors=True)
        disk.check(written, self.store)


def _settled(stages: Mapping[str, Planned], ended: Collection[str]) -> dict[str, Planned]:
    """Return the stages whose plan stands after others have ended: of many stages most, and each look has its price.

    Planned again are those that ended, or have the key of one, those that waited for them, and the inputs of all these.
    """
    keys = {stages[name].key for name in ended}
    again = set[str]()
    for name, planned in stages.items():
        if planned.key in keys or planned.awaits is not None or again.intersection(planned.needs):
            again.add(name)
    again |= {wire.instance for name in again for wire in stages[name].wires.values()}
    return {name: planned for name, planned in stages.items() if name not in again}


def _missing(stages: Mapping[str, Planned]) -> list[Planned]:
    """Return the stages that lack a result, tasks first: data and models decide whether the rest can run at all.

    Raises:
        DamageError: an imported result is gone. Training the stage instead is no substitute that the user asked for.
    """
    missing = [planned for planned in stages.values() if planned.record is None and planned.state != "unused"]
    for planned in missing:
        if planned.state == "blocked" and not planned.needs and planned.awaits is None:
            raise DamageError(
                planned.why,
                f"stage {planned.name}",
                f"rlhf import DIR --as {planned.name} again, or rlhf import --forget --as {planned.name} to train it",
            )
    return sorted(missing, key=lambda planned: planned.stage.runs == "workers")
