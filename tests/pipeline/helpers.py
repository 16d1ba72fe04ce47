"""What these tests share: a pipeline file of toy stages, and results made in this process, without Ray."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from rlhf.attempt.context import Context
from rlhf.cluster.worker import load
from rlhf.config.pipeline import PipelineConfig, load_pipeline
from rlhf.pipeline.plan import Planned, plan
from rlhf.pipeline.stage import Stage
from rlhf.store import ActionRecord, Store
from tests.pipeline.toys import KNOWN

REPOSITORY = Path(__file__).parents[2]
THREE = "words: {}\ncount: {}\ntotal: {}\n"
MARK = "RLHF_TEST_MARK"
"""A variable by whose value the processes of one test are found, however they were started."""


def write_pipeline(folder: Path, stages: str = THREE, name: str = "toy.yaml") -> Path:
    """A pipeline file whose store lies beside it."""
    path = folder / name
    path.write_text(f"store: {{uri: {folder / 'store'}}}\n{stages}")
    return path


def load_toy(path: Path, *overrides: str) -> PipelineConfig:
    return load_pipeline(path, overrides, {name: stage.settings for name, stage in KNOWN.items()})


def planned(
    path: Path, *overrides: str, known: Mapping[str, Stage] = KNOWN, targets: Sequence[str] = ()
) -> dict[str, Planned]:
    config = load_toy(path, *overrides)
    return plan(config, known, Store.open(config.store.uri, create=False), targets)


def states(found: Mapping[str, Planned]) -> dict[str, str]:
    return {name: one.state for name, one in found.items()}


def make(path: Path, *overrides: str, only: str | None = None, known: Mapping[str, Stage] = KNOWN) -> None:
    """Bring the pipeline's stages (or ``only`` one of them) up to date in this process, as a run does."""
    config = load_toy(path, *overrides)
    store = Store.open(config.store.uri)
    for name in config.instances:
        one = plan(config, known, store)[name]
        if one.record is None and only in (None, name):
            record = made(one, store)
            store.set_ref(config.name, name, record.key)
        elif one.record is not None and one.why != "imported":
            store.set_ref(config.name, name, one.record.key)


def made(one: Planned, store: Store, **provenance: Any) -> ActionRecord:
    """Make one stage in this process and commit it."""
    assert one.key is not None
    attempt = store.new_attempt(one.key)
    inputs = {
        role: store.checkout(str(entry["artifact"]), attempt / "inputs" / role, str(entry["part"]))
        for role, entry in one.inputs.items()
    }
    context: Context[Any] = Context(
        one.name, one.key, one.instance.settings, inputs, attempt / "output", attempt, store.root / "cache"
    )
    context.output.mkdir()
    metrics = load(one.stage.code)(context)
    return store.commit(
        ActionRecord(
            key=one.key,
            stage=one.stage.name,
            version=one.stage.version,
            settings=dict(one.settings),
            inputs={role: dict(entry) for role, entry in one.inputs.items()},
            artifact=store.put_artifact(context.output, one.stage.kind).digest,
            metrics=metrics,
            provenance={"host": "here"} | provenance,
            seconds=1.5,
            attempt=attempt.name,
        )
    )


def install_toys(site: Path, module: str = "tests.pipeline.toys", known: Mapping[str, Stage] = KNOWN) -> Path:
    """A folder that, on the path, registers a module's toy stages as an installed package would."""
    info = site / "toys-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1\n")
    points = "".join(f"{name} = {module}:{name.upper()}\n" for name in known)
    (info / "entry_points.txt").write_text(f"[rlhf.stages]\n{points}")
    return site


def start(site: Path, *words: str | Path, mark: str = "") -> "subprocess.Popen[str]":
    """Start the program as a process, in a session of its own as from a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf", *map(str, words)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{site}", MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come to pass in {seconds:g} s"
        time.sleep(0.05)


def marked(mark: str) -> dict[int, str]:
    """The processes whose environment holds the mark, and their names."""
    wanted = f"{MARK}={mark}".encode()
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_text().split("\0")[0]
            except OSError:
                continue  # ended meanwhile, or somebody else's
    return found


def left(mark: str) -> list[str]:
    """What still runs of them, without Ray's agents, which may try for a minute to report their node's end."""
    # An agent that has only begun has not given itself its name yet.
    lines = [line for pid in marked(mark) if (line := _described(pid))]
    return [line for line in lines if "Agent" not in line and "/agent" not in line]


def outliving(mark: str, seconds: float = 10.0) -> list[str]:
    """What still runs of them after so long; nothing as soon as nothing does."""
    end = time.monotonic() + seconds
    while (here := left(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    return here


def kill_alone(process: "subprocess.Popen[str]", after: float = 0.0) -> None:
    """Kill a process after so many seconds, and none of those that it started."""
    time.sleep(after)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def _described(pid: int) -> str:
    """A process's number, state, parent and command; nothing of one that has ended meanwhile."""
    process = Path(f"/proc/{pid}")
    try:
        state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
        return f"{pid} ({state}, of {parent}): {(process / 'cmdline').read_text().replace(chr(0), ' ')}"
    except OSError:
        return ""


def end(process: "subprocess.Popen[str]") -> None:
    """Take a process that a failed test left behind with it, by its own session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def write_weights(folder: Path) -> None:
    """The smallest weights that a model's folder may hold."""
    save_file({"weight": np.zeros(2, np.float32)}, folder / "model.safetensors")


def write_model(folder: Path) -> Path:
    """A folder with the files that a model of the toys is imported with."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    write_weights(folder)
    return folder
