"""Running a stage's code on Ray, as a task or as a worker group, while the driver watches."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.cluster.causes import cause_of, may_retry
from rlhf.cluster.session import RankResources
from rlhf.cluster.watchdog import Watchdog
from rlhf.cluster.worker import RESULT, Call, perform_rank, perform_task
from rlhf.errors import ClusterLostError, HangError, RlhfError
from rlhf.pipeline import pulse

POLL_SECONDS = 0.25
END_SECONDS = 30.0
"""How long the processes of an ended group may take to go."""
CONTROLLER = "controller.pid"


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
        raise cause_of(call, error) from error
    except ClusterLostError:
        raise  # there is nobody left to ask
    except RlhfError:
        with suppress(RayError):  # it may have ended, or Ray itself
            ray.cancel(reference, force=True)
        raise
    return _result(call.context.attempt)


def run_group(
    call: Call, resources: RankResources, max_failures: int, watch: Callable[[], None], say: Callable[[str], None]
) -> dict[str, float]:
    """Run the code on a worker group; after a failure the whole group starts again from its newest checkpoint.

    Ray Train starts and supervises the ranks. The retries are ours: it would retry errors that no retry mends. What
    ``watch``, which is called a few times a second, raises ends the group.

    Raises:
        RlhfError: the code's own error, what became of a rank once the retries are used up, or what ``watch`` raised.
    """
    failures: list[RlhfError] = []
    while True:
        for path in call.context.attempt.glob("failure-*.json"):
            path.unlink()
        pulse.forget(call.context.attempt)
        shutil.rmtree(call.context.output, ignore_errors=True)  # what a killed export left there
        call.context.output.mkdir()
        failed = _fit(call, resources, f"group-{len(failures)}", watch)
        if failed is None:
            return _result(call.context.attempt)
        error = failed if isinstance(failed, HangError) else cause_of(call, failed)
        failures.append(error)
        if not may_retry(error, failures, max_failures):
            raise error from failed
        again = f"starting again from the newest checkpoint ({len(failures)} of {max_failures})"
        say(f"{call.context.stage}: {error.what}; {again}; {error.where}")


def _fit(call: Call, resources: RankResources, name: str, watch: Callable[[], None]) -> Exception | None:
    """Run one group to its end; why it failed, or None."""
    from ray.exceptions import RayError
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    from rlhf.cluster.lean_trainer import LeanTrainer, TellController

    # Ray's annotation knows the callbacks for users alone.
    callbacks: list[Any] = [TellController(call.context.attempt / CONTROLLER)]
    trainer = LeanTrainer(
        perform_rank,
        train_loop_config={"call": call},
        scaling_config=ScalingConfig(
            num_workers=resources.count, use_gpu=resources.gpu, resources_per_worker=_per_worker(resources)
        ),
        run_config=RunConfig(
            name=name,
            storage_path=_room(call.context.attempt),
            failure_config=FailureConfig(max_failures=0),
            callbacks=callbacks,
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
    watchdog = Watchdog(call, resources.count)
    try:
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            watch()
            watchdog()
    except ClusterLostError:
        raise  # there is nobody left to ask
    except HangError as error:
        _end_group(call.context.attempt, thread, trainer)
        return error
    except RlhfError:
        _end_group(call.context.attempt, thread, trainer)
        raise
    error = outcome[0]
    if isinstance(error, RayError):
        _release(call.context.attempt)
    if error is not None and not isinstance(error, TrainingFailedError | RayError):
        raise error  # our own mistake or Ray's, and no failure of a rank
    return error


def _end_group(attempt: Path, thread: threading.Thread, trainer: Any) -> None:
    """End a group whatever its processes are doing.

    Ray kills the ranks once their controller is gone, on other nodes too; one that is stopped only after 5 s.
    """
    import ray

    end = time.monotonic() + END_SECONDS
    # Again and again: what is only beginning has not told yet what it must be ended by.
    while thread.is_alive() and time.monotonic() < end:
        if trainer.controller is not None:
            ray.kill(trainer.controller)
        # Ray asks the process to end itself, which a stopped one does not.
        with suppress(OSError, ValueError):
            os.kill(int((attempt / CONTROLLER).read_text()), signal.SIGKILL)
        for rank in pulse.pulses(attempt).values():
            if rank.is_here():
                with suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGKILL)
        thread.join(POLL_SECONDS)
    # A rank that still ran would write into the folder of the group that comes next.
    while time.monotonic() < end and any(one.is_here() for one in pulse.pulses(attempt).values()):
        time.sleep(POLL_SECONDS)
    _release(attempt)


def _release(attempt: Path) -> None:
    """Give back the room that a dead controller has taken or waits for: Ray would keep it until the driver ends."""
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    table: dict[str, dict[str, Any]] = placement_group_table()
    for identity, entry in table.items():
        if entry["name"] == _room(attempt) and entry["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(identity))))


def _room(attempt: Path) -> str:
    """Where Ray Train keeps its own files of an attempt, and the name of the room that it takes for it."""
    return str(attempt / "ray")


def _per_worker(resources: RankResources) -> dict[str, float]:
    return {"CPU": float(resources.cpus)} | ({"GPU": 1.0} if resources.gpu else {})


def _result(attempt: Path) -> dict[str, float]:
    return json.loads((attempt / RESULT).read_text())
