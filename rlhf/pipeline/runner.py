"""Running a pipeline: one stage after the other, each from its lease to its commit.

Driver state is nothing: whatever this process knew is in the store, and a second driver takes over where it died.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from rlhf.attempt.context import FAILURE, ORIGIN, STOP, Context
from rlhf.attempt.cost import begin, earlier_attempts, resources_of
from rlhf.cluster import launch
from rlhf.cluster.session import RankResources, Session
from rlhf.cluster.worker import Call
from rlhf.config.pipeline import PipelineConfig
from rlhf.config.training import WorkerSettings
from rlhf.errors import (
    DamageError,
    InterruptedRunError,
    LeaseLostError,
    RequestError,
    RlhfError,
    StageError,
    TryAgainError,
)
from rlhf.pipeline import disk
from rlhf.pipeline.concurrent_stages import SideBySide
from rlhf.pipeline.plan import Planned, plan
from rlhf.pipeline.provenance import provenance
from rlhf.pipeline.reporting import Reporter, Watch
from rlhf.pipeline.stage import Stage
from rlhf.pipeline.stop import Stop
from rlhf.pipeline.uploads import clear_checkpoints, fetch_attempts, uploading
from rlhf.store import SCRATCH, ActionRecord, Store, digest_of


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
        """Run what the targets need and the store does not have; the plan as it is then.

        Raises:
            RlhfError: the first error; what was committed before it stays.
            InterruptedRunError: it was asked to stop.
        """
        with SideBySide(self.stop.abort) as running:
            return self._run(targets, running)

    def _run(self, targets: Sequence[str], running: SideBySide) -> dict[str, Planned]:
        told: set[str] = set()
        taken: dict[str, RankResources] = {}
        started = checked = False
        while True:
            planned = plan(self.config, self.known, self.store, targets)
            self._tell_notices()
            for one in planned.values():
                if one.record is not None and one.name not in told and self._adopt(one):
                    told.add(one.name)
            if any(one.record is not None and one.name not in told for one in planned.values()):
                continue  # collected as garbage between the look and the ref
            for one in planned.values():
                if one.state == "unused":
                    self.reporter.update(one.name, state="unused", why=one.why)
            missing = [one for one in planned.values() if one.record is None and one.state != "unused"]
            _refuse_lost_imports(missing)
            if not missing and not running.names:
                return planned
            if missing and not started:
                self._check_resources(missing)
                started = True
            # Data and models first: what they are decides whether the rest can run at all.
            missing.sort(key=lambda one: one.stage.runs == "workers")
            under_way = {planned[name].key for name in running.names}
            for one in missing:
                if one.state == "blocked" or one.key in under_way:
                    continue
                if one.stage.runs == "workers" and not checked:
                    if running.names:
                        break
                    self._preflight(missing, planned)
                    checked = True
                needs = self._needs(one)
                if self.session.resources().have_room(needs, [taken[name] for name in running.names]):
                    taken[one.name] = needs
                    running.start(one.name, partial(self._bring_up, one))
                    told.add(one.name)
                    under_way.add(one.key)
            if not running.names:
                raise _awaiting_people(missing)
            running.wait(self.reporter.line)
            if self.stop.asked:
                raise InterruptedRunError("interrupted")

    def _bring_up(self, one: Planned) -> None:
        """Take the lease and produce the stage; a lease that is lost is waited for again, and its result adopted."""
        for _ in range(self.config.cluster.max_failures):
            try:
                self._take(one)
                return
            except LeaseLostError as error:
                self.reporter.line(f"{one.name}: {error.what}; {error.next_step}")
        self._take(one)

    def _take(self, one: Planned) -> None:
        assert one.key is not None
        lost: list[str] = []
        with self.store.lease(
            one.key,
            timeout=None,
            on_wait=lambda message: self._wait(one, message),
            on_loss=lost.append,
            check=self._refuse_to_go_on,
        ):
            # Somebody may have committed it while we waited for the lease.
            if self._adopt_from_another(one):
                return
            try:
                self._produce(one, lost)
            except RlhfError as error:
                # Whoever took the lease over may have committed, and removed what this attempt was reading.
                if not self._adopt_from_another(one):
                    raise
                self.reporter.line(f"{one.name}: {error.what}; another run has the result")

    def _refuse_to_go_on(self) -> None:
        if self.stop.asked:
            raise InterruptedRunError("interrupted")

    def _adopt_from_another(self, one: Planned) -> bool:
        """Take what another run has made meanwhile, if it has."""
        assert one.key is not None
        record = self.store.lookup(one.key)
        if record is None or not self.store.set_ref(self.config.name, one.name, record.key):
            return False
        self.reporter.update(
            one.name, state="cached", key=record.key, why="made by another run", message="", done=0, total=0
        )
        return True

    def _produce(self, one: Planned, lost: Sequence[str]) -> None:
        """Run the stage and commit what it made.

        lost  who holds the lease instead, from the moment it is lost on
        """
        assert one.key is not None
        fetch_attempts(self.store, one.key, one.name, self.reporter.line)
        attempt = self.store.new_attempt(one.key)
        self.reporter.update(one.name, state="running", key=one.key, why=one.why, message="", done=0, total=0)
        try:
            with self.stop.heeded():
                context = self._context(one, attempt, self._checkout(one, attempt / "inputs"))
                context.output.mkdir()
                start = time.monotonic()
                with uploading(self.store, attempt, one.name, self.reporter.line):
                    metrics = self._execute(one, context, lost)
                self._commit(one, attempt, metrics, time.monotonic() - start)
        except (InterruptedRunError, LeaseLostError):
            self.reporter.update(one.name, state="waiting")
            raise
        except RlhfError as error:
            self.reporter.update(one.name, state="failed")
            _write_failure(attempt, error)
            raise
        finally:
            shutil.rmtree(attempt / "inputs", ignore_errors=True)

    def _execute(self, one: Planned, context: Context[Any], lost: Sequence[str]) -> dict[str, float]:
        show = Watch(self.reporter, one.name, context.attempt)

        def watch() -> None:
            show()
            self.session.check()
            if lost:
                raise LeaseLostError(f"the lease was lost to {lost[0]}", str(context.attempt), "waiting for its result")
            if self.stop.asked:
                if one.stage.runs == "task" or self.stop.aborted:
                    raise InterruptedRunError("interrupted")
                # The ranks save at their next step, stop, and say so.
                (context.attempt / STOP).touch()

        if one.stage.runs == "task":
            begin(context.attempt, ranks=1, gpus=0)
            return launch.run_task(Call(one.stage.code, context), self.session.resources().for_task(), watch)
        ranks = self._ranks(one)
        begin(context.attempt, ranks.count, ranks.count if ranks.gpu else 0)
        call = Call(one.stage.code, context, ranks.gpu, _workers(one).timeout_minutes)
        return launch.run_group(call, ranks, self.config.cluster.max_failures, watch, self.reporter.line)

    def _commit(self, one: Planned, attempt: Path, metrics: dict[str, float], seconds: float) -> None:
        assert one.key is not None
        try:
            manifest = self.store.put_artifact(attempt / "output", one.stage.kind)
            self.store.publish(
                ActionRecord(
                    key=one.key,
                    stage=one.stage.name,
                    version=one.stage.version,
                    settings=dict(one.settings),
                    inputs={role: dict(entry) for role, entry in one.inputs.items()},
                    artifact=manifest.digest,
                    metrics=metrics,
                    provenance=provenance() | self._circumstances(one, attempt),
                    seconds=round(seconds, 3),
                    attempt=attempt.name,
                ),
                self.config.name,
                one.name,
            )
        except RequestError as error:
            # What the stage wrote is at fault, and not what the user asked for.
            raise StageError(f"{one.name} made no valid result: {error.what}", error.where, error.next_step) from error
        clear_checkpoints(self.store, one.key, attempt)
        for name in SCRATCH:
            for folder in self.store.attempts(one.key):
                shutil.rmtree(folder / name, ignore_errors=True)
        # A stage's first metrics are those that tell most; counts of rows by the dozen tell nothing in a line.
        first = list(metrics.items())[:3] if one.stage.runs == "workers" or len(metrics) <= 3 else []
        shown = "  ".join(f"{name} {value:.3g}" for name, value in first)
        self.reporter.update(one.name, state="done", message=shown, done=0, total=0, seconds=seconds)

    def _circumstances(self, one: Planned, attempt: Path) -> dict[str, Any]:
        assert one.key is not None
        origin = attempt / ORIGIN
        return resources_of(attempt) | {
            "earlier_attempts": earlier_attempts([path for path in self.store.attempts(one.key) if path != attempt]),
            # Not the same again: a damaged result that is made anew has no other reason.
            "previous": one.before.key if one.before and one.before.key != one.key else None,
            "origin": json.loads(origin.read_text(encoding="utf-8")) if origin.exists() else {},
        }

    def _context(self, one: Planned, attempt: Path, inputs: Mapping[str, Path]) -> Context[Any]:
        assert one.key is not None
        tracking = self.config.tracking
        return Context(
            stage=one.name,
            key=one.key,
            settings=one.instance.settings,
            inputs=inputs,
            output=attempt / "output",
            attempt=attempt,
            attempts=tuple(self.store.attempts(one.key)),
            cache=self._cache,
            tracking={
                "mode": tracking.wandb,
                "project": tracking.project,
                "entity": tracking.entity,
                "group": self.config.name,
            },
        )

    def _checkout(self, one: Planned, folder: Path) -> dict[str, Path]:
        return {
            role: self.store.checkout(str(entry["artifact"]), folder / role, str(entry["part"]))
            for role, entry in one.inputs.items()
        }

    def _check_resources(self, missing: Sequence[Planned]) -> None:
        """Refuse what the cluster does not have before anything runs: Ray would wait for it for ever."""
        self.reporter.line(
            "starting Ray" if self.session.address is None else f"attaching to Ray at {self.session.address}"
        )
        self.session.resources().for_task()
        for notice in self.session.notices:
            self.reporter.line(notice)
        for one in missing:
            if one.stage.runs == "workers":
                self._ranks(one)

    def _needs(self, one: Planned) -> RankResources:
        return self._ranks(one) if one.stage.runs == "workers" else self.session.resources().of_task()

    def _ranks(self, one: Planned) -> RankResources:
        workers = _workers(one)
        return self.session.resources().per_rank(one.name, workers.count, workers.cpus, workers.gpu)

    def _preflight(self, missing: Sequence[Planned], planned: Mapping[str, Planned]) -> None:
        """Run the checks of the worker stages that need models and data, all before the first of them starts."""
        found: dict[str, Mapping[str, float]] = {}
        for one in missing:
            if one.stage.preflight is None:
                continue
            # A folder of this process alone, so that it can be removed whole.
            attempt = self.store.new_attempt(digest_of({"preflight": one.name, "by": uuid4().hex}))
            try:
                found[one.name] = self._check_one(one, one.stage.preflight, planned, attempt)
            except StageError:
                shutil.rmtree(attempt / "inputs", ignore_errors=True)  # its message names the log
                raise
            except BaseException:
                shutil.rmtree(attempt.parent, ignore_errors=True)
                raise
            shutil.rmtree(attempt.parent, ignore_errors=True)
        disk.check(found, self.store)

    def _check_one(self, one: Planned, code: str, planned: Mapping[str, Planned], attempt: Path) -> Mapping[str, float]:
        inputs = {
            role: self.store.checkout(artifact, attempt / "inputs" / role, wire.part)
            for role, wire in one.wires.items()
            if (artifact := _standing_in(planned, wire.instance)) is not None
        }
        earlier = tuple(self.store.attempts(one.key)) if one.key else ()
        context: Context[Any] = Context(
            one.name, "preflight", one.instance.settings, inputs, attempt / "output", attempt, self._cache, earlier
        )
        return launch.run_task(Call(code, context), 1, Watch(self.reporter, one.name, attempt))

    @property
    def _cache(self) -> Path:
        return self.store.root / "cache"

    def _adopt(self, one: Planned) -> bool:
        """Make a result that was found the stage's latest; False where it is gone by then."""
        assert one.record is not None
        ref = self.store.refs(self.config.name).get(one.name)
        if (ref is None or ref.key != one.record.key) and not self.store.set_ref(
            self.config.name, one.name, one.record.key
        ):
            self.store.delete_ref(self.config.name, one.name)
            return False
        self.reporter.update(one.name, state="cached", key=one.record.key, why=one.why)
        return True

    def _wait(self, one: Planned, message: str) -> None:
        self.reporter.update(one.name, state="waiting", message=message)
        self.reporter.line(f"{one.name}: {message}")

    def _tell_notices(self) -> None:
        for notice in self.store.notices:
            self.reporter.line(notice)
        self.store.notices.clear()


def _workers(one: Planned) -> WorkerSettings:
    return getattr(one.instance.settings, "workers")  # noqa: B009 - every stage of workers has it


def _refuse_lost_imports(missing: Sequence[Planned]) -> None:
    """To train such a stage instead would be something that nobody asked for."""
    for one in missing:
        if one.state == "blocked" and not one.needs and one.awaits is None:
            raise DamageError(
                one.why,
                f"stage {one.name}",
                f"rlhf import DIR --as {one.name} again, or rlhf import --forget --as {one.name} to train it",
            )


def _awaiting_people(missing: Sequence[Planned]) -> TryAgainError:
    """All that could run is done, and the rest rests on what people have still to say."""
    one = next(one for one in missing if one.awaits is not None)
    source = next(iter(one.wires.values())).instance
    return TryAgainError(
        f"{one.name} {one.why}", f"{one.name}.file", f"rlhf annotate {source} {one.awaits}, then the same command again"
    )


def _write_failure(attempt: Path, error: RlhfError) -> None:
    values = {"what": error.what, "where": error.where, "next": error.next_step}
    with suppress(OSError):  # on a full disk the error itself must be seen
        (attempt / FAILURE).write_text(json.dumps(values), encoding="utf-8")


def _standing_in(planned: Mapping[str, Planned], name: str) -> str | None:
    """An instance's artifact, or of the nearest committed model that it will be a trained version of."""
    one = planned[name]
    if one.record is not None:
        return one.record.artifact
    return _standing_in(planned, one.wires[one.stage.continues].instance) if one.stage.continues else None
