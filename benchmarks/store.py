"""Time the store: ``python -m benchmarks.store [--megabytes N] [--artifacts N] [--folder DIR]``.

Commits files of N megabytes, in turn with ``dd conv=fsync`` of such files on the same disk: from elsewhere (copies),
and from an attempt, as every stage does (hard links to files just written). Then, with N other artifacts in the
store, asks for the plan of the quickstart and for a run of it that is all hits. A target missed is exit status 1.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rlhf.config.pipeline import load_pipeline
from rlhf.pipeline.plan import plan
from rlhf.pipeline.stage import stages
from rlhf.store import ActionRecord, Store, key_of

REPOSITORY = Path(__file__).parents[1]
CONFIG = REPOSITORY / "configs" / "quickstart.yaml"
SHARDS = 4
ROUNDS = 5
PARTS = ("demonstrations", "comparisons", "prompts", "judge")
OF_DD, RUN_SECONDS, PLAN_SECONDS = 0.7, 2.0, 0.5


def seconds_of(action: Callable[[], object]) -> float:
    """Return how long an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def commit(store: Store, folder: Path, number: int) -> ActionRecord:
    """Commit a folder as the result of a stage ``benchmark``."""
    settings = {"number": number}
    artifact = store.put_artifact(folder, "policy").digest
    key = key_of("benchmark", 1, settings, {})
    return store.commit(ActionRecord(key, "benchmark", 1, settings, {}, artifact, {}, {}, 0.0, "000001"))


def write(folder: Path, megabytes: int) -> list[Path]:
    """Write a model's files, of random bytes, into a new folder: they stay in the page cache."""
    folder.mkdir(parents=True)
    paths = [folder / f"model-{shard}.safetensors" for shard in range(SHARDS)]
    for path in paths:
        path.write_bytes(os.urandom(megabytes * 1_000_000 // SHARDS))
    return paths


def copy_with_dd(paths: Sequence[Path], target: Path) -> None:
    """Copy files onto the disk."""
    for path in paths:
        copy = ["dd", f"if={path}", f"of={target / path.name}", "bs=1M", "conv=fsync", "status=none"]
        subprocess.run(copy, check=True)


def commits(folder: Path, megabytes: int) -> dict[str, float]:
    """Return seconds of ``dd``, of a commit from elsewhere and of a commit from an attempt: medians over rounds."""
    seconds: dict[str, list[float]] = {"dd": [], "from elsewhere": [], "from an attempt": []}
    for number in range(ROUNDS):
        paths = write(folder / "source", megabytes)
        (folder / "copies").mkdir()
        os.sync()
        seconds["dd"].append(seconds_of(partial(copy_with_dd, paths, folder / "copies")))
        shutil.rmtree(folder / "copies")
        store = Store.open(folder / "store")
        os.sync()
        seconds["from elsewhere"].append(seconds_of(partial(commit, store, folder / "source", number)))
        shutil.rmtree(store.root)
        shutil.rmtree(folder / "source")
        os.sync()
        # A stage leaves its result in the page cache: the commit writes it to the disk.
        store = Store.open(folder / "store")
        output = store.root / "work" / "attempt" / "output"
        write(output, megabytes)
        seconds["from an attempt"].append(seconds_of(partial(commit, store, output, number)))
        shutil.rmtree(store.root)
    return {name: statistics.median(values) for name, values in seconds.items()}


def fill(store: Store, count: int) -> None:
    """Put ``count`` small artifacts into a store, and results for every stage of the quickstart."""
    for number in range(count):
        output = store.new_attempt(key_of("benchmark", 1, {}, {})) / "output"
        output.mkdir()
        for name in ("model.safetensors", "config.json", "tokenizer.json", "rows.jsonl"):
            (output / name).write_text(f"{name} {number if name != 'tokenizer.json' else ''}")
        commit(store, output, number)
        shutil.rmtree(output.parent)
    known = stages()
    config = load_pipeline(CONFIG, [f"store.uri={store.root}"], {name: stage.settings for name, stage in known.items()})
    for name in config.instances:
        planned = plan(config, known, store)[name]
        assert planned.key is not None
        output = store.new_attempt(planned.key) / "output"
        for part in PARTS:
            (output / part).mkdir(parents=True)
            (output / part / "rows.jsonl").write_text(f"{name} {part}")
        (output / "samples.jsonl").write_text("")
        artifact = store.put_artifact(output, planned.stage.kind).digest
        inputs = {role: dict(entry) for role, entry in planned.inputs.items()}
        stage, settings, attempt = planned.stage, dict(planned.settings), output.parent.name
        record = ActionRecord(planned.key, stage.name, stage.version, settings, inputs, artifact, {}, {}, 0.0, attempt)
        store.publish(record, config.name, name)


def commands(folder: Path, artifacts: int) -> dict[str, float]:
    """Return seconds of a plan, a status and a run of hits, each the fastest of ``ROUNDS`` new processes."""
    store = Store.open(folder / "many")
    fill(store, artifacts)
    seconds: dict[str, float] = {}
    for words in (("plan",), ("status",), ("run", "sft", "rm", "ppo", "evaluate")):
        command = [sys.executable, "-m", "rlhf", *words, "--config", str(CONFIG), f"store.uri={store.root}"]
        seconds[words[0]] = min(
            seconds_of(partial(subprocess.run, command, check=True, capture_output=True, cwd=REPOSITORY))
            for _ in range(ROUNDS)
        )
    return seconds


def main() -> int:
    """Print the tables; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--artifacts", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    given = parser.parse_args()
    print(f"load average before: {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores; medians of {ROUNDS} rounds")
    missed = False
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        committed = commits(Path(scratch), given.megabytes)
        for name, seconds in committed.items():
            share = committed["dd"] / seconds
            bad = share < OF_DD
            missed |= bad
            rate = given.megabytes / seconds
            print(f"{name:16} {seconds:6.2f} s  {rate:6.0f} MB/s  {share:4.0%} of dd{'  MISSED' if bad else ''}")
        limits = {"plan": PLAN_SECONDS, "run": RUN_SECONDS}
        for name, seconds in commands(Path(scratch), given.artifacts).items():
            bad = seconds > limits.get(name, seconds)
            missed |= bad
            print(f"rlhf {name:11} {seconds:6.2f} s  with {given.artifacts} artifacts{'  MISSED' if bad else ''}")
    print(f"load average after: {os.getloadavg()[0]:.2f}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
