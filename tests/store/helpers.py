"""What the tests of the store share: small payloads, records, and programs run as processes of their own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from rlhf.store import ActionRecord, Manifest, Store, key_of

REPOSITORY = Path(__file__).parents[2]
SETTINGS = {"lr": 1e-5, "seed": 1, "model": {"base": "a" * 40}}
KEY = key_of("sft", 1, SETTINGS, {})


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def small_payload(text: str) -> dict[str, bytes]:
    return {
        "policy/model.safetensors": text.encode() * 100,
        "policy/config.json": b"{}",
        "tokenizer/merges.txt": b"a b\n",
        "rows.jsonl": text.encode(),
    }


def put(store: Store, text: str = "one") -> Manifest:
    """Store a payload in the way a stage's result is: from a folder in an attempt."""
    result = store.new_attempt(KEY) / "result"
    return store.put_artifact(write_files(result, small_payload(text)), "policy")


def record_of(manifest: Manifest, attempt: str = "000001") -> ActionRecord:
    return ActionRecord(
        key=KEY,
        stage="sft",
        version=1,
        settings=SETTINGS,
        inputs={},
        artifact=manifest.digest,
        metrics={"eval/loss": 1.25},
        provenance={"host": "somewhere", "packages": {"torch": "2.11"}},
        seconds=3.5,
        attempt=attempt,
    )


def commit(store: Store, text: str = "one") -> ActionRecord:
    return store.commit(record_of(put(store, text)))


def made(stage: str, settings: dict[str, Any], manifest: Manifest, *inputs: ActionRecord) -> ActionRecord:
    """The record of a stage that made an artifact out of other results, one role each."""
    sources: dict[str, dict[str, str | None]] = {
        str(role): {"artifact": one.artifact, "part": "", "digest": one.artifact, "key": one.key}
        for role, one in enumerate(inputs)
    }
    key = key_of(stage, 1, settings, {role: str(source["digest"]) for role, source in sources.items()})
    return ActionRecord(key, stage, 1, settings, sources, manifest.digest, {}, {}, 1.0, "000001")


def make(
    store: Store,
    stage: str,
    files: dict[str, bytes],
    *inputs: ActionRecord,
    pipeline: str | None = None,
    **settings: Any,
) -> ActionRecord:
    """Make and commit a result of some files; it is its pipeline's latest where one is named."""
    output = store.new_attempt(KEY) / "output"
    record = made(stage, settings, store.put_artifact(write_files(output, files), "data"), *inputs)
    return store.commit(record) if pipeline is None else store.publish(record, pipeline, stage)


def results(store: Store) -> dict[str, ActionRecord | None]:
    """What a reader finds under each key."""
    return {key: store.lookup(key) for key in store.keys()}  # noqa: SIM118 - not a mapping


def flip_bit(path: Path, position: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)


def files_under(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def child(*arguments: str | Path) -> "subprocess.Popen[str]":
    """Start one of the programs in children.py; it says a line when it is ready and goes on when it reads one."""
    command = [sys.executable, "-m", "tests.store.children", *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def say(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def hear(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def finish(process: "subprocess.Popen[str]") -> str:
    """Let a child end by itself and return what it still had to say."""
    out, _ = process.communicate("\n", timeout=60)
    assert process.returncode == 0
    return out.strip()
