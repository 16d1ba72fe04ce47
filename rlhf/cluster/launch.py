"""Running a stage's code on Ray, as a task or as a worker group, while the driver watches."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf import errors
from rlhf.cluster.session import RankResources
from rlhf.cluster.worker import RESULT, Call, Failure, no_room, perform_rank, perform_task, read_failures
from rlhf.errors import DivergedError, RequestError, RewardError, RlhfError, StageError, is_no_room

POLL_SECONDS = 0.25

# What would go wrong again from the same checkpoint, or has been tried often enough already.
FINAL = (RequestError, DivergedError, RewardError, errors.TryAgainError)


def run_task(call: Call, cpus: int, watch: Callable[[], None]) -> dict[str, float]:
    """Run the code as one Ray task; ``watch`` is called a few times a second.

    Raises:
        RlhfError: the code's own error, or a StageError for anything else.
    """
    import ray
    from ray.exceptions import RayError

    reference = ray.remote(num_cpus=cpus, max_retries=0)(perform_task).remote(call)
    try:
        while not ray.wait([reference], timeout=POLL_SECONDS)[0]:
            watch()
        watch()
        ray.get(reference)
    except RayError as error:
        raise cause_of(call, error) from error
    return _result(call.context.attempt)


def run_group(
    call: Call, resources: RankResources, max_failures: int, watch: Callable[[], None], say: Callable[[str], None]
) -> dict[str, float]:
    """Run the code on a worker group; after a failure the whole group starts again from its newest checkpoint.

    Ray Train starts and supervises the ranks. The retries are ours: it would retry errors that no retry mends.

    Raises:
        RlhfError: the code's own error, or a StageError once the retries are used up.
    """
    for attempt in range(max_failures + 1):
        for path in call.context.attempt.glob("failure-*.json"):
            path.unlink()
        shutil.rmtree(call.context.output, ignore_errors=True)  # what a killed export left there
        call.context.output.mkdir()
        failed = _fit(call, resources, f"group-{attempt}", watch)
        if failed is None:
            return _result(call.context.attempt)
        error = cause_of(call, failed)
        if isinstance(error, FINAL) or attempt == max_failures:
            raise error from failed
        again = f"starting again from the newest checkpoint ({attempt + 1} of {max_failures})"
        say(f"{call.context.stage}: {error.what}; {again}")
    raise AssertionError("the loop returns or raises")


def _fit(call: Call, resources: RankResources, name: str, watch: Callable[[], None]) -> Exception | None:
    from ray.exceptions import RayError
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    trainer = TorchTrainer(
        perform_rank,
        train_loop_config={"call": call},
        torch_config=TorchConfig(backend="nccl" if resources.gpu else "gloo", timeout_s=int(call.timeout_minutes * 60)),
        scaling_config=ScalingConfig(
            num_workers=resources.count, use_gpu=resources.gpu, resources_per_worker=_per_worker(resources)
        ),
        run_config=RunConfig(
            name=name, storage_path=str(call.context.attempt / "ray"), failure_config=FailureConfig(max_failures=0)
        ),
    )
    outcome: list[Exception | None] = []

    def fit() -> None:
        try:
            trainer.fit()
            outcome.append(None)
        except Exception as error:  # noqa: BLE001 - handed to the main thread, which tells what it means
            outcome.append(error)

    # In a thread of its own, so that the main thread can show progress and take Ctrl-C.
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        watch()
    error = outcome[0]
    if error is not None and not isinstance(error, TrainingFailedError | RayError):
        raise error  # our own mistake or Ray's, and no failure of a rank
    return error


def _per_worker(resources: RankResources) -> dict[str, float]:
    return {"CPU": float(resources.cpus)} | ({"GPU": 1.0} if resources.gpu else {})


def cause_of(call: Call, error: Exception) -> RlhfError:
    """What a failed call means to the user: the ranks' own account first, Ray's otherwise."""
    failures = read_failures(call.context.attempt)
    if not failures:
        # A worker that could not even open the attempt's folder has only Ray to tell us through.
        causes = [error, *getattr(error, "worker_failures", {}).values()]
        for cause in (getattr(one, "cause", None) for one in causes):
            if isinstance(cause, RlhfError):
                return cause
            if isinstance(cause, OSError) and is_no_room(cause):
                return no_room(cause, call.context.attempt)
        return StageError(
            f"a rank of {call.context.stage} died without a word: killed, or out of memory",
            f"{_first_line(error)}; log: {call.context.attempt / 'log-0.txt'}",
            "run the same command again: it goes on from the newest checkpoint",
        )
    # A rank that fails takes its peers down in their next collective: the informative error is one of ours, if any.
    ours = [failure for failure in failures if _class_of(failure) is not None]
    failure = (ours or failures)[0]
    place = f"rank {failure.rank} on {failure.host} (pid {failure.pid}); log: {failure.log}"
    kind = _class_of(failure)
    if kind is None:
        return StageError(
            f"{call.context.stage} failed: {failure.error}: {_shortened(failure.args[0])}",
            place,
            f"less +G {failure.log}",
        )
    what, where, next_step = failure.args
    return kind(what, where or place, next_step or f"less +G {failure.log}")


def _class_of(failure: Failure) -> type[RlhfError] | None:
    kind = getattr(errors, failure.error, None)
    return kind if isinstance(kind, type) and issubclass(kind, RlhfError) else None


def _first_line(error: Any) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _shortened(lines[-1]) if lines else type(error).__name__


def _shortened(text: str, limit: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _result(attempt: Path) -> dict[str, float]:
    return json.loads((attempt / RESULT).read_text())
