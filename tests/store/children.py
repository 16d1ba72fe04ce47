"""Programs that the tests run as processes of their own: python -m tests.store.children NAME ARGUMENT..."""

import json
import os
import resource
import sys
from pathlib import Path

from rlhf.errors import TryAgainError
from rlhf.store import Store, lease
from tests.store.helpers import KEY, files_under, put, record_of, write_files


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
    """Hold the lease until told to let go; say when it is lost."""
    lease.BEAT_SECONDS = float(beat_seconds)
    with Store.open(root).lease(KEY, on_loss=lambda _: print("lost", flush=True)):
        pause()


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
    programs = {f.__name__: f for f in (race, hold, store_too_much, read_only)}
    programs[sys.argv[1]](*sys.argv[2:])
