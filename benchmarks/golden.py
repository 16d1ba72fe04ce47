"""The losses of sft, rm and ppo over 20 steps each: whether a change that should change nothing did.

    python -m benchmarks.golden            compare with golden.json, exit status 1 where a loss moved by more than 1e-6
    python -m benchmarks.golden --record   write golden.json anew

A tiny Llama from random weights, in fp32 on a CPU, through the stages. Other processors and versions of torch
round differently: record before a change, and compare after it, on one machine.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.pipelines import opened, write_rows

GOLDEN = Path(__file__).with_suffix(".json")
TOLERANCE = 1e-6
"""Relative to a number, or to 1 where that is smaller."""
STEPS = 20
TRAINED = {"batch_size": 4, "micro_batch_size": 2, "max_length": 48, "precision": "fp32", "checkpoint_every": 1000}
PIPELINE: dict[str, Any] = {
    "pipeline": "golden",
    "seed": 0,
    "tracking": {"wandb": "disabled"},
    "cluster": {"cpus": 1, "gpus": 0},
    "model": {
        "base": "scratch",
        "scratch": {"vocabulary": 400, "hidden_size": 32, "layers": 2, "heads": 2, "context": 96},
    },
    "rank": {},
    "sft": TRAINED | {"epochs": 3, "optimizer": {"learning_rate": 1e-3}, "workers": {"cpus": 1}},
    "rm": TRAINED | {"epochs": 1, "optimizer": {"learning_rate": 1e-3}, "workers": {"cpus": 1}},
    "ppo": {
        "iterations": STEPS,
        "rollouts": 8,
        "epochs": 2,
        "minibatches": 2,
        "micro_batch_size": 2,
        "max_prompt_length": 48,
        "sampling": {"max_new_tokens": 8},
        "policy_learning_rate": 1e-3,
        "value_learning_rate": 1e-3,
        "ptx": {"coef": 0.1},
        "precision": "fp32",
        "checkpoint_every": 1000,
        "workers": {"cpus": 1},
    },
}
QUALITIES = ("wonderful", "moving", "funny", "fine", "dull", "tedious", "awful", "sad")
SUBJECTS = (
    "film",
    "story",
    "scene",
    "actor",
    "script",
    "camera",
    "evening",
    "picture",
    "score",
    "plot",
    "end",
    "start",
)


def sources(folder: Path) -> dict[str, Any]:
    """Write the sources of the data stage: 96 records of each kind, a part of them held out."""
    prompts = [
        {"prompt": f"Write of the {subject} {number}"} for number, subject in enumerate(SUBJECTS) for _ in QUALITIES
    ]
    texts = [f"The {subject} was {quality}." for subject in SUBJECTS for quality in QUALITIES]
    rows = [row | {"completion": text} for row, text in zip(prompts, texts, strict=True)]
    pairs = [row | {"chosen": text, "rejected": f"{text} Not."} for row, text in zip(prompts, texts, strict=True)]
    return {
        "prompts": str(write_rows(folder / "prompts.jsonl", prompts)),
        "demonstrations": str(write_rows(folder / "demonstrations.jsonl", rows)),
        "comparisons": str(write_rows(folder / "comparisons.jsonl", pairs)),
        "judge": None,
    }


def measured() -> dict[str, list[dict[str, float]]]:
    """Run the stages; return each stage's metrics of its first steps, without times and memory."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = folder / "golden.yaml"
        file.write_text(json.dumps(PIPELINE | {"data": sources(folder)}))
        with opened(file, folder) as pipeline:
            pipeline.run([], "sft", "rm", "ppo")
            rows = {name: pipeline.metrics(name)[:STEPS] for name in ("sft", "rm", "ppo")}
    timed = ("time/", "perf/", "memory/")
    return {
        name: [
            {key: value for key, value in row.items() if isinstance(value, int | float) and not key.startswith(timed)}
            for row in steps
        ]
        for name, steps in rows.items()
    }


def largest_difference(before: list[dict[str, float]], after: list[dict[str, float]]) -> tuple[float, str]:
    """Return the largest relative difference of two runs' numbers, and where it is."""
    worst = (0.0, "nowhere")
    if [row.keys() for row in before] != [row.keys() for row in after]:
        return math.inf, "the names or number of steps"
    for step, (old, new) in enumerate(zip(before, after, strict=True), start=1):
        for name, value in old.items():
            difference = abs(new[name] - value) / max(1.0, abs(value))
            if difference > worst[0]:
                worst = difference, f"{name} of step {step}"
    return worst


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="write golden.json instead of comparing with it")
    record = parser.parse_args().record
    os.environ["OMP_NUM_THREADS"] = "1"
    after = measured()
    if record:
        GOLDEN.write_text(json.dumps(after, indent=1) + "\n")
        print({name: len(steps) for name, steps in after.items()})
        return 0
    before = json.loads(GOLDEN.read_text())
    moved = 0
    for name in before:
        difference, where = largest_difference(before[name], after[name])
        moved += difference > TOLERANCE
        print(f"{name}: {len(before[name])} steps, largest difference {difference:.1e}, {where}")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
