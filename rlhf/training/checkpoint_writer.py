"""Write in-stage checkpoints: all ranks write into a folder, and when all are done rank 0 marks it complete."""

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.attempt.context import Context
from rlhf.attempt.folder import KEPT, MARKER, AttemptFolder, is_complete, marker, newest_complete, step_of
from rlhf.config.zero import ZeroSettings
from rlhf.errors import DiskFullError, PreflightError, is_no_room, size
from rlhf.zero import group

SHARDS = 1
"""The form of a checkpoint's files, as a number that grows when it changes."""


def checkpoint_to_resume(context: Context[Any]) -> Path | None:
    """Return the checkpoint that a stage continues from, or None. A collective.

    Those of an optimiser on ``nvme`` are removed: nothing continues them.

    Raises:
        PreflightError: it was written on machines that compute in another precision, or by an older version; or another
            user could have written it.
    """
    newest = newest_complete(list(context.attempts))
    if newest is None:
        return None
    refuse_planted(newest, context.attempt)
    written = marker(newest)
    begun = f"{context.stage} has a checkpoint"
    if written.get("shards") != SHARDS:
        raise PreflightError(
            f"{begun} of an older version at step {step_of(newest)}, which this one cannot continue",
            str(newest),
            "finish the stage with that version, or remove that folder to restart the stage",
        )
    if written["optimiser"] == "nvme":
        _discard(context, f"{begun} of an optimiser on nvme at step {step_of(newest)}, which cannot be continued")
        return None
    precision = group.precision_of(context)
    if (begun_in := written["precision"]) != precision:
        raise PreflightError(
            f"{begun} in {begun_in} at step {step_of(newest)}, which this CPU, computing in {precision}, "
            "cannot continue",
            str(newest),
            "run it on a machine like the first one, or remove that folder to restart the stage",
        )
    if (ranks := written["ranks"]) != group.world_size() and group.is_main():
        context.note(f"{group.world_size()} rank(s) continue at step {step_of(newest)}, which {ranks} had reached")
    return newest


def _discard(context: Context[Any], why: str) -> None:
    """Remove the checkpoints of all attempts, which no longer count for the journal either. A collective."""
    group.barrier()  # no rank may miss what the others have seen
    if group.is_main():
        for attempt in context.attempts:
            shutil.rmtree(AttemptFolder(attempt).checkpoints, ignore_errors=True)
        context.note(f"{why}: starting over")
    group.barrier()


def refuse_planted(checkpoint: Path, attempt: Path) -> None:
    """Refuse a checkpoint that another user could have written: the run would continue with their weights.

    attempt  the folder of the attempt that continues, where this process writes

    Raises:
        PreflightError: the folder is a link, belongs to another user, or others may write into it.
    """
    state = checkpoint.lstat()
    # Not the process's own number: a network file system may give what root writes to another user.
    with tempfile.TemporaryFile(dir=attempt) as probe:
        owner = os.fstat(probe.fileno()).st_uid
    if not stat.S_ISDIR(state.st_mode):
        why = "is a link"
    elif state.st_uid != owner:
        why = "belongs to another user"
    elif state.st_mode & 0o022:
        why = "may be written by other users"
    else:
        return
    raise PreflightError(
        f"the checkpoint to continue from {why}: others could decide what is trained on",
        str(checkpoint),
        "remove it, or if you know that it is yours: chown it to the user that runs the workers, and chmod 700 it",
    )


@contextmanager
def writing(context: Context[Any], step: int, estimate: int) -> Generator[Path]:
    """Inside, every rank writes its part of a step's checkpoint into the yielded folder; afterwards that is complete.

    A collective, to enter and to leave.

    estimate  bytes that all ranks will write; where the newest checkpoint of this key is larger, its size counts

    Raises:
        DiskFullError: on every rank, before anything is written, where there is not that much room; on the rank that
            ran out of room, where that happens in the middle. Complete checkpoints stay, the begun one is removed.
    """
    checkpoint = context.folder.checkpoint(step)
    needed = group.from_main(lambda: _make_room(checkpoint, context.attempts, estimate))
    try:
        yield checkpoint
        mark_complete(checkpoint, context)
    except Exception as error:
        written, free = _size(checkpoint), shutil.disk_usage(context.attempt).free
        cause: BaseException | None = error
        while cause is not None and not is_no_room(cause):
            cause = cause.__cause__ or cause.__context__
        if cause is None and free >= needed - written:
            raise
        # Its room is needed to report the failure, and for the next try.
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise _disk_full(checkpoint, needed, free + written) from error


def _make_room(checkpoint: Path, attempts: Sequence[Path], estimate: int) -> int:
    """Empty the checkpoint's folder; return the bytes that are needed, for which there is room."""
    # Files that a killed group left there must not pass for a part of this checkpoint.
    shutil.rmtree(checkpoint, ignore_errors=True)
    earlier = newest_complete([*attempts, checkpoint.parents[1]])
    # The newest may be the smaller: a model that has not taken a step yet has no moments.
    needed = estimate if earlier is None else max(estimate, _size(earlier))
    free = shutil.disk_usage(checkpoint.parents[1]).free
    if free < needed:
        raise _disk_full(checkpoint, needed, free)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    # A user who could add to it could change the weights that the run continues with.
    checkpoint.mkdir(mode=0o700)
    return needed


def _disk_full(checkpoint: Path, needed: int, free: int) -> DiskFullError:
    return DiskFullError(
        f"no room for the checkpoint of step {step_of(checkpoint)}: {size(needed)} needed, {size(free)} free",
        str(checkpoint.parent),
        "free some space and run the same command again: it continues from the newest complete checkpoint",
    )


def _size(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def mark_complete(checkpoint: Path, context: Context[Any]) -> None:
    """Mark a checkpoint that all ranks have written as complete, then remove older and partial ones of its attempt.

    A collective: every rank must call it after its own writes.
    """
    group.barrier()
    made = {
        "ranks": group.world_size(),
        "precision": group.precision_of(context),
        # Stages of other packages need not have the settings.
        "optimiser": getattr(context.settings, "zero", ZeroSettings()).offload_optimizer,
        "shards": SHARDS,
    }
    group.from_main(lambda: _mark_complete(checkpoint, made))


def _mark_complete(checkpoint: Path, made: dict[str, Any]) -> None:
    sizes: dict[str, int] = {}
    checkpoint.chmod(0o700)
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            _sync(path)
            sizes[str(path.relative_to(checkpoint))] = path.stat().st_size
    temporary = checkpoint / f".{MARKER}"
    temporary.write_text(json.dumps(made | {"sizes": sizes}))
    _sync(temporary)
    temporary.replace(checkpoint / MARKER)
    _sync(checkpoint)
    folders = AttemptFolder(checkpoint.parents[1]).checkpoint_folders()
    older = [path for path in folders if step_of(path) < step_of(checkpoint)]
    complete = sorted((path for path in older if is_complete(path)), key=step_of)
    for path in older:
        if path not in complete[-(KEPT - 1) :]:
            shutil.rmtree(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
