"""Running a stage's code on Ray, as a task or as a worker group, while the driver watches."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rlhf.attempt import liveness
from rlhf.attempt.checkpoints import newest_complete, step_of
from rlhf.cluster.causes import Retries, cause_of
from rlhf.cluster.session import RankResources
from rlhf.cluster.watchdog import Watchdog
from rlhf.cluster.worker import RESULT, Call, perform_task, read_failures
from rlhf.cluster.worker_group import POLL_SECONDS, WorkerGroup
from rlhf.errors import ClusterLostError, HangError, RlhfError


def run_task(call: Call, cpus: int, watch: Callable[[], None]) -> dict[str, float]:
    """Run the code as one Ray task; ``watch`` is called a few times a second, and what it raises ends the task.

    Raises:
        RlhfError: the code's own error, or what became of its process.
    """
    import ray
    from ray.exceptions import RayError

    reference = ray.remote(num_cpus=cpus, max_retries=0)(perform_task).remote(call)
    watchdog = Watchdog(call, 1)
    try:
        while not ray.wait([reference], timeout=POLL_SECONDS)[0]:
            watch()
            watchdog()
        watch()
        ray.get(reference)
    except RayError as error:
        raise cause_of(call, [(None, error)], read_failures(call.context.attempt)) from error
    except ClusterLostError:
        raise  # there is nobody left to ask
    except BaseException:
        with suppress(RayError):  # it may have ended, or Ray itself
            ray.cancel(reference, force=True)
        raise
    return _result(call.context.attempt)


def run_group(
    call: Call, resources: RankResources, max_failures: int, watch: Callable[[], None], say: Callable[[str], None]
) -> dict[str, float]:
    """Run the code on a worker group; after a failure the whole group starts again from its newest checkpoint.

    max_failures  how often in a row without a new checkpoint

    What ``watch``, which is called a few times a second, raises ends the group.

    Raises:
        RlhfError: the code's own error, what became of a rank once the retries are used up, or what ``watch`` raised.
    """
    retries = Retries(max_failures)
    while True:
        for path in call.context.attempt.glob("failure-*.json"):
            path.unlink()
        liveness.forget(call.context.attempt)
        shutil.rmtree(call.context.output, ignore_errors=True)  # what a killed export left there
        call.context.output.mkdir(exist_ok=True)  # where somebody is still about to be ended
        error = _run_once(call, resources, watch)
        if error is None:
            return _result(call.context.attempt)
        checkpoint = newest_complete([call.context.attempt])
        if not retries.allow(error, step_of(checkpoint) if checkpoint else -1):
            raise error
        again = f"starting again from the newest checkpoint ({retries.count} of {max_failures})"
        say(f"{call.context.stage}: {error.what}; {again}; {error.where}")


def _run_once(call: Call, resources: RankResources, watch: Callable[[], None]) -> RlhfError | None:
    """Run one group to its end; why it failed, or None."""
    watchdog = Watchdog(call, resources.count)
    group = WorkerGroup(call, resources)
    try:
        while not group.is_over(POLL_SECONDS):
            watch()
            watchdog()
        watch()  # once more: where Ray has died, what became of the ranks says nothing
    except ClusterLostError:
        raise  # there is nobody left to ask
    except HangError as error:
        group.stop()
        return error
    except BaseException:
        group.stop()
        raise
    return group.outcome()


def _result(attempt: Path) -> dict[str, float]:
    return json.loads((attempt / RESULT).read_text())
