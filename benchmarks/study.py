"""Which last stage is best: PPO, GRPO, RLOO, DPO, rejection sampling and best of n on three tasks, several seeds.

    python -m benchmarks.study run reviews [--seeds 3] [--jobs 1] [section.field=value ...]
    python -m benchmarks.study run walks
    python -m benchmarks.study run sums
    python -m benchmarks.study show                     the tables of what has run
    python -m benchmarks.study draw                     score and judge of reviews over KL

``reviews`` is study_reviews.yaml, each method with several strengths of its pull to the SFT model, so that methods can
be compared at equal KL. ``walks`` (:mod:`benchmarks.walks`) and ``sums`` (:mod:`benchmarks.sums`) have known answers: a
score of 1 is the best there is. A seed changes the last stages and what they sample, not what is before them.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from scipy.stats import t

from benchmarks import sums, walks
from benchmarks.pipelines import write_rows
from benchmarks.tiny_models import save_gpt2
from rlhf.attempt.folder import AttemptFolder
from rlhf.config.pipeline import load_pipeline
from rlhf.pipeline.documents import ancestry
from rlhf.pipeline.plan import plan
from rlhf.pipeline.stage import stages
from rlhf.store import ActionRecord, Store
from rlhf.tracking import read_metrics

HERE = Path(__file__).parent
RESULTS = Path("study.json")
PICTURE = Path("study.svg")
METHODS = ("ppo", "grpo", "rloo", "dpo", "imitate")
BEFORE = ("sft", "rm", "collect", "rank", "select")
STRENGTHS: Mapping[str, tuple[str, Sequence[float]]] = {
    "ppo": ("kl", (0.02, 0.05, 0.15)),
    "grpo": ("kl", (0.02, 0.05, 0.15)),
    "rloo": ("kl", (0.02, 0.05, 0.15)),
    "dpo": ("beta", (0.02, 0.05, 0.2)),
}
"""Coefficients of the pull to the SFT model, for ``reviews``."""
COSTS = ("responses", "seconds", "seconds_before", "peak_gb")
"""What a policy took: responses that were sampled to learn from, seconds of its stage, seconds of the stages that it
needs and sft does not, and the most memory, 10^9 bytes."""
EQUAL_KL = 10.0
"""Nats a response, at which methods are compared."""


@dataclass(frozen=True)
class Task:
    """A pipeline with every method."""

    pipeline: dict[str, Any]
    policies: list[str]
    before: list[str]
    """Instances that all seeds share."""


def reviews(folder: Path) -> Task:  # noqa: ARG001 - a task's signature
    """Return study_reviews.yaml with each method in all its strengths."""
    pipeline = yaml.safe_load((HERE / "study_reviews.yaml").read_text())
    policies = ["imitate"]
    for method, (field, values) in STRENGTHS.items():
        given = pipeline.pop(method)
        for number, value in enumerate(values):
            name = f"{method}_{number}"
            setting = {"coef": value, "limit": 1000.0} if field == "kl" else value
            pipeline[name] = {"uses": method, **given, field: setting}
            policies.append(name)
    return Task(pipeline, policies, list(BEFORE))


def walks_task(folder: Path) -> Task:
    """Return the random walks: a reward for each walk of how short it is."""
    _, known = walks.task()
    demonstrations = [(walk[0], walk[1:]) for walk in known]
    save_gpt2(walks.LETTERS, folder / "base", layers=6, width=144, heads=12, context=24, spread=0.02)
    return _known_answers(folder, "walks", demonstrations, walks.STARTS, walks.STARTS, responses=64)


def sums_task(folder: Path) -> Task:
    """Return sums of numbers with two digits, demonstrated by people of whom 40 % err."""
    train, heldout, demonstrations = sums.task()
    save_gpt2(sums.LETTERS, folder / "base", layers=4, width=128, heads=4, context=16, spread=0.02)
    task = _known_answers(folder, "sums", demonstrations, train, heldout, responses=8)
    task.pipeline["sft"] |= {"epochs": 30, "batch_size": 64, "micro_batch_size": 64}
    for name in ("ppo", "grpo", "rloo", "evaluate"):
        task.pipeline[name]["sampling"] = {"max_new_tokens": 4}
    task.pipeline["collect"]["max_new_tokens"] = 4
    return task


def _known_answers(
    folder: Path,
    name: str,
    demonstrations: Sequence[tuple[str, str]],
    prompts: Sequence[str],
    heldout: Sequence[str],
    *,
    responses: int,
) -> Task:
    pipeline = yaml.safe_load((HERE / "study.yaml").read_text())
    rows = {
        "demonstrations": [{"prompt": prompt, "completion": completion} for prompt, completion in demonstrations],
        "prompts": [{"prompt": prompt} for prompt in prompts],
        "heldout": [{"prompt": prompt} for prompt in heldout],
        # Required by the data stage; not read here.
        "comparisons": [{"prompt": prompts[0], "chosen": "1", "rejected": "2"}],
    }
    files = {kind: str(write_rows(folder / f"{kind}.jsonl", of_kind)) for kind, of_kind in rows.items()}
    heldout_file = files.pop("heldout")
    pipeline["data"] |= files
    pipeline["asked"] |= files | {"heldout": {"prompts": heldout_file}}
    pipeline["model"]["base"] = str(folder / "base")
    reward = [{"function": f"{HERE / name}.py:reward"}]
    for stage in ("ppo", "grpo", "rloo", "select", "evaluate"):
        pipeline[stage]["rewards"] = reward
    pipeline["collect"]["models"] = [{"model": "sft", "responses": responses}]
    pipeline["compare"] = {"function": f"{HERE / name}.py:judge"}
    return Task(pipeline, list(METHODS), [stage for stage in BEFORE if stage != "rm"])


TASKS = {"reviews": reviews, "walks": walks_task, "sums": sums_task}


def run(name: str, folder: Path, seeds: int, jobs: int, overrides: Sequence[str]) -> None:
    """Run a task's methods with all seeds, ``jobs`` at a time, and write the figures of each seed that is done."""
    folder.mkdir(parents=True, exist_ok=True)
    task = TASKS[name](folder.absolute())
    files: list[Path] = []
    for seed in range(seeds):
        settings: dict[str, Any] = {"seed": seed, "store": {"uri": str(folder.absolute() / "store")}}
        for stage in task.before:
            task.pipeline.setdefault(stage, {})
            if stage in ("sft", "rm", "collect"):
                task.pipeline[stage]["seed"] = 0
        task.pipeline["evaluate"]["policies"] = task.policies
        files.append(folder / f"{name}-{seed}.yaml")
        files[-1].write_text(yaml.safe_dump(task.pipeline | settings, sort_keys=False))
    _rlhf(files[0], task.before, overrides)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = []
    with ThreadPoolExecutor(jobs) as pool:
        gpus = itertools.count()
        made = [
            [pool.submit(_rlhf, file, [policy], overrides, next(gpus)) for policy in task.policies] for file in files
        ]
        for file, of_file in zip(files, made, strict=True):
            for policy in of_file:
                policy.result()
            _rlhf(file, ["evaluate"], overrides)
            results[name].append(_figures(file, task.policies, overrides))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def _rlhf(file: Path, names: Sequence[str], overrides: Sequence[str], gpu: int = 0) -> None:
    """Run stages on one of the machine's GPUs, where it has any."""
    environment = dict(os.environ)
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu % torch.cuda.device_count())
    command = [sys.executable, "-m", "rlhf", "run", *names, "--config", str(file), *overrides]
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    if done.returncode:
        print(done.stdout, flush=True)
        raise SystemExit(f"{' '.join(names)} of {file} failed")
    print(f"{file.name}: {', '.join(names)}", flush=True)


def _figures(file: Path, policies: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """Return evaluate's metrics of a seed, and what each policy cost."""
    known = stages()
    config = load_pipeline(file, list(overrides), {stage: one.settings for stage, one in known.items()})
    store = Store.open(config.store.uri)
    records = {stage: one.record for stage, one in plan(config, known, store).items() if one.record is not None}
    shared = ancestry(records["sft"], store)
    costs: dict[str, dict[str, float]] = {}
    for policy in policies:
        made = records[policy]
        rows = read_metrics(AttemptFolder(store.root / "work" / made.key / made.attempt).metrics)
        needed = [one for key, one in ancestry(made, store).items() if key not in shared and key != made.key]
        sampled = [one.metrics["responses"] for one in needed if one.stage == "collect"]
        costs[policy] = {
            "seconds": _seconds(made),
            "seconds_before": sum(_seconds(one) for one in needed),
            "responses": rows[-1].get("episode", 0.0) or sum(sampled),
            "peak_gb": max((row["memory/peak_gb"] for row in rows if "memory/peak_gb" in row), default=0.0),
        }
    answers = store.read_file(records["evaluate"].artifact, "samples.jsonl").splitlines()
    metrics = dict(records["evaluate"].metrics) | distinct_answers([json.loads(line) for line in answers])
    return {"metrics": metrics, "costs": costs}


def _seconds(record: ActionRecord) -> float:
    """Return how long the attempts at a result took, those that were broken off too."""
    earlier = record.provenance.get("earlier_attempts", [])
    return record.seconds + sum(attempt["seconds"] for attempt in earlier)


def distinct_answers(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return for each policy how many different responses a prompt has on average, as a share of its responses."""
    given: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        given.setdefault(row["policy"], {}).setdefault(row["prompt"], []).append(row["after"])
    given["before"] = {}
    for row in rows:
        if row["policy"] == rows[0]["policy"]:
            given["before"].setdefault(row["prompt"], []).append(row["before"])
    return {
        f"distinct/{policy}": mean(len(set(texts)) / len(texts) for texts in of_prompts.values())
        for policy, of_prompts in given.items()
    }


def interval(values: Sequence[float]) -> str:
    """Return the mean of several seeds' values, with Student's 95 % interval."""
    if len(values) < 2:
        return f"{mean(values):.3f}"
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.3f} ± {half:.3f}"


def at_equal_kl(metrics: Mapping[str, float], method: str, figure: str) -> float | None:
    """Return a method's figure at :data:`EQUAL_KL`, on the line through its strengths over √KL from the SFT model.

    None where none of its strengths went so far.
    """
    names = [f"{method}_{number}" for number in range(len(STRENGTHS[method][1]))]
    points = sorted((max(0.0, metrics[f"kl/{name}"]), metrics[f"{figure}/{name}"]) for name in names)
    points.insert(0, (0.0, metrics[f"{figure}/before"]))
    if points[-1][0] < EQUAL_KL:
        return None
    distances, values = zip(*((kl**0.5, value) for kl, value in points), strict=True)
    return float(np.interp(EQUAL_KL**0.5, distances, values))


def show(results: Mapping[str, Any]) -> None:
    """Print the tables."""
    for task, seeds in results.items():
        metrics = [seed["metrics"] for seed in seeds]
        figures = ["score", *(["judge"] if "judge/before" in metrics[0] else [])]
        names = [key.removeprefix("score/") for key in metrics[0] if key.startswith("score/")]
        names = [name for name in names if not name.endswith(("_low", "_high", "_delta"))]
        print(f"\n{task}, {len(seeds)} seeds\n")
        print(
            "| policy | " + " | ".join(figures) + " | KL, nats | distinct answers | responses | seconds | before | GB |"
        )
        print("| --- |" + " --- |" * (len(figures) + 6))
        for name in names:
            values = [interval([one[f"{figure}/{name}"] for one in metrics]) for figure in figures]
            kl = interval([one[f"kl/{name}"] for one in metrics]) if f"kl/{name}" in metrics[0] else ""
            distinct = f"{mean(one[f'distinct/{name}'] for one in metrics):.2f}"
            costs = [seed["costs"][name] for seed in seeds if name in seed["costs"]]
            spent = [f"{mean(one[what] for one in costs):.0f}" if costs else "" for what in COSTS]
            print(f"| {name} | " + " | ".join([*values, kl, distinct, *spent]) + " |")
        if task == "reviews":
            print(f"\nat KL {EQUAL_KL:g}\n")
            for method in STRENGTHS:
                for figure in figures:
                    found = [value for one in metrics if (value := at_equal_kl(one, method, figure)) is not None]
                    print(f"{method} {figure}: {interval(found) if found else 'not reached'} ({len(found)} seeds)")


def draw(seeds: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw score and judge of ``reviews`` over √KL, a mark for each strength and seed."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes: list[Any] = list(figure.subplots(1, 2, sharex=True))
    groups = {method: [f"{method}_{number}" for number in range(len(of[1]))] for method, of in STRENGTHS.items()}
    groups |= {"rejection sampling": ["imitate"], "best of 16": ["best_of_16"]}
    for axis, what in zip(axes, ("score", "judge"), strict=True):
        for number, (label, names) in enumerate(groups.items()):
            points = [
                (seed["metrics"][f"kl/{name}"], seed["metrics"][f"{what}/{name}"]) for seed in seeds for name in names
            ]
            across = np.sqrt(np.maximum([kl for kl, _ in points], 0))
            axis.scatter(across, [value for _, value in points], label=label, color=f"C{number}", s=18)
        axis.axhline(mean(seed["metrics"][f"{what}/before"] for seed in seeds), color="grey", linewidth=1)
        axis.set_xlabel("√KL from the SFT model, √nats a response")
        axis.grid(alpha=0.3)
    axes[0].set(title="reward model, which is optimised", ylabel="score, deviations")
    axes[1].set(title="judge, which is not", ylabel="rating, -4 to 4")
    axes[1].legend()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Run a task, or show or draw what has run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("run", "show", "draw"))
    parser.add_argument("task", nargs="?", choices=sorted(TASKS))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--jobs", type=int, default=1, help="stages that run at a time, on the GPUs in turn")
    parser.add_argument("--folder", type=Path, help="where inputs and store are (default: study-TASK)")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    if given.action == "run":
        if given.task is None:
            parser.error("run takes a task")
        run(given.task, given.folder or Path(f"study-{given.task}"), given.seeds, given.jobs, given.overrides)
    elif given.action == "show":
        show(json.loads(RESULTS.read_text()))
    else:
        draw(json.loads(RESULTS.read_text())["reviews"], PICTURE)


if __name__ == "__main__":
    main()
