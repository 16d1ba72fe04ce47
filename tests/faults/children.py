"""Programs that these tests run as processes of their own: python -m tests.faults.children NAME ARGUMENT..."""

import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from itertools import count
from pathlib import Path
from typing import Any

from rlhf.cli import run
from rlhf.cli.main import main
from rlhf.errors import LeaseHeldError
from rlhf.store import ActionRecord, Store, blobs, key_of, lease
from tests.pipeline.toys import KNOWN
from tests.store.helpers import KEY, files_under, made, make, put, record_of, results, write_files

STAGES = ("data", "sft", "ppo")
OPERATIONS = ("open", "os.mkdir", "os.chmod", "os.link", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def say(*parts: dict[str, Any], **facts: Any) -> None:
    for part in parts:
        facts |= part
    print(json.dumps(facts), flush=True)


def wait_for_word() -> None:
    sys.stdin.readline()


# ---- killed at a file operation


def payload(stage: str) -> dict[str, bytes]:
    return {"model/model.safetensors": stage.encode() * 500, "tokenizer.json": b"{}"}


def run_chain(store: Store, stages: tuple[str, ...]) -> list[str]:
    """Bring stages up to date as a run does, each made of the one before; those that were not there."""
    newly: list[str] = []
    before: list[ActionRecord] = []
    for stage in stages:
        inputs = {str(role): one.artifact for role, one in enumerate(before)}
        key = key_of(stage, 1, {}, inputs)
        record = store.lookup(key)
        ref = store.refs("chain").get(stage)
        if record is not None and (ref is None or ref.key != key):
            assert store.set_ref("chain", stage, key)
        if record is None:
            with store.lease(key, timeout=0):
                attempt = store.new_attempt(key)
                write_files(attempt / "output", payload(stage))
                record = made(stage, {}, store.put_artifact(attempt / "output", "policy"), *before)
                record = store.publish(record, "chain", stage)
                shutil.rmtree(attempt / "output")
            newly.append(stage)
        before = [record]
    return newly


def die_at(step: int, root: Path, program: Callable[[Store], object]) -> bool:
    """Run a program in a process that is killed at its step-th operation on the store's files; whether it was."""
    pid = os.fork()
    if pid == 0:
        seen = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            if event in OPERATIONS and str(root) in str(arguments):
                seen += 1
                if seen == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        program(Store.open(root))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def killed_commit(folder: str, stages: str, steps: str) -> None:
    """Run stages in a process killed at each of some operations ("" for each in turn), each in a store of its own.

    Says of each what a reader finds afterwards, and what the same run does when it is run again.
    """
    chain = STAGES[: int(stages)]
    lease.POLL_SECONDS = 0.01  # nobody else is after the lease of the one that was killed
    # Files that are written side by side have no order, and the operation number n would be another in each process.
    blobs._HASHING_THREADS = 1  # pyright: ignore[reportPrivateUsage]
    for step in map(int, steps.split()) if steps else count(1):
        root = Path(folder) / f"{step:04d}"
        killed = die_at(step, root, lambda store: run_chain(store, chain))
        reader = Store.open(root, create=False)
        committed = results(reader)
        damaged = [item.file for item in reader.verify().damaged]
        store = Store.open(root)
        newly = run_chain(store, chain)
        records = {record.stage: record for record in results(store).values() if record is not None}
        right = [
            files_under(store.checkout(record.artifact, Path(folder) / f"{step:04d}-{stage}")) == payload(stage)
            for stage, record in records.items()
        ]
        say(
            killed=killed,
            committed=len(committed),
            damaged=damaged,
            notices=reader.notices + store.notices,
            kept=all(one is not None and records[one.stage] == one for one in committed.values()),
            again=[stage for stage in newly if stage in {one.stage for one in committed.values() if one is not None}],
            right=right == [True] * len(chain),
        )
        if not steps and not killed:
            return


def killed_collection(folder: str, first: str, every: str) -> None:
    """Collect garbage in processes killed at their first, and then every so many later, operation, each in a store of
    its own."""
    whole = Path(folder) / "whole"
    store = Store.open(whole)
    run_chain(store, STAGES)
    needed = results(store)
    make(store, "ppo", payload("garbage"))
    for step in count(int(first), int(every)):
        root = Path(folder) / f"{step:04d}"
        shutil.copytree(whole, root)
        killed = die_at(step, root, lambda store: store.collect_garbage(0))
        reader = Store.open(root, create=False)
        found = {key: reader.lookup(key) for key in needed}
        damaged = [item.file for item in reader.verify().damaged]
        Store.open(root).collect_garbage(0)
        after = Store.open(root, create=False)
        say(
            killed=killed,
            kept=found == needed == results(after),
            damaged=damaged + [item.file for item in after.verify().damaged],
            notices=reader.notices + after.notices,
            blobs=len(files_under(root / "blobs")),
            trash=len(files_under(root / "trash")),
        )
        if not killed:
            return


# ---- several at one key


def quick_leases() -> None:
    lease.LEASE_SECONDS, lease.BEAT_SECONDS, lease.POLL_SECONDS = 0.8, 0.1, 0.05


def work_on(store: Store, name: str, train: Callable[[], None], on_wait: Callable[[], object] = int) -> None:
    """Do what a run does for a key: wait for its lease, look, and train only where nobody did; say what came of it."""
    told: list[str] = []

    def wait(message: str) -> None:
        told.append(message)
        on_wait()

    with store.lease(KEY, timeout=None, on_wait=wait):
        record = store.lookup(KEY)
        trained = record is None
        if record is None:
            train()
            record = store.commit(record_of(put(store, name), attempt=name))
    say(name=name, pid=os.getpid(), trained=trained, told=told, adopted=record.attempt)


def race(root: str, racers: str, seed: str) -> None:
    """Let so many processes of this one work on a key at once; whoever trains does so until all others wait."""
    quick_leases()
    rng = random.Random(int(seed))
    store = Store.open(root)
    delays = [rng.uniform(0, 0.05) for _ in range(int(racers))]
    start = time.monotonic() + 0.3
    pids: list[int] = []
    for number, delay in enumerate(delays):
        if (pid := os.fork()) == 0:
            time.sleep(max(0.0, start + delay - time.monotonic()))
            waiting = Path(root) / "waiting"
            waiting.mkdir(exist_ok=True)

            def train(waiting: Path = waiting) -> None:
                while len(list(waiting.iterdir())) < len(delays) - 1:
                    time.sleep(0.01)

            work_on(store, f"racer-{number}", train, (waiting / str(number)).touch)
            os._exit(0)
        pids.append(pid)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)


def work(root: str, name: str) -> None:
    """Work on the key, and go on to the commit when told to."""
    quick_leases()

    def train() -> None:
        say(name=name, ready=True)
        wait_for_word()

    work_on(Store.open(root), name, train)


def watch(root: str, hours: str) -> None:
    """Wait for a lease with a clock that is wrong, and jumps, for three times as long as a dead holder's lasts."""
    quick_leases()
    right, began = time.time, time.monotonic()
    time.time = lambda: right() + 3600 * float(hours) * (1 if time.monotonic() - began > 1 else -1)
    try:
        with Store.open(root).lease(KEY, timeout=3 * lease.LEASE_SECONDS):
            say(taken=True)
    except LeaseHeldError as error:
        say(taken=False, what=error.what)


# ---- storage that refuses


def ask(*words: str) -> dict[str, Any]:
    """Run the program in this process, with the toy stages."""
    run.stages = lambda: KNOWN
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(words)
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def fill(folder: str, model: str, config: str, room: str) -> None:
    """Import a model into a store on a file system with so many bytes of room, and again when there is more."""
    ballast = Path(folder) / "ballast"
    with ballast.open("wb") as file:
        file.write(bytes(shutil.disk_usage(folder).free))
        file.truncate(file.tell() - int(room))
    free = shutil.disk_usage(folder).free
    command = ("import", model, "--as", "total", "--config", config)
    first = ask(*command)
    store = Store.open(Path(folder) / "store", create=False)
    records, damaged = len(results(store)), len(store.verify().damaged)
    blobs = len(files_under(store.root / "blobs"))
    ballast.unlink()
    say(
        first,
        free=free,
        records=records,
        damaged=damaged,
        blobs=blobs,
        again=ask(*command),
        verified=ask("verify", "--config", config)["status"],
    )


def only_read(config: str, target: str) -> None:
    """Ask for everything that needs no writing, and then for what does."""
    option = ("--config", config)
    commands = ("plan", "status", "explain total", "lineage", "verify", "gc")
    answers = {command: ask(*command.split(), *option) for command in commands}
    answers["export"] = ask("export", "total", target, *option)
    answers["run"] = ask("run", *option, "total.factor=3")
    say(answers=answers, exported=sorted(files_under(Path(target))), modules="ray" in sys.modules)


if __name__ == "__main__":
    programs = {f.__name__: f for f in (killed_commit, killed_collection, race, work, watch, fill, only_read)}
    programs[sys.argv[1]](*sys.argv[2:])
