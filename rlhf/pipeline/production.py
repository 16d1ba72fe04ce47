"""One stage from its lease to its commit: adopt the result of another run, or run the stage and commit its own."""

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.cluster import worker_group
from rlhf.cluster.session import RankResources, Session
from rlhf.cluster.worker import Call
from rlhf.config.pipeline import PipelineConfig
from rlhf.config.stages import WorkerSettings
from rlhf.errors import InterruptedRunError, LeaseLostError, RequestError, RlhfError, StageError
from rlhf.pipeline.documents import provenance
from rlhf.pipeline.plan import Planned
from rlhf.pipeline.reporting import Reporter, Stop, Watch
from rlhf.pipeline.uploads import clear_checkpoints, fetch_attempts, uploading
from rlhf.store import SCRATCH, ActionRecord, Store


def workers_of(planned: Planned) -> WorkerSettings:
    """Return the worker settings of a stage that runs as a worker group."""
    return getattr(planned.instance.settings, "workers")  # noqa: B009 - every stage of workers has it


def ranks_of(planned: Planned, session: Session) -> RankResources:
    """Return what each rank of a worker group gets.

    Raises:
        PreflightError: the cluster has no room for such a group.
    """
    workers = workers_of(planned)
    return session.resources().per_rank(planned.name, workers.count, workers.cpus, workers.gpu)


@dataclass(frozen=True)
class Production:
    """Produces missing results of a pipeline, each under its lease."""

    config: PipelineConfig
    store: Store
    session: Session
    reporter: Reporter
    stop: Stop

    def bring_up_to_date(self, planned: Planned) -> None:
        """Take the lease and produce the result; when the lease is lost, wait for it again and adopt the result."""
        for _ in range(self.config.cluster.max_failures):
            try:
                self._under_lease(planned)
                return
            except LeaseLostError as error:
                self.reporter.line(f"{planned.name}: {error.what}; {error.next_step}")
        self._under_lease(planned)

    def _under_lease(self, planned: Planned) -> None:
        assert planned.key is not None
        holders: list[str] = []
        with self.store.lease(
            planned.key,
            timeout=None,
            on_wait=lambda message: self._report_waiting(planned, message),
            on_loss=holders.append,
            check=self._refuse_to_go_on,
        ):
            # Another run may have committed the result while this one waited for the lease.
            if self._adopt(planned):
                return
            try:
                self._produce(planned, holders)
            except RlhfError as error:
                # The new holder may have committed the result, and removed what this attempt was reading.
                if not self._adopt(planned):
                    raise
                self.reporter.line(f"{planned.name}: {error.what}; another run has the result")

    def _report_waiting(self, planned: Planned, message: str) -> None:
        self.reporter.update(planned.name, state="waiting", message=message)
        self.reporter.line(f"{planned.name}: {message}")

    def _refuse_to_go_on(self) -> None:
        if self.stop.asked:
            raise InterruptedRunError("interrupted")

    def _adopt(self, planned: Planned) -> bool:
        """Point the pipeline at the result of another run; False where there is none."""
        assert planned.key is not None
        record = self.store.lookup(planned.key)
        if record is None or not self.store.set_ref(self.config.name, planned.name, record.key):
            return False
        why = "made by another run"
        self.reporter.update(planned.name, state="cached", key=record.key, why=why, message="", done=0, total=0)
        return True

    def _produce(self, planned: Planned, holders: Sequence[str]) -> None:
        """Run the stage in a new attempt and commit its result.

        holders  who holds the lease instead, filled when it is lost
        """
        assert planned.key is not None
        name, line = planned.name, self.reporter.line
        fetch_attempts(self.store, planned.key, name, line)
        attempt = self.store.new_attempt(planned.key)
        self.reporter.update(name, state="running", key=planned.key, why=planned.why, message="", done=0, total=0)
        try:
            with self.stop.heeded():
                context = self._context(planned, attempt)
                context.output.mkdir()
                start = time.monotonic()
                with uploading(self.store, attempt, name, line):
                    metrics = self._run(planned, context, holders)
                seconds = time.monotonic() - start
                self._commit(planned, attempt, metrics, seconds)
        except (InterruptedRunError, LeaseLostError):
            self.reporter.update(name, state="waiting")
            raise
        except RlhfError as error:
            self.reporter.update(name, state="failed")
            with suppress(OSError):  # on a full disk the error itself must be seen
                AttemptFolder(attempt).error.write(error)
            raise
        finally:
            shutil.rmtree(AttemptFolder(attempt).inputs, ignore_errors=True)
        # A stage's first metrics are those that tell most; counts of rows by the dozen tell nothing in a line.
        first = list(metrics.items())[:3] if planned.stage.runs == "workers" or len(metrics) <= 3 else []
        shown = "  ".join(f"{metric} {value:.3g}" for metric, value in first)
        self.reporter.update(name, state="done", message=shown, done=0, total=0, seconds=seconds)

    def _context(self, planned: Planned, attempt: Path) -> Context[Any]:
        """Check the inputs out into the attempt, and describe it to the stage."""
        assert planned.key is not None
        tracking = self.config.tracking
        inputs = {
            role: self.store.checkout(str(entry["artifact"]), AttemptFolder(attempt).inputs / role, str(entry["part"]))
            for role, entry in planned.inputs.items()
        }
        return Context(
            stage=planned.name,
            key=planned.key,
            settings=planned.instance.settings,
            inputs=inputs,
            output=AttemptFolder(attempt).output,
            attempt=attempt,
            attempts=tuple(self.store.attempts(planned.key)),
            cache=self.store.root / "cache",
            tracking={
                "mode": tracking.wandb,
                "project": tracking.project,
                "entity": tracking.entity,
                "group": self.config.name,
            },
        )

    def _run(self, planned: Planned, context: Context[Any], holders: Sequence[str]) -> dict[str, float]:
        show = Watch(self.reporter, planned.name, context.attempt)

        def watch() -> None:
            show()
            self.session.check()
            if holders:
                what = f"the lease was lost to {holders[0]}"
                raise LeaseLostError(what, str(context.attempt), "waiting for its result")
            if self.stop.asked:
                if planned.stage.runs == "task" or self.stop.aborted:
                    raise InterruptedRunError("interrupted")
                # The ranks save at their next step, stop, and say so.
                context.folder.stop.touch()

        if planned.stage.runs == "task":
            context.folder.resources.write({"ranks": 1, "gpus": 0})
            return worker_group.run_task(Call(planned.stage.code, context), self.session.resources().for_task(), watch)
        ranks = ranks_of(planned, self.session)
        context.folder.resources.write({"ranks": ranks.count, "gpus": ranks.count if ranks.gpu else 0})
        call = Call(planned.stage.code, context, ranks.gpu, workers_of(planned).timeout_minutes)
        return worker_group.run_group(call, ranks, self.config.cluster.max_failures, watch, self.reporter.line)

    def _commit(self, planned: Planned, attempt: Path, metrics: dict[str, float], seconds: float) -> None:
        assert planned.key is not None
        made_in = AttemptFolder(attempt)
        others = [AttemptFolder(path) for path in self.store.attempts(planned.key) if path != attempt]
        circumstances: dict[str, Any] = {
            "earlier_attempts": [cost for other in others if (cost := other.cost())],
            # Not the same key again: a damaged result that is made anew has no other reason.
            "previous": planned.before.key if planned.before and planned.before.key != planned.key else None,
            "origin": made_in.origin.get() or {},
        }
        try:
            manifest = self.store.put_artifact(made_in.output, planned.stage.kind)
            self.store.publish(
                ActionRecord(
                    key=planned.key,
                    stage=planned.stage.name,
                    version=planned.stage.version,
                    settings=dict(planned.settings),
                    inputs={role: dict(entry) for role, entry in planned.inputs.items()},
                    artifact=manifest.digest,
                    metrics=metrics,
                    provenance=provenance() | made_in.resources_used() | circumstances,
                    seconds=round(seconds, 3),
                    attempt=attempt.name,
                ),
                self.config.name,
                planned.name,
            )
        except RequestError as error:
            # What the stage wrote is at fault, and not what the user asked for.
            what = f"{planned.name} made no valid result: {error.what}"
            raise StageError(what, error.where, error.next_step) from error
        clear_checkpoints(self.store, planned.key, attempt)
        for name in SCRATCH:
            for folder in self.store.attempts(planned.key):
                shutil.rmtree(folder / name, ignore_errors=True)
