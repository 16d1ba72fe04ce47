"""Simulate the driver of a large cluster: ``python -m benchmarks.driver [--stages N …] [--latency MS] [--json FILE]``.

A sweep of N stages, half of them PPO with 8 ranks and half their evaluation, is brought up to date on a simulated
cluster of 1,000 GPUs. Planning, keys, leases, attempts, commits and refs are the program's own, on a store in a local
folder whose every request takes ``--latency`` milliseconds longer, as a bucket's does. Only Ray is left out: a stage
waits for some ``--seconds`` and writes a small file. Printed are, for each N, the driver's seconds a stage, those of
planning, and the requests: what grows with N shows.

A stage of the sweep takes some ten minutes in earnest, and 125 groups have room: the driver must be ready for the next
stage every ``600 / 125 = 4.8`` seconds, or the cluster waits for it.
"""

import argparse
import json
import random
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from rlhf.cluster import worker_group
from rlhf.cluster.session import Resources, Session
from rlhf.cluster.worker import Call
from rlhf.config.pipeline import ClusterSettings, PipelineConfig, load_pipeline
from rlhf.pipeline import disk, runner
from rlhf.pipeline.plan import Planned, plan
from rlhf.pipeline.runner import Runner
from rlhf.pipeline.stage import OURS, Stage
from rlhf.store import Store
from rlhf.store.backend import LocalBackend

NODES, GPUS_OF_NODE, RANKS = 125, 8, 8
GROUP_SECONDS = 600.0


@dataclass
class Counts:
    """What the driver did."""

    requests: Counter[str] = field(default_factory=Counter[str])
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict[str, float](float))
    """Of the main thread, by part."""

    @contextmanager
    def timed(self, part: str) -> Generator[None]:
        """Add the seconds of the body to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start


class SlowBackend(LocalBackend):
    """A folder that answers each request after a while."""

    def __init__(self, root: Path, latency: float, counts: Counts) -> None:
        super().__init__(root)
        self._latency, self._counts = latency, counts

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name not in REQUESTS:
            return value
        return self._slowed(name, value)

    def _slowed(self, name: str, request: Callable[..., Any]) -> Callable[..., Any]:
        def slowed(*args: Any, **options: Any) -> Any:
            self._counts.requests[name] += 1
            time.sleep(self._latency)
            return request(*args, **options)

        return slowed


REQUESTS = (
    "read",
    "create",
    "create_from",
    "put",
    "replace",
    "state",
    "fetch",
    "names",
    "move",
    "delete",
    "stamped",
    "stamp",
)


class SimulatedSession(Session):
    """A session with a cluster of ``nodes`` nodes that is not there."""

    def __init__(self, nodes: int) -> None:
        super().__init__(ClusterSettings())
        self._nodes = nodes

    def resources(self) -> Resources:
        """Return nodes of 8 GPUs."""
        return Resources(cpus=[64] * self._nodes, gpus=[GPUS_OF_NODE] * self._nodes)

    def check(self) -> None:
        """Find everything well."""


class Silent:
    """A reporter that shows nothing."""

    def update(self, stage: str, **changes: Any) -> None:
        """Do nothing."""

    def line(self, text: str) -> None:
        """Do nothing."""


def sweep(count: int, folder: Path) -> PipelineConfig:
    """Return a pipeline of ``count`` stages: one of each that ppo needs, and ppo with its evaluation for many seeds."""
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n', encoding="utf-8")
    sections: dict[str, Any] = {
        "pipeline": "sweep",
        "data": {"demonstrations": str(rows), "comparisons": str(rows), "prompts": str(rows), "judge": None},
        "model": {"base": "scratch"},
        "rank": {},
        "sft": {},
        "rm": {},
    }
    for number in range((count - 5) // 2):
        ppo, evaluation = f"ppo-{number:05d}", f"evaluate-{number:05d}"
        sections[ppo] = {"uses": "ppo", "seed": number, "workers": {"count": RANKS}}
        sections[evaluation] = {"uses": "evaluate", "inputs": {"after": ppo}, "judge": False}
    file = folder / "sweep.yaml"
    file.write_text(json.dumps(sections), encoding="utf-8")
    return load_pipeline(file, [], {stage.name: stage.settings for stage in OURS})


def simulate(count: int, latency: float, seconds: float, nodes: int = NODES) -> dict[str, Any]:
    """Bring a sweep of ``count`` stages up to date; return what the driver did.

    latency  of a request to the store, in seconds
    seconds  of a stage, on average
    """
    counts = Counts()
    draw = random.Random(0)  # noqa: S311 - no secret

    def produce(call: Call, *_: Any) -> dict[str, float]:
        time.sleep(seconds * draw.uniform(0.5, 1.5))
        (call.context.output / "result.json").write_text(json.dumps({"stage": call.context.stage}))
        for part in ("demonstrations", "comparisons", "prompts"):
            if call.context.stage == "data":
                (call.context.output / part).mkdir()
                (call.context.output / part / "rows.jsonl").write_text("{}\n")
        return {"score": 1.0}

    def produce_in_group(begin: Callable[[None], tuple[Call, Any]], *_: Any) -> dict[str, float]:
        return produce(begin(None)[0])

    def planned(*args: Any) -> dict[str, Planned]:
        with counts.timed("plan"):
            return plan(*args)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = sweep(count, folder)
        store = Store(folder / "store", SlowBackend(folder / "store", latency, counts))
        known: dict[str, Stage] = {stage.name: replace(stage, preflight=None) for stage in OURS}
        with (
            mock.patch.object(worker_group, "run_task", produce),
            mock.patch.object(worker_group, "run_group", produce_in_group),
            mock.patch.object(runner, "plan", planned),
            mock.patch.object(disk, "check"),
            SimulatedSession(nodes) as session,
        ):
            most, done = [0], threading.Event()
            threading.Thread(target=_count_threads, args=(most, done), daemon=True).start()
            with counts.timed("whole"):
                Runner(config, known, store, session, Silent()).run([])
            done.set()
            made, requests = dict(counts.seconds), counts.requests.total()
            with counts.timed("all cached"):
                Runner(config, known, store, session, Silent()).run([])
    stages = len(config.instances)
    return {
        "stages": stages,
        "latency_ms": latency * 1e3,
        "seconds_a_stage": made["whole"] / stages,
        "plan_seconds_a_stage": made["plan"] / stages,
        "requests_a_stage": requests / stages,
        "most_threads": most[0],
        "all_cached_seconds": counts.seconds["all cached"],
        "requests_a_cached_stage": (counts.requests.total() - requests) / stages,
    }


def _count_threads(most: list[int], done: threading.Event) -> None:
    while not done.wait(0.05):
        most[0] = max(most[0], threading.active_count())


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--latency", type=float, default=5.0, help="milliseconds of each request to the store")
    parser.add_argument("--seconds", type=float, default=1.0, help="mean seconds of a stage")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    print(f"the cluster ends a stage every {GROUP_SECONDS * RANKS / (NODES * GPUS_OF_NODE):.1f} s")
    print("| stages | s a stage | of it planning | requests a stage | threads | all cached, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for count in options.stages:
        row = simulate(count, options.latency / 1e3, options.seconds)
        rows.append(row)
        print(
            f"| {row['stages']} | {row['seconds_a_stage']:.3f} | {row['plan_seconds_a_stage']:.3f} | "
            f"{row['requests_a_stage']:.0f} | {row['most_threads']} | {row['all_cached_seconds']:.2f} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
