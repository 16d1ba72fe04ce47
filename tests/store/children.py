"""Programs that the tests run as processes of their own: python -m tests.store.children NAME ARGUMENT..."""

import json
import os
import resource
import signal
import sys
from itertools import count
from pathlib import Path

from rlhf.errors import TryAgainError
from rlhf.store import Store, lease
from tests.store.helpers import KEY, commit, files_under, put, record_of, small_payload, write_files


def pause() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def race(root: str, name: str) -> None:
    """Commit a result of one's own when told to; print whose won."""
    store = Store.open(root)
    record = record_of(put(store, name), attempt=name)
    pause()
    print(store.commit(record).attempt)


def hold(root: str, beat_seconds: str) -> None:
    """Hold the lease until told to let go."""
    lease.BEAT_SECONDS = float(beat_seconds)
    with Store.open(root).lease(KEY):
        pause()


def killed(folder: str) -> None:
    """Commit in processes killed at their first, second, ... file operation, each in a store of its own.

    Prints one JSON line for each: what a reader finds afterwards, and what the same commit run again gives.
    """
    for step in count(1):
        root = Path(folder) / f"{step:03d}"
        pid = os.fork()
        if pid == 0:
            _kill_at(step, str(root))
            commit(Store.open(root))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        reader = Store.open(root, create=False)
        found = reader.lookup(KEY)
        damaged = [item.file for item in reader.verify().damaged]
        again = commit(Store.open(root))
        hit = reader.lookup(KEY)
        assert hit is not None
        assert hit == again
        files = files_under(reader.checkout(hit.artifact, Path(folder) / f"out-{step:03d}"))
        print(
            json.dumps(
                {
                    "killed": os.WIFSIGNALED(status),
                    "found": found is not None,
                    "damaged": damaged,
                    "notices": reader.notices,
                    "right": files == small_payload("one"),
                }
            )
        )
        if not os.WIFSIGNALED(status):
            return


def _kill_at(step: int, root: str) -> None:
    """Die at the step-th operation on the store's files, just before the operating system is asked for it."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.mkdir", "os.chmod", "os.link", "os.rename", "os.remove") and root in str(arguments):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def store_too_much(root: str, source: str, file_limit: str) -> None:
    """Store a payload that does not fit; print the error's status and text, and what is left of the attempt."""
    if int(file_limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_limit), int(file_limit)))
    write_files(Path(source), {"model.safetensors": b"x" * 4096 * 256} if not int(file_limit) else {})
    store = Store.open(root)
    free = store.free_bytes()
    try:
        store.put_artifact(Path(source), "policy")
    except TryAgainError as error:
        left = sorted(files_under(Path(root)))
        print(json.dumps({"type": type(error).__name__, "what": error.what, "free": free, "left": left}))


def read_only(root: str) -> None:
    """Read and write, as somebody who may only read; print what came of it."""
    if os.getuid() == 0:
        os.setuid(65534)
    told: dict[str, object] = {}
    store = Store.open(root, create=False)
    hit = store.lookup(KEY)
    told["hit"] = hit is not None and store.manifest(hit.artifact).digest == hit.artifact
    told["damaged"] = len(store.verify().damaged)
    told["notices"] = store.notices
    for name, attempt in {
        "open": lambda: Store.open(root),
        "ref": lambda: store.set_ref("quickstart", "sft", KEY),
        "attempt": lambda: store.new_attempt(KEY),
    }.items():
        try:
            attempt()
        except TryAgainError as error:
            told[name] = [type(error).__name__, error.where]
    print(json.dumps(told))


if __name__ == "__main__":
    programs = {f.__name__: f for f in (race, hold, killed, store_too_much, read_only)}
    programs[sys.argv[1]](*sys.argv[2:])
