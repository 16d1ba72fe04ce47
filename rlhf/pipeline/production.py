"""One stage from lease to commit: adopt the result of another run, or run the stage and commit its result."""

import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.cluster import worker_group
from rlhf.cluster.session import RankResources, Resources, Session
from rlhf.cluster.worker import Call
from rlhf.config.base import semantic_values
from rlhf.config.pipeline import PipelineConfig
from rlhf.config.stages import WorkerSettings
from rlhf.config.zero import ZeroSettings
from rlhf.errors import InterruptedRunError, LeaseLostError, PreflightError, RequestError, RlhfError, StageError
from rlhf.pipeline.documents import provenance
from rlhf.pipeline.plan import Planned
from rlhf.pipeline.reporting import Reporter, Stop, Watch, outcome
from rlhf.pipeline.uploads import clear_checkpoints, fetch_attempts, upload_failure, uploading
from rlhf.store import SCRATCH, ActionRecord, Store, digest_of

SCORERS = "rlhf.training.scorers:run"
"""What ranks that are set apart run, whatever the stage."""


def needs_of(planned: Planned, resources: Resources) -> RankResources:
    """Return the resources of a task or of a worker group's ranks; raise a PreflightError if there is no room."""
    if planned.stage.runs == "task":
        return RankResources(1, resources.for_task(), gpu=False)
    settings: Any = planned.instance.settings
    workers: WorkerSettings = settings.workers
    # Settings of other packages' stages need not say what is dealt out, to whom not, nor how models are sharded.
    dealt_out, set_apart = getattr(settings, "dealt_out", ()), getattr(settings, "set_apart", 0)
    together = getattr(settings, "zero", ZeroSettings()).secondary_partition
    count = resources.ranks(planned.name, workers, dealt_out, together, set_apart)
    return resources.per_rank(planned.name, count, workers.cpus, workers.gpu)


def with_ranks(context: Context[Any], needs: RankResources) -> Context[Any]:
    """Return the context of a worker group, or of its preflight, with the number of ranks where that is ``auto``."""
    workers: WorkerSettings = context.settings.workers
    if workers.count != "auto":
        return context
    decided = workers.model_copy(update={"count": needs.count, "min": 1, "max": None})
    return replace(context, settings=context.settings.model_copy(update={"workers": decided}))


def context_of(
    planned: Planned,
    key: str,
    parts: Mapping[str, tuple[str, str]],
    attempt: Path,
    store: Store,
    tracking: Mapping[str, Any],
) -> Context[Any]:
    """Check inputs out into an attempt; return the stage's context.

    parts  role to an artifact and a part of it
    """
    folder = AttemptFolder(attempt)
    inputs = {role: store.checkout(artifact, folder.inputs / role, part) for role, (artifact, part) in parts.items()}
    return Context(
        stage=planned.name,
        key=key,
        settings=planned.instance.settings,
        inputs=inputs,
        output=folder.output,
        attempt=attempt,
        attempts=tuple(store.attempts(planned.key)) if planned.key else (),
        cache=store.root / "cache",
        tracking=tracking,
    )


@dataclass(frozen=True)
class Production:
    """Produces missing results of a pipeline, each under its lease."""

    config: PipelineConfig
    store: Store
    session: Session
    reporter: Reporter
    stop: Stop

    def bring_up_to_date(self, planned: Planned) -> None:
        """Produce or adopt the result under the lease; when the lease is lost, wait for it and begin again."""
        for _ in range(self.config.cluster.max_failures):
            try:
                self._under_lease(planned)
                return
            except LeaseLostError as error:
                self.reporter.line(f"{planned.name}: {error.what}; {error.next_step}")
        self._under_lease(planned)

    def _under_lease(self, planned: Planned) -> None:
        """Take the lease; adopt the result of another run, or produce a result and commit it."""
        assert planned.key is not None
        holders: list[str] = []  # filled with the new holder when the lease is lost

        def report_waiting(message: str) -> None:
            self.reporter.update(planned.name, state="waiting", message=message)
            self.reporter.line(f"{planned.name}: {message}")

        def refuse_if_stopped() -> None:
            if self.stop.asked:
                raise InterruptedRunError("interrupted")

        with self.store.lease(
            planned.key, timeout=None, on_wait=report_waiting, on_loss=holders.append, check=refuse_if_stopped
        ):
            # Another run may have committed the result while this one waited for the lease.
            if self._adopt(planned):
                return
            try:
                with self._attempt(planned) as attempt:
                    metrics, seconds = self._run(planned, attempt, holders)
                    self._commit(planned, attempt, metrics, seconds)
            except RlhfError as error:
                # The new holder may have committed the result, and removed files that this attempt was reading.
                if not self._adopt(planned):
                    raise
                self.reporter.line(f"{planned.name}: {error.what}; another run has the result")

    def _adopt(self, planned: Planned) -> bool:
        """Set the pipeline's ref to the result of another run; return False if there is none."""
        assert planned.key is not None
        record = self.store.lookup(planned.key)
        if record is None or not self.store.set_ref(self.config.name, planned.name, record.key):
            return False
        why = "made by another run"
        self.reporter.update(planned.name, state="cached", key=record.key, why=why, message="", done=0, total=0)
        return True

    @contextmanager
    def _attempt(self, planned: Planned) -> Generator[Path]:
        """Make an attempt; report its start, and the error that ends it."""
        assert planned.key is not None
        name = planned.name
        fetch_attempts(self.store, planned.key, name, self.reporter.line)
        attempt = self.store.new_attempt(planned.key)
        self.reporter.update(name, state="running", key=planned.key, why=planned.why, message="", done=0, total=0)
        try:
            with self.stop.heeded():
                yield attempt
        except (InterruptedRunError, LeaseLostError):
            self.reporter.update(name, state="waiting")
            raise
        except RlhfError as error:
            self.reporter.update(name, state="failed")
            with suppress(OSError):  # on a full disk the error itself must be seen
                AttemptFolder(attempt).error.write(error)
                upload_failure(self.store, attempt)
            raise
        finally:
            shutil.rmtree(AttemptFolder(attempt).inputs, ignore_errors=True)

    def _run(self, planned: Planned, attempt: Path, holders: Sequence[str]) -> tuple[dict[str, float], float]:
        """Run the stage; return its final metrics and the seconds that it took."""
        assert planned.key is not None
        parts = {role: (str(entry["artifact"]), str(entry["part"])) for role, entry in planned.inputs.items()}
        context = context_of(planned, planned.key, parts, attempt, self.store, self._tracking(planned))
        context.output.mkdir()
        show = Watch(self.reporter, planned.name, context.folder)

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

        start = time.monotonic()
        with uploading(self.store, attempt, planned.name, self.reporter.line):
            if planned.stage.runs == "task":
                context.folder.resources.write({"ranks": 1, "gpus": 0})
                call, cpus = Call(planned.stage.code, context), self.session.resources().for_task()
                metrics = worker_group.run_task(call, cpus, watch)
            else:
                needs = needs_of(planned, self.session.resources())
                context.folder.resources.write({"ranks": needs.count, "gpus": needs.count if needs.gpu else 0})
                begin, fits = partial(self._begin, planned, context), partial(self._fits, context)
                max_failures = self.config.cluster.max_failures
                metrics = worker_group.run_group(begin, fits, max_failures, watch, self.reporter.line)
        return metrics, time.monotonic() - start

    def _begin(
        self, planned: Planned, context: Context[Any], before: RankResources | None
    ) -> tuple[Call, RankResources]:
        """Return what a worker group runs, and its ranks: with ``count: auto`` as many as there is room for now.

        before  the ranks of the group that failed; where there is no longer room for them, or with ``auto`` for the
                fewest, the group waits for it
        """
        workers: WorkerSettings = context.settings.workers
        needs = before
        if before is None or workers.count == "auto":
            try:
                needs = needs_of(planned, self.session.resources())
            except PreflightError:
                if before is None:
                    raise
                needs = replace(before, count=workers.min)
        assert needs is not None
        context = with_ranks(context, needs)
        set_apart = getattr(context.settings, "set_apart", 0)
        minutes, stage = workers.timeout_minutes, planned.stage
        return Call(stage.code, context, needs.gpu, minutes, stage.imports, set_apart, SCORERS), needs

    def _fits(self, context: Context[Any], needs: RankResources) -> bool:
        """Return whether a group that has not begun may wait for its places; without them fewer ranks could begin."""
        workers: WorkerSettings = context.settings.workers
        return workers.count != "auto" or needs.count <= workers.min or self.session.resources().has(needs)

    def _tracking(self, planned: Planned) -> dict[str, Any]:
        """Return what sinks are told of a stage; addresses are those of results in the store."""
        settings, address = self.config.tracking, self.store.address
        # W&B reads none of it: of a local file it would want to see that it exists, and this result does not yet.
        scheme = "" if "://" in address else "rlhf-store:"
        meaning = {name: semantic_values(instance.settings) for name, instance in self.config.instances.items()}
        inputs: dict[str, tuple[str, str]] = {}
        for role, wire in planned.wires.items():
            entry = planned.inputs[role]
            # What was imported under no key is named by its content.
            name = f"actions/{entry['key']}.json" if entry["key"] else f"manifests/{entry['artifact']}.json"
            kind = self.store.manifest(str(entry["artifact"])).kind
            inputs[wire.instance] = (kind, f"{scheme}{address}/{name}")
        return {
            "sinks": settings.sinks,
            "mode": settings.wandb,
            "project": settings.project,
            "entity": settings.entity,
            "pipeline": self.config.name,
            "group": f"{self.config.name}-{digest_of(meaning)[:8]}",
            "folder": self.store.root / "tracking",
            "result": (planned.stage.kind, f"{scheme}{address}/actions/{planned.key}.json"),
            "inputs": inputs,
        }

    def _commit(self, planned: Planned, attempt: Path, metrics: dict[str, float], seconds: float) -> None:
        assert planned.key is not None
        made_in = AttemptFolder(attempt)
        others = [AttemptFolder(path) for path in self.store.attempts(planned.key) if path != attempt]
        circumstances: dict[str, Any] = {
            "earlier_attempts": [cost for other in others if (cost := other.cost())],
            # Never the same key: it is produced again only because its result was damaged.
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
            # The stage's output is at fault, and not the user's request.
            what = f"{planned.name} made no valid result: {error.what}"
            raise StageError(what, error.where, error.next_step) from error
        clear_checkpoints(self.store, planned.key, attempt)
        for name in SCRATCH:
            for folder in self.store.attempts(planned.key):
                shutil.rmtree(folder / name, ignore_errors=True)
        message = outcome(planned.stage, metrics)
        self.reporter.update(planned.name, state="done", message=message, done=0, total=0, seconds=seconds)
